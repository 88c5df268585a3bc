"""The schemas of rows as tables: which columns hold a field, and which fields make a document, conversation or pair.

A row's columns are first assigned to fields (`Columns.of_row`); the first schema whose required fields are all there tells what
the row is. A column that is null is absent.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from mmdata.encode.rows.load import json_type
from mmdata.encode.rows.reasons import BadRow
from mmdata.errors import UsageError
from mmdata.io.records import JsonObject

# field -> the columns that hold it; if a row has several of them, the first one is taken
ROW_FIELDS = {
    "messages": ("conversations", "messages", "conversation", "dialogue"),
    "prompt": ("prompt", "instruction", "question", "query", "problem"),
    "input": ("input", "context"),
    "completion": ("completion", "output", "response", "answer", "target", "solution"),
    "chosen": ("chosen", "chosen_response", "preferred_output"),
    "rejected": ("rejected", "rejected_response", "non_preferred_output"),
    "system": ("system", "system_prompt"),
    "history": ("history",),
    "tools": ("tools", "functions"),
    "text": ("text",),
}
_ROW_COLUMNS = {column for columns in ROW_FIELDS.values() for column in columns}
MESSAGE_FIELDS = {  # the same for the keys of a message
    "role": ("role", "from"),
    "content": ("content", "value"),
    "reasoning_content": ("reasoning_content", "reasoning", "thinking"),
    "tool_calls": ("tool_calls", "function_call"),
    "tool_call_id": ("tool_call_id",),
    "name": ("name",),
    "weight": ("weight",),
    "train": ("train",),
    "loss": ("loss",),
    "masked": ("masked",),
    "tools": ("tools", "functions"),
}
TURN_FIELDS = {  # the same for the keys of an object that holds a question and its answer, in a list of messages
    "prompt": ("user", "human", "input", *ROW_FIELDS["prompt"]),
    "completion": ("assistant", "gpt", "bot", *ROW_FIELDS["completion"]),
}


class Schema(NamedTuple):
    """A form of rows: their kind, and the fields that they must have."""

    name: str
    kind: str
    required: tuple[str, ...]


class Assignment(NamedTuple):
    """What the columns of a row are. found: field -> its column. others: the columns that hold no field."""

    found: dict[str, str]
    others: list[str]
    schema: Schema


SCHEMAS = (  # a row is of the first one that fits
    Schema("chosen and rejected", "pair", ("chosen", "rejected")),
    Schema("messages", "conversation", ("messages",)),
    Schema("prompt and completion", "conversation", ("prompt", "completion")),
    Schema("text", "document", ("text",)),
)
MOST_KNOWN = 1000  # different lists of keys whose assignment is stored
MEDIA = frozenset(("image", "images", "audio", "audios", "video", "videos"))
_METADATA = re.compile(  # names of keys that describe a row and are no part of it
    r"(\w+[_-])?(id|ids|idx|index|uid|uuid|guid|hash|sha\d*|source|sources|origin|url|link|path|file|filename|title|dataset|datasets|"
    r"subset|split|license|lang|language|locale|date|time|timestamp|created|created_at|updated_at|author|model|models|"
    r"generator|category|categories|topic|topics|domain|subject|tag|tags|type|kind|task|difficulty|level|score|scores|"
    r"rating|ratings|rank|quality|reward|length|len|size|tokens|token_count|count|turns|turn|round|version|meta|metadata|"
    r"extra|info|margin)|(score|rating|num|n|len|meta|is|has)_\w+|__\w+__"
)


def is_metadata(key: str) -> bool:
    """Return whether a key is known to describe a row, such as `id`, `source`, `prompt_id` and `score_chosen`."""
    return bool(_METADATA.fullmatch(key.lower()))


def split_keys(counts: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """Divide counted keys into those that no schema knows and metadata, each with the most frequent first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    unknown = {key: count for key, count in ordered if not is_metadata(key)}
    return unknown, {key: count for key, count in ordered if is_metadata(key)}


