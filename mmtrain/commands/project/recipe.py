"""Reads a recipe: a TOML file whose tables are commands of mm, with their options as keys.

`[pack]` is one step, `[pack.short]` and `[pack.long]` are two steps of one command. Keys are the names of options without
the leading dashes (`max_len` for --max-len), or of arguments (`files`, `run`, `stage`). They are looked up in the commands
themselves, so that a recipe accepts what the command line accepts. Steps are executed in the order of the tables; tables
of one command follow each other.
"""

import difflib
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdata.commands.pack import dataset_names
from mmdata.commands.terminal import checking
from mmdata.errors import InputError, MMError, UsageError
from mmtrain.config import SHAPE_SETTINGS, STAGE_KINDS

DATA_DIR, SHARDS_DIR, RUNS_DIR = Path("data"), Path("shards"), Path("runs")  # in the directory that a recipe works in
RECIPES = Path(__file__).parents[2] / "recipes"  # those that come with mm
NEW_MODEL = {
    "model",
    "depth",
    *SHAPE_SETTINGS,
    "untie",
    "pad_vocab",
}  # a step with one of these begins with new weights
OUTPUTS = ("out", "corpus", "html", "rest", "per_sequence")  # options that name what a command writes
ANSWERS = ("--json", "--quiet", "--temperature", "0", "--max-new-tokens", "96")  # of `mm chat` after a training step
TOP = {"title": str, "questions": list, "price_per_hour": (int, float)}
Values = dict[str, Any]  # option or argument -> its value, as in the recipe


@dataclass(frozen=True)
class Step:
    """A command to execute. name: such as "train.sft_512". values: its options. argv: the same as words of the command
    line. stdin: lines for its standard input. is_captured: its output is kept in the record of the recipe."""

    name: str
    command: tuple[str, ...]
    values: Values
    argv: tuple[str, ...]
    stdin: str = ""
    is_captured: bool = False

    @property
    def places(self) -> list[str]:
        """The paths that the step writes."""
        if self.command == ("pack",) and "out" not in self.values:
            return [str(SHARDS_DIR / name) for name in dataset_names([Path(file) for file in self.values["files"]])]
        return [str(self.values[name]) for name in OUTPUTS if name in self.values]

    @property
    def outputs(self) -> list[str]:
        """The paths that must be unchanged for the step to be done; none for `mm fetch`, which looks at every file."""
        return [] if self.command == ("fetch",) else self.places

    @property
    def inputs(self) -> list[str]:
        """The texts among the values that may name a path which the step reads."""
        values = [value for name, value in self.values.items() if name not in OUTPUTS]
        texts = [str(each) for value in values for each in (value if isinstance(value, list) else [value])]
        texts += [text.rpartition(":")[0] for text in texts]  # a dataset may be named with a weight, without its folder
        texts += [str(SHARDS_DIR / text) for text in texts if text]
        return sorted({*texts} - {"", *self.places})

    @property
    def base(self) -> str:
        """The name of the step in the recipe; that of the training step for what is done after it."""
        return self.name.partition("/")[0]


@dataclass(frozen=True)
class Recipe:
    """A recipe. name: of its file. price_per_hour: what an hour of the machine costs, in any currency; 0 if not given."""

    name: str
    title: str
    steps: tuple[Step, ...]
    questions: tuple[str, ...]
    price_per_hour: float


def find_recipe(name: str) -> Path:
    """Return the path of a recipe: a file, or the name of one that comes with mm. Raise InputError if there is none."""
    known = {path.stem: path for path in sorted(RECIPES.glob("*.toml"))}
    if Path(name).is_file():
        return Path(name)
    if name in known:
        return known[name]
    raise InputError(f"{name}: no such recipe", f"name a TOML file, or one of mm's own: {', '.join(known)}")


