"""Builds the command line from declared options: typer parameters, range checks, and help in named groups.

A command is a function. `add` registers it with a typer application and turns these of its parameters into command-line
options:

- `options: ChatOptions`, a dataclass declared with `mmdata.options.option`: one command-line option for each field.
  `values: Annotated[dict[str, Any], TrainOptions]` does the same and passes the fields as a dictionary.
- `count: Annotated[int, Option("How many.", least=1)] = 4`, an `mmdata.options.Option` in the annotation: one option.

Parameters annotated with `typer.Argument` or `typer.Option` are passed on unchanged. Before the function is called,
every declared value is checked; one outside its range or choices raises UsageError (exit code 2). The docstring of the
function is its help text; a last paragraph `Example: mm ...` is printed at the end of the help.
"""

import difflib
import inspect
import operator
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cached_property, partial
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_origin

import typer
from typer.core import TyperCommand

from mmdata.commands import terminal
from mmdata.errors import DatasetError, InputError, TokenizerError, UsageError
from mmdata.io.options import DEFAULT_READING, ReadOptions
from mmdata.options import Option, bounds, check_value, flag_of, options_of

SETTINGS: dict[str, Any] = {
    "add_completion": False,
    "pretty_exceptions_enable": False,
    "rich_markup_mode": None,  # importing rich would take as long as everything else together
    "context_settings": {"help_option_names": ["--help", "-h"]},
}
MAX_WIDTH = 30  # characters in the column of flags in --help; a longer flag gets a line of its own
LARGE_BOUND = 2**31 - 1  # bounds of this size or more are checked, but not shown in --help
MAX_CHOICES_WIDTH = 24  # characters; shorter choices are shown as the name of an option's value: --split train|val|all
OUTPUT_OPTIONS = {  # of every command; `quiet` unless the command has an option of its own of that name
    "quiet": Option("Print results and errors only."),
    "verbose": Option("Print also the time and memory taken, and where in the code an error was raised."),
}
Parameter = inspect.Parameter
Values = dict[str, Any]  # the values of all typer parameters, by name
Converter = Callable[[Values], Any]


class GroupedCommand(TyperCommand):
    """A command whose --help lists its options in sections, one for each group (`Option.group`). other_flags: options
    of other programs, with what the user should give instead."""

    other_flags: Mapping[str, str] = {}

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments. Raise UsageError for one of `other_flags`."""
        for flag in (word.split("=")[0] for word in args):
            if flag in self.other_flags:
                raise UsageError(f"mm {ctx.info_name} has no option {flag}", self.other_flags[flag])
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write a section for the arguments and each group in order; options without a group come last."""
        sections: dict[str, list[tuple[str, str]]] = {}
        ungrouped = []
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is None:
                continue
            heading = getattr(parameter, "rich_help_panel", None)
            if parameter.param_type_name == "argument":
                sections.setdefault("Arguments", []).append(record)
            elif heading:
                sections.setdefault(heading, []).append(record)
            else:
                ungrouped.append(record)
        sections["Options"] = ungrouped
        width = max(min(len(flags), MAX_WIDTH) for records in sections.values() for flags, _ in records)
        for heading, records in sections.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl([(flags.ljust(width), text) for flags, text in records])


