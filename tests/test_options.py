"""Options are declared once: the command line, its help and its checks follow from the declaration."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
import typer
from command_line import Run, refused

import cli
from mmdata.commands.options import add
from mmdata.errors import UsageError
from mmdata.options import Option, check, option
from mmdata.stats.report.page import LANGS
from mmdata.tokenizer.toolkit import train
from mmdata.tokenizer.toolkit.layouts import LAYOUTS
from mmdata.tokenizer.toolkit.options import PATTERNS, TEMPLATES


@dataclass(frozen=True, slots=True)
class ExampleOptions:
    lr: float | None = option(None, "Peak rate.", "Optimizer", above=0, by_stage={"sft": 1e-4, "dpo": 4e-8})
    log: tuple[str, ...] = option((), "Also to this.", "Logging", choices=("one", "two"))
    compile: bool = option(True, "Run uncompiled.", "Hardware", flag="--no-compile")
    share: bool | None = option(None, "Share prompts.", "Hardware")
    rows: int = option(4, "Rows at once.", least=1, most=32)


@dataclass(frozen=True, slots=True)
class OtherOptions:
    name: str  # not declared: no option
    warmup: float = option(None, "Share.", least=0, below=1, by_stage={"sft": 0.1, "dpo": 0.1})


def run_example(*words: str) -> dict[str, Any]:
    """The values a command is called with."""
    called: dict[str, Any] = {}

    def example(
        name: Annotated[str, typer.Argument(help="A name.")],
        options: ExampleOptions,
        values: Annotated[dict[str, Any], OtherOptions],
        times: Annotated[float, Option("How often.", least=0, below=1)] = 0.5,
        yes: Annotated[bool, Option("Do not ask.", flag="--yes-please")] = False,
    ) -> None:
        """Do something.

        Example: mm example NAME
        """
        called.update(name=name, options=options, values=values, times=times, yes=yes)

    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    add(app, example)
    app(["NAME", *words], standalone_mode=False)
    return called


def test_an_options_class_becomes_options_and_comes_back_as_an_instance() -> None:
    plain = {"name": "NAME", "options": ExampleOptions(), "values": {"warmup": None}, "times": 0.5, "yes": False}
    assert run_example() == plain
    line = "--lr 2 --log one --log two --no-compile --no-share --rows 9 --times 0 --yes-please"
    called = run_example(*line.split())
    assert called["options"] == ExampleOptions(lr=2, log=("one", "two"), compile=False, share=False, rows=9)
    assert called["times"] == 0 and called["yes"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lr nan", "--lr nan is not a finite number"),
        ("--lr inf", "--lr inf is not a finite number"),
        ("--lr 0", "--lr 0.0 must be greater than 0"),
        ("--warmup 1", "--warmup 1.0 must be below 1"),
        ("--rows 0", "--rows 0 must be at least 1"),
        ("--rows 33", "--rows 33 must be at most 32"),
        ("--times 1", "--times 1.0 must be below 1"),
        ("--log one --log three", "--log three is unknown"),
    ],
)
def test_values_out_of_range_are_refused_before_the_command_is_called(words: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as refusal:
        run_example(*words.split())
    helps = "use one of one, two" if "unknown" in message else "for the default"
    assert refusal.value.exit_code == 2 and helps in refusal.value.fix


def test_check_refuses_what_the_command_line_would() -> None:
    check(ExampleOptions())
    with pytest.raises(UsageError, match="--rows 99 must be at most 32"):
        check(ExampleOptions(rows=99))


def test_help_shows_groups_defaults_and_ranges(capsys: pytest.CaptureFixture[str]) -> None:
    run_example("--help")
    shown = capsys.readouterr().out
    order = ["Arguments:", "Optimizer:", "Logging:", "Hardware:", "Options:", "Example: mm example NAME"]
    assert [shown.index(heading) for heading in order] == sorted(shown.index(heading) for heading in order)
    flat = " ".join(shown.split())
    assert "Peak rate. [default: sft 0.0001, dpo 4e-08; greater than 0]" in flat
    assert "--warmup <float> Share. [default: 0.1; at least 0; below 1]" in flat
    assert "Rows at once. [default: 4; at least 1; at most 32]" in flat
    assert "--share / --no-share" in flat and "--log one|two" in flat and "--no-compile Run uncompiled." in flat


def commands(group: Any = None, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command of mm with the words that call it."""
    group = group or typer.main.get_command(cli.app)
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*words, name))
        else:
            yield (*words, name), command


def numbers(kind: type) -> list[str]:
    """`command … --flag` for every option of this type of every command, with something for what is required."""
    lines = []
    for words, command in commands():
        required = [p for p in command.params if p.required]
        filled = [f"{p.opts[0]} x" if p.opts[0].startswith("-") else "x" for p in required]
        lines += [
            f"{' '.join([*words, *filled])} {p.opts[0]}"
            for p in command.params
            if getattr(p, "type_descriptor", None) and p.type_descriptor.annotation is kind and p.opts[0][0] == "-"
        ]
    return lines


def test_no_option_of_any_command_takes_nan_infinity_or_a_negative_number(mm: Run) -> None:
    assert len(numbers(float)) > 15 and len(numbers(int)) > 30
    for line in numbers(float):
        for value in ("nan", "inf", "-inf", "-1"):
            ran = refused(mm(f"{line} {value}"), line.split()[-1], "finite" if value != "-1" else "must be ")
            assert ran.code == 2, line
    for line in numbers(int):
        value, bound = (2**63, "at most") if line.endswith("--seed") else (-1, "at least")
        assert refused(mm(f"{line} {value}"), f"must be {bound}").code == 2, line


def test_commands_with_many_options_show_them_in_groups() -> None:
    for words, command in commands():
        if len(command.params) > 15:
            grouped = [p for p in command.params if getattr(p, "rich_help_panel", None)]
            assert len({p.rich_help_panel for p in grouped}) > 1, words
            options = [p for p in command.params if p.opts[0].startswith("-") and p.name not in ("quiet", "verbose")]
            assert len(grouped) >= len(options) - 2, words


def test_choices_that_other_modules_know_are_the_same() -> None:
    """Options are declared where nothing heavy is imported, so these stand in two places."""
    choices = {p.name: p.metavar for _, command in commands() for p in command.params}
    assert choices["lang"] == "|".join(LANGS)
    assert set(TEMPLATES) == set(LAYOUTS) and set(PATTERNS) == set(train.PATTERNS)