@dataclass(frozen=True)
class Columns:
    """Which columns of rows, and keys of messages, hold which field. mapping: field -> the only column that holds it.
    Other fields are read from the columns of the tables."""

    mapping: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, items: Iterable[str]) -> "Columns":
        """Return the columns that `--map FIELD=COLUMN` options name. Raises UsageError for anything else."""
        mapping: dict[str, str] = {}
        names = dict.fromkeys((*ROW_FIELDS, *MESSAGE_FIELDS))
        for item in items:
            name, _, column = item.partition("=")
            if name not in names or not column or name in mapping:
                problem = "is given twice" if name in mapping else "is not FIELD=COLUMN"
                raise UsageError(f"--map {item} {problem}", f"FIELD is one of {', '.join(names)}")
            mapping[name] = column
        return cls(mapping) if mapping else DEFAULT_COLUMNS

    def of_row(self, values: JsonObject, kind: str | None) -> "Assignment":
        """Return the fields of a row's columns that are not null, and its schema. An `input` without a prompt is the
        prompt; a string that is the only one, apart from metadata, is the text, unless there are lists of objects. Raises BadRow if no schema fits, or
        none of the given kind."""
        key = (kind, *values)
        if (known := self._rows.get(key)) and None not in values.values():
            return known
        found, others = self._assigned(values, self._row_table)
        if "input" in found and "prompt" not in found:
            found["prompt"] = found.pop("input")
        is_known = bool(found)
        may_guess = not found and "text" not in self.mapping
        if may_guess and not any(_holds_rows(key, value) for key, value in values.items()):
            texts = [column for column in others if type(values[column]) is str and not is_metadata(column)]
            if len(texts) == 1:
                found["text"] = texts[0]
                others.remove(texts[0])
        assignment = Assignment(found, others, self._schema(found, others, kind))
        if is_known and len(found) + len(others) == len(values) and len(self._rows) < MOST_KNOWN:
            self._rows[key] = assignment
        return assignment

    def of_message(self, values: JsonObject) -> tuple[dict[str, str], list[str]]:
        """Return field -> key for the keys of a message that are not null, and all other such keys."""
        key = (*values,)
        if (known := self._messages.get(key)) and None not in values.values():
            return known
        assigned = self._assigned(values, self._message_table)
        if len(assigned[0]) + len(assigned[1]) == len(values) and len(self._messages) < MOST_KNOWN:
            self._messages[key] = assigned
        return assigned

    def of_turn(self, values: JsonObject) -> tuple[dict[str, str], list[str]]:
        """Return field -> key for an object that holds a question and its answer, and all other keys."""
        return _assigned(values, _TURN_TABLE)

    @property
    def unused(self) -> list[str]:
        """The entries of the mapping, as FIELD=COLUMN, whose column no row or message has had so far."""
        return [f"{name}={column}" for name, column in self.mapping.items() if name not in self._seen]

    def known(self, column: str) -> bool:
        """Return whether a field of rows is read from a column of this name."""
        return column in self._row_table

    def _schema(self, found: Mapping[str, str], others: Iterable[str], kind: str | None) -> Schema:
        """Return the schema of a row with these fields. Raises BadRow if there is none, or none of the given kind."""
        fitting = [schema for schema in self._schemas if all(name in found for name in schema.required)]
        for schema in fitting:
            may_be = ("document", "conversation") if schema.kind == "document" else (schema.kind,)  # a transcript
            if kind is None or kind in may_be:
                return schema
        if fitting:
            raise BadRow("another kind", f"found a {fitting[0].kind}, expected a {kind}")
        if "prompt" in found and not found.keys() - {"prompt", "input", "history", "system", "tools"}:
            unread = f"; no field is read from {_listed(others)}" if others else ""
            raise BadRow("prompt only", f"found {_listed(found.values())} without an answer{unread}")
        part = next((schema for schema in SCHEMAS if found.keys() & set(schema.required)), None)
        if not part:
            raise BadRow("unknown fields", f"found {_listed((*found.values(), *others))}")
        lacks = [name for name in part.required if name not in found]
        raise BadRow("missing field", f"found {_listed(found.values())} without {_listed(lacks)}")

    def nearest(self, values: JsonObject) -> tuple[Schema, list[str]]:
        """Return the schema of which a row has the largest share, and the required fields that it lacks. Without any,
        it is the schema that fits the types of its values."""
        found, others = _assigned(values, self._row_table)
        lacks = {schema: [name for name in schema.required if name not in found] for schema in self._schemas}
        nearest = min(lacks, key=lambda schema: len(lacks[schema]) / len(schema.required))
        if len(lacks[nearest]) == len(nearest.required):
            texts = [column for column in others if type(values[column]) is str and not is_metadata(column)]
            name = "text" if len(texts) == 1 else "prompt and completion" if texts else "messages"
            nearest = next(schema for schema in SCHEMAS if schema.name == name)
        return nearest, lacks[nearest]

    @cached_property
    def _schemas(self) -> tuple[Schema, ...]:
        """SCHEMAS, but those that need mapped fields first: who maps a field wants it to be read."""
        return tuple(sorted(SCHEMAS, key=lambda schema: -sum(name in self.mapping for name in schema.required)))

    def _assigned(self, values: JsonObject, table: Mapping[str, tuple[str, int]]) -> tuple[dict[str, str], list[str]]:
        assigned = _assigned(values, table)
        if self.mapping:
            self._seen.update(assigned[0])
        return assigned

    @cached_property
    def _seen(self) -> set[str]:
        """The fields whose columns were found in a row or message."""
        return set()

    # The assignments of rows and messages without null, by kind and keys: most rows of a file have the same keys.

    @cached_property
    def _rows(self) -> dict[tuple[str | None, ...], Assignment]:
        return {}

    @cached_property
    def _messages(self) -> dict[tuple[str, ...], tuple[dict[str, str], list[str]]]:
        return {}

    @cached_property
    def _row_table(self) -> dict[str, tuple[str, int]]:
        return _table(ROW_FIELDS, self.mapping)

    @cached_property
    def _message_table(self) -> dict[str, tuple[str, int]]:
        return _table(MESSAGE_FIELDS, self.mapping)