class LazyCommand(TyperCommand):
    """A command whose module is imported when it is called or its own --help is shown. Before that only its name and
    its summary are known, which is what `mm --help` lists."""

    module = ""  # set by `add_lazily`

    @cached_property
    def loaded(self) -> Any:
        """The complete command, from the function of the module with the command's name (or `name_`, as in `import_`).
        The first access imports the module."""
        module = import_module(self.module)
        app = typer.Typer(**SETTINGS)
        function = getattr(module, str(self.name), None) or getattr(module, f"{self.name}_")
        add(app, function, getattr(module, "HEADINGS", ()), getattr(module, "OTHER_FLAGS", None))
        return typer.main.get_command(app)

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Return the context of the loaded command, so that click runs that command and prints its help."""
        return self.loaded.make_context(*args, **kwargs)

    @property
    def params(self) -> list[Any]:
        """The parameters of the loaded command. Reading them imports its module."""
        return self.loaded.params

    @params.setter
    def params(self, params: list[Any]) -> None:
        """Ignore the parameters that the base class sets: the command is created without any."""


def add_lazily(app: typer.Typer, module: str, name: str, summary: str) -> None:
    """Register the function `name` (or `name_`) of a module as a command of `app`, without importing the module.
    summary: its line in `mm --help`. The module may define HEADINGS, the order of its option groups, and OTHER_FLAGS,
    refused flags."""
    command = type("ModuleCommand", (LazyCommand,), {"module": module})
    app.command(name, cls=command, help=summary)(lambda: None)


def add(
    app: typer.Typer,
    function: Callable[..., None],
    headings: Sequence[str] = (),
    other_flags: Mapping[str, str] | None = None,
) -> None:
    """Register a function as a command of `app`, under its name without a final underscore. Its docstring is the help
    text; a paragraph that begins with `Example: ` is printed at the end. headings: order of the option groups in the
    help; by default that of the parameters. other_flags: see `GroupedCommand`."""
    kind = type("OneCommand", (GroupedCommand,), {"other_flags": other_flags or {}})
    text, _, example = (inspect.getdoc(function) or "").partition("\n\nExample: ")
    name = function.__name__.rstrip("_")
    app.command(name, cls=kind, help=text, epilog=f"Example: {example}")(command_line(function, headings))


def command_line(function: Callable[..., None], headings: Sequence[str] = ()) -> Callable[..., None]:
    """Return a function with a signature that typer can read, which checks the values (UsageError), collects those of
    an options dataclass in an instance or dictionary, and calls `function`. headings: order of the option groups in the
    help."""
    parameters: list[Parameter] = []
    converters: dict[str, Converter] = {}
    for parameter in inspect.signature(function).parameters.values():
        expanded, converters[parameter.name] = _converted(parameter)
        parameters += [one.replace(kind=Parameter.KEYWORD_ONLY) for one in expanded]

    own = {parameter.name for parameter in parameters}
    parameters += [
        _typer_parameter(name, bool, False, option) for name, option in OUTPUT_OPTIONS.items() if name not in own
    ]
    if headings:
        parameters.sort(key=lambda parameter: _rank(parameter, headings))

    def run(**values: Any) -> None:
        is_quiet, is_silent = values["quiet"] and "quiet" not in own, values["quiet"] or bool(values.get("as_json"))
        with terminal.output(quiet=is_quiet, verbose=values["verbose"], is_silent=is_silent):
            arguments = {name: convert(values) for name, convert in converters.items()}
            if not terminal.OUTPUT.is_checking:
                function(**arguments)

    run.__name__, run.__doc__ = function.__name__, function.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _rank(parameter: Parameter, headings: Sequence[str]) -> int:
    """Return the sort key of a typer parameter: arguments, then options by their group's index in `headings`, then
    options without a group. Raise ValueError if a group is not in `headings`."""
    info = get_args(parameter.annotation)[1]
    if isinstance(info, type(typer.Argument())):
        return -1
    return headings.index(info.rich_help_panel) if info.rich_help_panel else len(headings)


def _converted(parameter: Parameter) -> tuple[list[Parameter], Converter]:
    """Return the typer parameters that replace one parameter of a command: one for an `Option` in the annotation, one
    per declared field for an options dataclass, else the parameter itself. Also return a function that computes its
    value from the values of all typer parameters by name, and raises UsageError for a value outside its declaration."""
    annotation = parameter.annotation
    for item in (annotation, *get_args(annotation)[1:]):
        if isinstance(item, Option):
            single = _typer_parameter(parameter.name, get_args(annotation)[0], parameter.default, item)
            return [single], partial(_checked, parameter.name, item)
        if isinstance(item, type) and is_dataclass(item):
            parameters, fields_of = _expanded(item)
            return parameters, partial(_instance, item, fields_of) if item is annotation else fields_of
    return [parameter], operator.itemgetter(parameter.name)


def _checked(name: str, declaration: Option, values: Values) -> Any:
    """Return the value called `name`. Raise UsageError if it is outside its declared range or choices."""
    check_value(flag_of(name, declaration), values[name], declaration)
    return values[name]


def _instance(kind: type, fields_of: Converter, values: Values) -> Any:
    return kind(**fields_of(values))


def _expanded(kind: type) -> tuple[list[Parameter], Converter]:
    """Return a typer parameter for each declared field of the options class `kind`, and a function that makes a
    dictionary of the fields from all typer values: checked (UsageError), lists as tuples, flags like --no-compile
    inverted."""
    types = {field.name: (field.type, field.default) for field in fields(kind)}
    parameters = []
    conversions: dict[str, Callable[[Any], Any]] = {}
    for name, declaration in options_of(kind):
        annotation, default = types[name]
        if default is True and declaration.flag.startswith("--no-"):  # compile: bool = True is the flag --no-compile
            default, conversions[name] = False, operator.not_
        if get_origin(annotation) is tuple:
            annotation, default = list[get_args(annotation)[0]], None
            conversions[name] = lambda items: tuple(items or ())
        default = Parameter.empty if default is MISSING else default
        parameters.append(_typer_parameter(name, annotation, default, declaration))

    def fields_of(values: Values) -> Values:
        checked = {name: _checked(name, declaration, values) for name, declaration in options_of(kind)}
        return {name: conversions[name](value) if name in conversions else value for name, value in checked.items()}

    return parameters, fields_of


def _typer_parameter(name: str, annotation: Any, default: Any, declaration: Option) -> Parameter:
    """Return the parameter that declares one option to typer. An option of type `bool | None` gets the two flags --NAME
    and --no-NAME, unless its declaration names both. annotation: type of the value."""
    flag = flag_of(name, declaration)
    if default is None and NoneType not in get_args(annotation):
        annotation = annotation | None
    if annotation == bool | None and "/" not in flag:
        flag = f"{flag}/--no-{flag.removeprefix('--')}"
    short = [f"-{name[0]}"] if name in OUTPUT_OPTIONS else []
    info = typer.Option(
        flag,
        *short,
        autocompletion=(lambda: list(declaration.choices)) if declaration.choices else None,
        envvar=declaration.envvar,
        metavar=declaration.metavar or _choices(declaration) or ("NAME" if declaration.choices else None),
        help=_help(annotation, default, declaration),
        show_default=False,
        rich_help_panel=declaration.group or None,
    )
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, info])


def _help(annotation: Any, default: Any, declaration: Option) -> str:
    """Return the help text of an option, followed in brackets by its choices (unless the name of the value shows them),
    default and range. Bounds from LARGE_BOUND on are left out."""
    shown = default_text(annotation, default, declaration)
    is_listed = not declaration.choices or _choices(declaration) or declaration.metavar
    notes = [] if is_listed else [f"one of {', '.join(declaration.choices)}"]
    notes += [f"default: {shown}"] if shown else []
    notes += range_texts(declaration)
    return f"{declaration.help} [{'; '.join(notes)}]" if notes else declaration.help


def default_text(annotation: Any, default: Any, declaration: Option) -> str:
    """Return an option's default in words: the declaration's `default_text`, else its defaults by stage, else `default`
    unless the option is a flag; empty if there is none. annotation: type of the value."""
    by_stage = {
        stage: _plain(value) for stage, value in (declaration.by_stage or {}).items() if value not in (None, "")
    }
    if declaration.default_text:
        return declaration.default_text
    if by_stage:
        is_same = len(set(by_stage.values())) == 1
        return next(iter(by_stage.values())) if is_same else ", ".join(f"{k} {value}" for k, value in by_stage.items())
    return "" if default in (None, (), Parameter.empty) or annotation is bool else _plain(default)


def range_texts(declaration: Option) -> list[str]:
    """Return the bounds of an option in words, such as "at least 1"; those from LARGE_BOUND on are left out."""
    return [f"{words} {bound:.12g}" for words, bound, _ in bounds(declaration) if abs(bound) < LARGE_BOUND]


def _choices(declaration: Option) -> str:
    """Return the choices as the name of an option's value, train|val|all; empty if there are none or they are too long."""
    choices = "|".join(declaration.choices)
    return choices if len(choices) <= MAX_CHOICES_WIDTH else ""


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


