"""The README and the other pages say what is true: their commands exist, run, and are all named; the tree is the tree."""

import re
import shlex
from pathlib import Path

import pytest
import typer
from command_line import Run, fine

import cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
COMMANDS = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]


def lines_of(page: Path) -> list[str]:
    """Command lines of a page: those of its fenced blocks."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    lines = (line.removeprefix("$ ").strip() for block in blocks for line in block.splitlines())
    return [line for line in lines if line.startswith("mm ")]


def quickstart() -> list[str]:
    return lines_of(ROOT / "README.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_on_a_page_exists_with_its_options(page: Path) -> None:
    for line in lines_of(page):
        words = shlex.split(line, comments=True)
        command = COMMANDS.get(words[1])
        if hasattr(command, "commands"):  # a group, such as mm tokenizer
            command = command.commands.get(words[2])
        assert command, line
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert {word.split("=")[0] for word in words if word.startswith("--")} <= known | {"--help"}, line


def test_every_command_of_mm_stands_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"`mm {name}" not in text] == []


def test_the_readme_begins_with_set_up_and_four_commands() -> None:
    head = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:25]
    assert any(line.startswith("make demo") for line in head) and any(line.startswith("make test") for line in head)
    assert sum(line.startswith("mm ") for line in head) >= 4


def test_the_readmes_commands_run(home: Path, mm: Run) -> None:
    """As they stand, on small data: fetch needs a network and the model a minute, so the data is here and the model tiny."""
    lines = [line.split("#")[0].replace("--model minimind2-small", "--model tiny") for line in quickstart()]
    assert [line.split()[1] for line in lines] == ["fetch", "pack", "train", "train", "train", "chat"]
    for line in lines[1:-1]:
        fine(mm(f"{line.removeprefix('mm ')}{' --steps 1 --quiet' if ' train ' in line else ''}"))
    fine(mm(f"{lines[-1].removeprefix('mm ')} --prompt hello --max-new-tokens 2"))


def test_the_readmes_tree_names_every_folder() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    folders = {path.parent.relative_to(ROOT) for top in ("mmdata", "mmtrain") for path in (ROOT / top).rglob("*.py")}
    assert [str(path) for path in sorted(folders) if f"{path.name}/ " not in text] == []
