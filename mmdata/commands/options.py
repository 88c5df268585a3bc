"""From declared options to the command line: typer parameters, range checks, help in named groups.

A command is a function. `add` registers it with a typer application and replaces these of its parameters:

- `options: ChatOptions`, a dataclass declared with `mmdata.options.option`: one command-line option for each field.
  `values: Annotated[dict[str, Any], TrainOptions]` does the same and passes the fields as a dictionary.
- `count: Annotated[int, Option("How many.", least=1)] = 4`, an `mmdata.options.Option` in the annotation: one option.

Parameters annotated with `typer.Argument` or `typer.Option` are passed on unchanged. Every value is checked against
its declaration before the function is called; what is out of range raises UsageError (exit code 2).
The last paragraph of the docstring, `Example: mm ...`, is printed at the end of the help.
"""

import inspect
import operator
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from functools import partial
from types import NoneType
from typing import Annotated, Any, get_args, get_origin

import typer
from typer.core import TyperCommand

from mmdata.options import Option, bounds, check_value, flag_of, options_of

MAX_WIDTH = 30  # of the column of flags in --help; longer flags stand on a line of their own
MAX_CHOICES_WIDTH = 24  # of choices shown as the name of an option's value: --split train|val|all
Parameter = inspect.Parameter
Converter = Callable[[dict[str, Any]], Any]  # from the values by parameter name


class GroupedCommand(TyperCommand):
    """A command whose help lists its options under the headings of their groups."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write one section for the arguments and one for each group; options without a group stand in the last."""
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


def add(app: typer.Typer, function: Callable[..., None], name: str | None = None) -> None:
    """Register a command under `name`, or under the function's name less a final underscore."""
    text, _, example = (inspect.getdoc(function) or "").partition("\n\nExample: ")
    app.command(name or function.__name__.rstrip("_"), cls=GroupedCommand, help=text, epilog=f"Example: {example}")(
        command_line(function)
    )


def command_line(function: Callable[..., None]) -> Callable[..., None]:
    """A function that typer can read, which checks the values, builds the options objects and calls `function`."""
    parameters: list[Parameter] = []
    converters: dict[str, Converter] = {}
    for parameter in inspect.signature(function).parameters.values():
        expanded, converters[parameter.name] = _converted(parameter)
        parameters += [one.replace(kind=Parameter.KEYWORD_ONLY) for one in expanded]

    def run(**values: Any) -> None:
        function(**{name: convert(values) for name, convert in converters.items()})

    run.__name__, run.__doc__ = function.__name__, function.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _converted(parameter: Parameter) -> tuple[list[Parameter], Converter]:
    """The typer parameters that stand for one of a command's, and the function that makes its value of theirs."""
    annotation = parameter.annotation
    for item in (annotation, *get_args(annotation)[1:]):
        if isinstance(item, Option):
            single = _typer_parameter(parameter.name, get_args(annotation)[0], parameter.default, item)
            return [single], partial(_checked, parameter.name, item)
        if isinstance(item, type) and is_dataclass(item):
            parameters, fields_of = _expanded(item)
            return parameters, partial(_instance, item, fields_of) if item is annotation else fields_of
    return [parameter], operator.itemgetter(parameter.name)


def _checked(name: str, declaration: Option, values: dict[str, Any]) -> Any:
    """One of the values; UsageError when it is outside its declaration."""
    check_value(flag_of(name, declaration), values[name], declaration)
    return values[name]


def _instance(kind: type, fields_of: Converter, values: dict[str, Any]) -> Any:
    return kind(**fields_of(values))


def _expanded(kind: type) -> tuple[list[Parameter], Converter]:
    """A parameter for each declared field of an options class, and the function that gives the checked fields."""
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

    def fields_of(values: dict[str, Any]) -> dict[str, Any]:
        checked = {name: _checked(name, declaration, values) for name, declaration in options_of(kind)}
        return {name: conversions[name](value) if name in conversions else value for name, value in checked.items()}

    return parameters, fields_of


def _typer_parameter(name: str, annotation: Any, default: Any, declaration: Option) -> Parameter:
    """One option for typer: its flags, its help text with default and range, and its group."""
    flag = flag_of(name, declaration)
    if default is None and NoneType not in get_args(annotation):
        annotation = annotation | None
    if annotation == bool | None and "/" not in flag:
        flag = f"{flag}/--no-{flag.removeprefix('--')}"
    choices = "|".join(declaration.choices)
    info = typer.Option(
        flag,
        metavar=declaration.metavar or (choices if 0 < len(choices) <= MAX_CHOICES_WIDTH else None),
        help=_help(annotation, default, declaration),
        show_default=False,
        rich_help_panel=declaration.group or None,
    )
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, info])


def _help(annotation: Any, default: Any, declaration: Option) -> str:
    """The help text, followed by the default and the range in brackets."""
    shown = declaration.default_text
    by_stage = {
        stage: _plain(value) for stage, value in (declaration.by_stage or {}).items() if value not in (None, "")
    }
    if not shown and by_stage:
        is_same = len(set(by_stage.values())) == 1
        shown = next(iter(by_stage.values())) if is_same else ", ".join(f"{k} {value}" for k, value in by_stage.items())
    if not shown and default not in (None, Parameter.empty) and annotation is not bool:
        shown = _plain(default)
    notes = [f"default: {shown}"] if shown else []
    notes += [f"{words} {bound:.12g}" for words, bound, _ in bounds(declaration)]
    return f"{declaration.help} [{'; '.join(notes)}]" if notes else declaration.help


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