# --- parameters that several commands share

STEM = re.compile(
    r"(.+?)(?:\.(?:jsonl?|ndjson|parquet|arrow|feather|[ct]sv|tab|txt|text|md|gz|zst|xz|bz2|zip)(?:\..*)?)?"
)  # file name without the suffixes of format and compression
# Where commands look by default. The environment is read once, at import: a process has one project.
HOME = Path(os.environ["MM_HOME"]).absolute() if os.environ.get("MM_HOME") else Path()
DATA_DIR, SHARDS_DIR, RUNS_DIR = HOME / "data", HOME / "shards", HOME / "runs"

FILES_HELP = (
    "jsonl, JSON arrays, parquet, Arrow or csv, also compressed; - reads standard input. [default: data/*.jsonl]"
)
REPORT = "Report"  # heading in --help
Json = Annotated[bool, Option("Print the figures as JSON, for programs.", flag="--json")]
TokenizerDir = Annotated[
    Path | None, Option("Tokenizer directory.", flag="--tokenizer", metavar="DIR", default_text="data/tokenizer")
]
Workers = Annotated[int | None, Option("Number of processes.", "Processes", least=1, default_text="one per core")]
Html = Annotated[Path | None, Option("Write the report as one self-contained HTML file.", REPORT, metavar="FILE")]
Lang = Annotated[str, Option("Language of the HTML report.", REPORT, choices=("en", "zh"))]


