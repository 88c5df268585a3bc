"""Parsing of jsonl lines. One line becomes a `Document`, a `Conversation` or a `Pair`, or raises `BadRow`. Each line is
parsed independently of all others.

Modules: `row` (the rows), `reasons` (why a row is left out), `load` (strict JSON), `schemas` (tables of columns and
schemas), `messages` (messages, tools and calls), `parse` (a line to a row, and the kind of a file).
"""

# ruff: noqa: F401 - these names are what the other modules import
from mmdata.encode.rows.messages import calls_of, objects_of
from mmdata.encode.rows.parse import LOOK_AT, PLACEHOLDER, explain, find_kind, kind_of, kind_of_lines, parse_row
from mmdata.encode.rows.reasons import (
    DUPLICATE,
    EARLIER_REASONING,
    FEW_BAD_ROWS,
    HELP,
    LEFT_OUT,
    LOST,
    MOST_FAILED,
    NEAR_DUPLICATE,
    NOT_SELECTED,
    OF_THE_RUN,
    OVERLAP,
    REASONS,
    TOOL_REFERENCES,
    BadRow,
    asked_for,
    check_budget,
)
from mmdata.encode.rows.row import (
    Conversation,
    Document,
    Message,
    Pair,
    Row,
    canonical_calls,
    canonical_tools,
    join_documents,
    num_characters,
    row_hash,
    split_documents,
    texts_of,
)
from mmdata.encode.rows.schemas import DEFAULT_COLUMNS, Columns, split_keys
