"""Why a row is left out: the reasons, with explanation and remedy, and how many such rows are too many."""

from collections.abc import Mapping

from mmdata.errors import InputError

_KEEP_LOST = "use another template, or --on-lost warn to pack such rows without it"
REASONS = {  # reason why a row is left out -> explanation and remedy, shown to the user
    "bad UTF-8": "the line is not UTF-8 text; save the file as UTF-8, or name its encoding: --encoding NAME",
    "not json": "the line is not one JSON value; look for a cut line, a missing comma or quote; several values on a line: jq -c . FILE > NEW.jsonl",
    "repeated key": "an object gives one key two values, of which readers take the last; fix the program that wrote the file",
    "not an object": 'a row is a JSON object such as {"text": "…"}, or a list of messages',
    "lone surrogate": r"half of an escape pair such as \ud83d\ude00 stands alone; fix the program that wrote the file",
    "unknown fields": "no schema has these fields: name the columns, as in --map prompt=question --map completion=reply",
    "missing field": "a field of the schema is missing: name the column that holds it, as in --map rejected=worse",
    "another kind": "the file's other rows are of another kind; keep each kind in its own file, or take one with --kind",
    "prompt only": "the row has a prompt without an answer (data for reinforcement learning); mm packs answered rows",
    "unwanted answer": "`label` (or `kto_tag`) is false or 0, which marks an answer that a model should not give (as in data for KTO); if it says something else, rename it",
    "wrong types": "a field is not of the type its schema names",
    "content is not text": "mm trains on text only, not on images, audio or video",
    "unusable weight": "`weight`, `train` or `loss` of a message is 1 or true (trained), or 0 or false (not trained)",
    "no messages": "the list of messages is empty",
    "empty content": "a message or text holds nothing but whitespace",
    "unknown role": "roles are system, user, assistant and tool (ShareGPT: human, gpt, observation, function_call)",
    "roles out of order": "user and assistant take turns, beginning with the user; tool answers follow the assistant",
    "no assistant": "no message is the assistant's, so there is nothing to train on",
    "last turn not the assistant's": "the conversation ends without an answer",
    "chosen equal to rejected": "the two sides are equal, so there is no preference to learn",
    "different prompts": "the two sides differ before the first reply",
    "content lost": f"the chat template leaves out a part of a message; {_KEEP_LOST}",
    "reasoning lost": f"the chat template does not write the reasoning of an answer; {_KEEP_LOST}",
    "tool calls lost": f"the chat template leaves out a part of a tool call; {_KEEP_LOST}",
    "tools lost": f"the chat template leaves out a tool, or a part of its definition; {_KEEP_LOST}",
    "name lost": f"the chat template does not write the name of who speaks; {_KEEP_LOST}",
    "template refuses": "the tokenizer's chat template raised an error on the row",
    "template cannot be cut": "with this template and tokenizer the assistant's tokens cannot be told exactly from the others",
    "no trained token": "no token of the row would be trained on",
    "too long": "the row does not fit --max-len; take a larger one",
}

# Reasons why options such as --dedup leave out a row that is valid in itself.
DUPLICATE, NEAR_DUPLICATE, OVERLAP = "duplicate", "near duplicate", "overlaps an excluded text"
NOT_SELECTED = "not selected"
SCREENED = {
    NOT_SELECTED: "a condition (--where, --quality) does not hold for the row, or --sample did not draw it",
    DUPLICATE: "an earlier row has the same content",
    NEAR_DUPLICATE: "an earlier row has nearly the same content",
    OVERLAP: "the row's text also stands in a file given with --exclude",
}
HELP = REASONS | SCREENED

LOST = frozenset({"content lost", "reasoning lost", "tool calls lost", "tools lost", "name lost"})
# What templates leave out on purpose. Rows with it are packed.
EARLIER_REASONING, TOOL_REFERENCES = "earlier reasoning", "tool references"
LEFT_OUT = {
    EARLIER_REASONING: "the chat template writes the reasoning of the last answer, not of those before it",
    TOOL_REFERENCES: "the chat template writes no ids and names for a tool's answer: it answers the call at its place",
}
# Reasons that depend on the tokenizer or the options. Rows left out for them do not count as bad in `check_budget`.
OF_THE_RUN = frozenset({"too long", "template refuses", "template cannot be cut", *LOST, *SCREENED})
DEFAULT_MAX_BAD = 0.05  # without --max-bad, a larger share of bad rows is an error
FEW_BAD_ROWS = 100  # without --max-bad, this number of bad rows is no error, unless they are more than MOST_FAILED
MOST_FAILED = 0.5  # share of rows; if more are left out it is an error, for whatever reasons


class BadRow(ValueError):
    """Raised for a row that cannot be used. reason: a key of HELP, by which bad rows are counted. detail: what was
    found, and where in the row; may be empty."""

    def __init__(self, reason: str, detail: str = ""):
        assert reason in HELP, reason
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


def asked_for(kind: str | None) -> frozenset[str]:
    """Return the reasons for which the user asked that rows be left out. kind: that of --kind, or None."""
    return frozenset((*SCREENED, "another kind") if kind else SCREENED)


def check_budget(
    counts: Mapping[str, int],
    num_rows: int,
    max_bad: float | None = None,
    per_reason: Mapping[str, float] | None = None,
    *,
    kind: str | None = None,
) -> None:
    """Raise InputError if too many rows of a file or dataset are bad. Rows left out for a reason that the user asked
    for (`asked_for`) do not count.

    counts: bad rows by reason. num_rows: all rows. max_bad: the largest allowed share of bad rows, in [0, 1]; reasons
    in OF_THE_RUN are not counted. None allows DEFAULT_MAX_BAD of the rows, or FEW_BAD_ROWS rows if that is more.
    MOST_FAILED of the rows (or `max_bad`, if that is more) is the limit for all reasons, except those in `per_reason`:
    reason -> the largest allowed share, in addition to `max_bad`. kind: that of --kind.
    """
    per_reason = per_reason or {}
    aside = asked_for(kind)
    failed = {reason: count for reason, count in counts.items() if count and reason not in aside}
    num_left = num_rows - sum(count for reason, count in counts.items() if reason in aside)
    bad = {reason: count for reason, count in failed.items() if reason not in OF_THE_RUN}
    limit, most_failed = DEFAULT_MAX_BAD if max_bad is None else max_bad, max(MOST_FAILED, max_bad or 0)
    allowed = limit * num_rows if max_bad is not None else max(limit * num_rows, FEW_BAD_ROWS)
    _check_share(bad, num_rows, allowed, limit)
    failed = {reason: count for reason, count in failed.items() if reason not in per_reason}
    _check_share(failed, num_left, most_failed * num_left, most_failed)
    for reason, share in per_reason.items():
        if counts.get(reason, 0) > share * num_rows:
            raise InputError(
                f"{counts[reason]:,} of {num_rows:,} rows: {reason} (allowed: {share:.2%})",
                f"{HELP[reason]}; or raise --max-bad for this reason",
            )


def _check_share(counts: Mapping[str, int], num_rows: int, allowed: float, share: float) -> None:
    """Raise InputError if these reasons have more rows than allowed. share: the allowed share, for the message."""
    if (num_bad := sum(counts.values())) > allowed:
        reason = max(counts, key=lambda r: counts[r])
        raise InputError(
            f"{num_bad:,} of {num_rows:,} rows cannot be used (allowed: {share:.2%}); most: {counts[reason]:,} {reason}",
            f"{HELP[reason]}; or raise --max-bad",
        )