def _table(fields: Mapping[str, tuple[str, ...]], mapping: Mapping[str, str]) -> dict[str, tuple[str, int]]:
    """Return column -> (field, rank among the columns of that field)."""
    names = {name: (mapping[name],) if name in mapping else columns for name, columns in fields.items()}
    table: dict[str, tuple[str, int]] = {}
    for name in sorted(names, key=lambda name: name not in mapping):  # a mapped column holds no other field
        for rank, column in enumerate(names[name]):
            table.setdefault(column, (name, rank))
    return table


def _assigned(values: JsonObject, table: Mapping[str, tuple[str, int]]) -> tuple[dict[str, str], list[str]]:
    found: dict[str, str] = {}
    others = []
    for column, value in values.items():
        if value is None:
            continue
        place = table.get(column)
        if place is None:
            others.append(column)
            continue
        before = found.setdefault(place[0], column)
        if before is not column:
            if place[1] < table[before][1]:
                found[place[0]], column = column, before
            others.append(column)
    return found, others


_TURN_TABLE = _table(TURN_FIELDS, {})
DEFAULT_COLUMNS = Columns()  # without a mapping


def describe(values: JsonObject, bad: BadRow, columns: Columns = DEFAULT_COLUMNS) -> str:
    """Return, for an error message, why a row cannot be used and the fields that it has; if no schema fits, also the
    nearest and what is lacking."""
    types = [f"`{key}` ({'null' if value is None else json_type(value)})" for key, value in list(values.items())[:12]]
    more = f" and {len(values) - 12} others" if len(values) > 12 else ""
    fields = f"it has {', '.join(types)}{more}" if types else "it is an empty object"
    try:
        columns.of_row(values, None)
    except BadRow as none:
        schema, lacks = columns.nearest(values)
        options = " ".join(f"--map {name}=COLUMN" for name in lacks)
        held = [f"{key}[]" if type(value) is list else key for key, value in values.items() if _holds_rows(key, value)]
        inside = f"; if the rows are inside: jq -c '.{held[0]}' FILE > NEW.jsonl" if len(held) == 1 else ""
        near = f"the nearest schema is {schema.name} and lacks {_listed(lacks)} ({options})"
        return f"{none.reason}; {fields}; {near}{inside}"
    return f"{bad}; {fields}"


def _holds_rows(key: str, value: Any) -> bool:
    """Return whether a column is a list of objects, as messages and rows are, or an object that has a column of a row
    and is no metadata."""
    if type(value) is dict and not is_metadata(key):
        return any(
            name in _ROW_COLUMNS or (type(inner) is list and _holds_rows(name, inner)) for name, inner in value.items()
        )
    return type(value) is list and bool(value) and type(value[0]) is dict


def _listed(names: Iterable[Any]) -> str:
    """Return names for an error message, the first five of them."""
    return ", ".join(f"`{name}`" for name in list(names)[:5])[:200] or "no key"