def read_recipe(path: Path, group: Any, changes: Iterable[str] = ()) -> Recipe:
    """Read a recipe and check every value of it as the command line would. group: the commands of mm. changes: texts
    TABLE.KEY=VALUE, applied first. Raise InputError for a file that is not TOML, UsageError for what is not known."""
    table = _read_toml(path)
    for change in changes:
        _change(path, table, change)
    top = {key: table.pop(key) for key in TOP if key in table}
    for key, value in top.items():
        if not isinstance(value, TOP[key]):
            raise UsageError(f"{path}: {key} has another type than expected", "see recipes/own-data.toml")
    evaluation = _keyed(table.pop("eval", {}))
    found = [each for key, value in table.items() for each in _tables(path, group, (key,), value)]
    questions = tuple(map(str, top.get("questions", ())))
    steps = tuple(_completed(path, group, found, evaluation, questions))
    for step in steps:
        _check(path, group, step)
    return Recipe(path.stem, top.get("title", path.stem), steps, questions, float(top.get("price_per_hour", 0)))


def _read_toml(path: Path) -> Values:
    from mmdata.io.files import read_bytes

    try:
        return tomllib.loads(read_bytes(path).decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path}: {error}", "it is TOML: [COMMAND] and below it OPTION = VALUE") from error


def read_defaults(path: Path, group: Any) -> Values:
    """Return the defaults of options that mm.toml has, as nested dictionaries: command, parameter, value. Raise InputError
    for a file that is not TOML, UsageError for a command or option that is not known."""
    defaults: Values = {}
    for key, table in _read_toml(path).items():
        for name, names, values in _tables(path, group, (key,), table):
            if name != ".".join(names):
                raise UsageError(f"{path}: [{name}] is a step of a recipe", f"[{'.'.join(names)}] has the defaults")
            command = _command(group, names)
            _words(f"{path}: [{name}]", command, values)
            place = defaults
            for part in names:
                place = place.setdefault(part, {})
            known = _parameters(command)
            place |= {known[key].name: value for key, value in values.items()}
    return defaults


def parsed(text: str) -> Any:
    """Return the value of a text in TOML's notation; the text itself if it is none."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _change(path: Path, table: Values, change: str) -> None:
    """Set the value that a text TABLE.KEY=VALUE names. Raise UsageError if the recipe has no such table."""
    name, equals, text = change.partition("=")
    *tables, key = name.split(".")
    if not equals or not (tables or key in TOP):
        raise UsageError(f"--set {change} is not TABLE.KEY=VALUE", "--set train.dpo.beta=0.2")
    place: Any = table
    for part in tables:
        if not isinstance(place.get(part), dict):
            raise _unknown(f"{path}: --set {change}", part, [k for k, v in place.items() if isinstance(v, dict)])
        place = place[part]
    place[key.replace("-", "_")] = parsed(text)


def _unknown(place: str, name: str, known: Iterable[str]) -> UsageError:
    """Return the error for a name that is not known, with the nearest one."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return UsageError(
        f"{place}: {name!r} is unknown", f"did you mean {near[0]}?" if near else f"use one of {', '.join(known)}"
    )


def _tables(
    path: Path, group: Any, names: tuple[str, ...], table: Any
) -> Iterator[tuple[str, tuple[str, ...], Values]]:
    """Yield the steps of a table as (name, command, values). names: the table's own, such as ("tokenizer", "train")."""
    commands = group.commands
    for name in names[:-1]:
        commands = commands[name].commands
    if names[-1] not in commands:
        raise _unknown(str(path), ".".join(names), [*([] if len(names) > 1 else TOP), *commands])
    if not isinstance(table, dict):
        raise UsageError(f"{path}: {'.'.join(names)} is a command, so a table", f"[{'.'.join(names)}]")
    if hasattr(commands[names[-1]], "commands"):
        for key, value in table.items():
            yield from _tables(path, group, (*names, key), value)
    elif table and all(isinstance(value, dict) for value in table.values()):
        yield from ((".".join((*names, key)), names, _keyed(value)) for key, value in table.items())
    else:
        yield ".".join(names), names, _keyed(table)


def _keyed(table: Values) -> Values:
    """Return a table with underscores in its keys, where it may have dashes as the options do."""
    return {key.replace("-", "_"): value for key, value in table.items()}