def data_files(files: list[Path] | None, *, is_read_once: bool = True) -> list[Path]:
    """Return the input files: `files`, or else data/*.jsonl in alphabetical order. Raise InputError if there are none
    or one does not exist, and UsageError for `-`, standard input, unless the command reads every file once
    (`is_read_once`)."""
    paths = files or sorted(DATA_DIR.glob("*.jsonl"))
    if not paths:
        raise InputError(f"no FILE given and no {DATA_DIR}/*.jsonl here", "`mm fetch` brings data, or name your files")
    for path in paths:
        if str(path) == "-":
            if not is_read_once:
                raise UsageError("standard input can be read only once", "write it to a file first")
        elif not path.is_file():
            if not isinstance(path, Path):
                raise InputError(f"{path}: no such file", f"see what is at {path.parent}")
            if re.match("[a-z][a-z0-9]+:/[^/]", str(path)):  # a URL as a Path
                raise UsageError(f"{path}: URLs are read by mm pack and mm validate", "copy it to this machine first")
            there = [file.name for file in path.parent.glob("*.jsonl*")]
            near = ", ".join(
                str(path.with_name(name)) for name in difflib.get_close_matches(path.name, there, cutoff=0.7)
            )
            raise InputError(f"{path}: no such file", f"there is {near}" if near else f"see `ls {path.parent}`")
    return paths


def dataset_dir(path: Path) -> Path:
    """Return the directory of a packed dataset that the user named: `path`, or shards/`path` if only that is there.
    Raise DatasetError, with the command that helps, if neither is a directory; a jsonl file is one to pack first."""
    match = STEM.fullmatch(path.name)
    packed = SHARDS_DIR / (match[1] if match else path.name)
    for directory in (path, SHARDS_DIR / path):
        if is_dataset(directory):
            return directory
    if path.is_file():
        fix = f"--data {packed}" if packed.is_dir() else f"mm pack {path}    then    --data {packed}"
        raise DatasetError(f"{path} is a file of rows; a packed dataset is needed", fix)
    there = sorted(str(manifest.parent) for manifest in SHARDS_DIR.glob("*/manifest.json"))
    raise DatasetError(f"{path}: no such dataset", f"there is {', '.join(there)}" if there else "mm pack")


def is_dataset(path: Path) -> bool:
    """Return whether a path is a dataset and not a file of rows: a directory, or one that is not published yet, which is
    refused with what helps when it is opened."""
    from mmdata.shards.manifest import is_unfinished

    return path.is_dir() or is_unfinished(path)


def pack_command(
    files: Sequence[Path] = (), read: ReadOptions = DEFAULT_READING, tokenizer: Path | None = None, more: str = ""
) -> str:
    """Return the command that packs these files (none: data/*.jsonl), read the same way, with this tokenizer (None:
    data/tokenizer, after the command that fetches it if it is not there). more: further options."""
    is_default = tokenizer in (None, DATA_DIR / "tokenizer")
    fetch = "" if optional_tokenizer(tokenizer) else "mm fetch --tokenizer minimind-3    then    "
    named = [] if is_default else ["--tokenizer", str(tokenizer)]
    return f"{fetch}mm pack {shlex.join([*map(str, files), *read.flags, *named])}".rstrip() + more


def optional_tokenizer(path: Path | None) -> Path | None:
    """Return the tokenizer directory: `path`, which is not checked, or else data/tokenizer; None if it is not there."""
    return path or (DATA_DIR / "tokenizer" if (DATA_DIR / "tokenizer").is_dir() else None)


def tokenizer_dir(path: Path | None) -> Path:
    """Return the tokenizer directory as `optional_tokenizer` does. Raise TokenizerError if there is none."""
    if directory := optional_tokenizer(path):
        return directory
    raise TokenizerError(
        f"no tokenizer given and no {DATA_DIR}/tokenizer here",
        "`mm fetch --tokenizer minimind-3` brings one, `mm tokenizer train` makes one; or name a directory: --tokenizer DIR",
    )


# --- the arguments of the command line

LOCAL_ONLY = ("stats", "verify", "select", "show")  # commands that take paths and no URLs


def check_arguments(arguments: Sequence[str]) -> None:
    """Raise UsageError for an argument that is not valid UTF-8, which Python decodes to lone surrogates, unless it is the
    path of a file that exists, and for a URL in place of a file that a command would take for a path."""
    if arguments and arguments[0] in LOCAL_ONLY:
        for before, argument in pairwise(arguments):
            if re.match("[a-z][a-z0-9]+://", argument) and not before.startswith("--"):
                fix = "copy it to this machine first; mm pack and mm validate read URLs"
                raise UsageError(f"mm {arguments[0]} reads files on this machine, not {argument}", fix)
    for number, argument in enumerate(arguments, 1):
        value = argument.partition("=")[2] if argument.startswith("--") else argument
        if any("\ud800" <= c <= "\udfff" for c in argument) and not os.path.exists(value):
            shown = argument.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
            raise UsageError(
                f"argument {number} is not valid UTF-8: {shown}", "check the terminal's encoding (`locale`)"
            )
