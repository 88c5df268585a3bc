"""Writes docs/reference.md from the declarations of the commands and their options, and docs/zh/reference.md from that
and the phrases of docs/zh/reference.json: `python docs/reference.py`."""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from importlib import import_module
from inspect import signature
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

import typer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cli  # noqa: E402
from mmdata.commands.options import OUTPUT_OPTIONS, LazyCommand, default_text, range_texts  # noqa: E402
from mmdata.options import Option, options_of  # noqa: E402

HEAD = """# Commands and options

[中文](zh/reference.md)

Every command of mm with its arguments and options, as `mm COMMAND --help` prints them. This page is written by
`python docs/reference.py` from the program's declarations; do not edit it.

Every command also takes `--help` (`-h`), {output}.

`mm --version` prints the version, `mm --install-completion` completes commands in the shell. Defaults can be changed for
a project in [mm.toml](recipes.md#defaults-of-a-project-and-the-machine).
"""
TYPES = {int: "integer", float: "number", str: "text", Path: "path"}
Declared = tuple[Any, Any, Option]  # type, default and declaration of an option


def declared_by(function: Any) -> Iterator[tuple[str, Declared]]:
    """Yield name and declaration of every option that a command's function declares, singly or in a dataclass."""
    for parameter in signature(function).parameters.values():
        for item in (parameter.annotation, *get_args(parameter.annotation)[1:]):
            if isinstance(item, Option):
                yield parameter.name, (get_args(parameter.annotation)[0], parameter.default, item)
            elif isinstance(item, type) and is_dataclass(item):
                of = {field.name: field for field in fields(item)}
                yield from ((name, (of[name].type, of[name].default, option)) for name, option in options_of(item))


def value_of(annotation: Any, option: Option) -> str:
    """What the value of an option is: its choices, or its type with the bounds; "" for a flag."""
    if option.choices:
        return ", ".join(f"`{choice}`" for choice in option.choices)
    kinds = [kind for kind in (get_args(annotation) or (annotation,)) if kind not in (NoneType, ...)]
    name = TYPES.get(kinds[0], "") if kinds else ""
    return ", ".join([name, *range_texts(option)]) if name else ""


def row_of(parameter: Any, declared: Declared | None) -> str:
    """The row of the table for an option of a command. declared: None if it is declared to typer only."""
    flags = [*parameter.opts[:1], *parameter.secondary_opts, *parameter.opts[1:]]
    annotation, default, option = declared or (bool, None, Option(parameter.help or ""))
    metavar = option.metavar if annotation is not bool and option.metavar else ""
    name = ", ".join(f"`{flag}{' ' + metavar if metavar and flag.startswith('--') else ''}`" for flag in flags)
    text = option.help + (f" Environment: `{option.envvar}`." if option.envvar else "")
    text += " May be repeated." if get_origin(annotation) is tuple and "repeated" not in text else ""
    cells = [name, value_of(annotation, option), default_text(annotation, default, option), text]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"


def section(command: LazyCommand, name: str) -> Iterator[str]:
    """The lines about one command: what it does, an example, arguments, and a table of options for each group."""
    module = import_module(command.module)
    short = str(command.name)
    declared = dict(declared_by(getattr(module, short, None) or getattr(module, f"{short}_")))
    loaded = command.loaded
    arguments = [each for each in loaded.params if each.param_type_name == "argument"]
    usage = " ".join([f"mm {name}", *(str(each.metavar) for each in arguments), "[OPTIONS]"])
    yield f"\n## mm {name}\n\n{loaded.help}\n\n    {usage}\n"
    if example := (loaded.epilog or "").removeprefix("Example: ").strip():
        yield "```sh\n" + re.sub(r"\s{4,}", "\n", example) + "\n```\n"
    yield from (f"- `{each.metavar}`: {each.help}" for each in arguments)
    groups: dict[str, list[str]] = {}
    for parameter in loaded.params:
        if parameter in arguments:
            continue
        if parameter.name not in ("help", *OUTPUT_OPTIONS) or parameter.name in declared:
            group = parameter.rich_help_panel or "Options"
            groups.setdefault(group, []).append(row_of(parameter, declared.get(parameter.name)))
    for group, rows in sorted(groups.items(), key=lambda item: item[0] == "Options"):
        yield f"\n**{group}**\n\n| option | value | default | what it does |\n|---|---|---|---|"
        yield from rows


def text() -> str:
    """The whole page."""
    app: Any = typer.main.get_command(cli.app)
    commands = [
        (f"{name} {short}" if short else name, each)
        for name, command in app.commands.items()
        for short, each in (command.commands.items() if hasattr(command, "commands") else [("", command)])
    ]
    output = " and ".join(
        f"`--{name}` (`-{name[0]}`: {option.help[0].lower()}{option.help[1:-1]})"
        for name, option in OUTPUT_OPTIONS.items()
    )
    index = ", ".join(f"[{name}](#mm-{name.replace(' ', '-')})" for name, _ in commands)
    lines = [HEAD.format(output=output), index, *(line for name, each in commands for line in section(each, name))]
    return "\n".join(lines) + "\n"


class Phrases(dict[str, str]):
    """English phrases and their Chinese."""

    def __missing__(self, english: str) -> str:
        raise LookupError(f"docs/zh/reference.json has no Chinese for: {english}")


def chinese(english: str, phrases: Phrases) -> str:
    """The page in Chinese: code, names and numbers stay as they are. Raises LookupError for a missing phrase."""

    def cell(words: str) -> str:
        if words in phrases or not re.search("[a-zA-Z]", words) or re.fullmatch(r"\S+|(`[^`]*`(, )?)+", words):
            return phrases.get(words, words)
        bounds = [re.fullmatch(r"(at least|at most|greater than|below) ([\d.]+)", part) for part in words.split(", ")]
        if not any(bounds):
            return phrases[words]
        parts = zip(words.split(", "), bounds, strict=True)
        return "，".join(f"{phrases[bound[1]]} {bound[2]}" if bound else phrases[part] for part, bound in parts)

    blocks = []
    for block in english.rstrip().split("\n\n"):
        if block.startswith("| "):
            rows = [[each.strip() for each in re.split(r"(?<!\\)\|", row)[1:-1]] for row in block.splitlines()]
            lines = [f"| {name} | " + " | ".join(cell(each) for each in cells) + " |" for name, *cells in rows[2:]]
            block = "\n".join(["| 选项 | 取值 | 默认 | 作用 |", "|---|---|---|---|", *lines])
        elif block.startswith("- "):
            items = [re.split(r"(?<=`): ", item, maxsplit=1) for item in block.split("\n")]
            block = "\n".join(f"{name}：{phrases[words]}" for name, words in items)
        elif not block.startswith(("## ", "    ", "```", "[fetch]")):
            words = " ".join(block.split())
            block = f"**{phrases[words[2:-2]]}**" if words.startswith("**") else phrases[words]
        blocks.append(block)
    return "\n\n".join(blocks) + "\n"


def pages() -> Iterator[tuple[Path, str]]:
    """Path and text of the page in English, then in Chinese."""
    english, docs = text(), ROOT / "docs"
    yield docs / "reference.md", english
    phrases = json.loads((docs / "zh" / "reference.json").read_text(encoding="utf-8"))
    yield docs / "zh" / "reference.md", chinese(english, Phrases(phrases))


if __name__ == "__main__":
    for path, content in pages():
        path.write_text(content, encoding="utf-8")