def _completed(
    path: Path,
    group: Any,
    found: Iterable[tuple[str, tuple[str, ...], Values]],
    evaluation: Values,
    questions: Sequence[str],
) -> Iterator[Step]:
    """Yield the steps with what a recipe may leave out: the run of a training step is runs/NAME and begins with the
    weights of the training step before it, which is also what is exported. Every training step is followed by its
    evaluation and by the answers to the questions."""

    def step(name: str, names: tuple[str, ...], values: Values, **more: Any) -> Step:
        return Step(name, names, values, (*names, *_words(f"{path}: [{name}]", _command(group, names), values)), **more)

    run = None
    for name, names, values in found:
        label = name.rpartition(".")[2]
        if names == ("fetch",):
            values = {"out": str(DATA_DIR), "yes": True, **values}
        elif names == ("pack",):
            values = {"tokenizer": str(DATA_DIR / "tokenizer"), **values}
            if not isinstance(values.get("files"), list):
                raise UsageError(f"{path}: [{name}] names no files", 'files = ["data/FILE.jsonl"]')
        elif names == ("train",):
            stage = {"stage": label} if label in STAGE_KINDS else {}
            init = {"init": run} if run and not NEW_MODEL & values.keys() else {}
            values = {**stage, "out": str(RUNS_DIR / label), **init, **values}
        elif names == ("export",) and run:
            values = {"run": run, "out": f"exports/{Path(run).name}-{values.get('format', 'hf')}", **values}
        yield step(name, names, values)
        if names == ("train",):
            run = str(values["out"])
            yield step(f"{name}/eval", ("eval",), {"run": run, "json": True, **evaluation}, is_captured=True)
            if questions:
                lines = "\n/reset\n".join(questions) + "\n"
                asked = ("chat", run, *ANSWERS)
                yield Step(f"{name}/answers", ("chat",), {"run": run}, asked, stdin=lines, is_captured=True)


def _command(group: Any, names: tuple[str, ...]) -> Any:
    for name in names:
        group = group.commands[name]
    return group


def _parameters(command: Any) -> Values:
    """Return the parameters of a command by the keys that a recipe has for them."""
    known: Values = {}
    for parameter in command.params:
        names = [parameter.name] if parameter.param_type_name == "argument" else parameter.opts
        known |= {name.lstrip("-").replace("-", "_"): parameter for name in names if name[0] != "-" or name[1] == "-"}
    return known


def _words(place: str, command: Any, values: Values) -> list[str]:
    """Return the values as words of the command line of a command, arguments first. Raise UsageError for a key that is
    no option of it, with the nearest one."""
    known = _parameters(command)
    arguments, options = [], []
    for key, value in values.items():
        if key not in known:
            raise _unknown(place, key, known)
        parameter, items = known[key], value if isinstance(value, list) else [value]
        flag = next(iter(parameter.opts))
        if any(isinstance(item, dict) for item in items):
            raise UsageError(f"{place}: {key} is an option, not a table", f"{key} = VALUE")
        if parameter.param_type_name == "argument":
            arguments += map(str, items)
        elif parameter.is_flag:
            if not isinstance(value, bool):
                raise UsageError(f"{place}: {key} = {value!r} must be true or false", f"{key} = true")
            options += [flag] if value else parameter.secondary_opts[:1]
        else:
            options += [word for item in items for word in (flag, str(item))]
    return [*arguments, *options]


def _check(path: Path, group: Any, step: Step) -> None:
    """Raise UsageError if the command would refuse the values of a step, without executing it."""
    place = f"{path}: [{step.base}]"
    try:
        with checking():
            group.main(list(step.argv), standalone_mode=False)
    except MMError as error:
        raise UsageError(f"{place}: {error.message}", error.fix) from error
    except Exception as error:  # click's, which typer has a copy of
        if not (describe := getattr(error, "format_message", None)):
            raise
        raise UsageError(f"{place}: {describe()}", f"mm {' '.join(step.command)} --help") from error
