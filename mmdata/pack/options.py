"""The options of `mm pack` with types, defaults, ranges and help texts. Imports nothing that is slow to load."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmdata.errors import TokenizerError, UsageError
from mmdata.io.options import ReadOptions
from mmdata.options import INT64, option, redeclared

if TYPE_CHECKING:
    from mmdata.tokenizer.tokenizer import Tokenizer

PART_BYTES = 32 * 2**20
DEDUP = ("exact", "near")
QUALITY = ("gopher", "c4", "fineweb")
OUTPUT, ROWS, TEMPLATE, DUPLICATES, MACHINES = (
    "Output",
    "Rows left out and held out",
    "Template",
    "Duplicates and overlaps",
    "Processes and machines",
)
ORDER = "Order"


@dataclass(frozen=True, slots=True, kw_only=True)
class PackOptions(ReadOptions):
    """The options of `mm pack`, which chooses `max_len` and `val_fraction` from the data (`estimate.survey`) if they
    are not given. `workers`, `encoder`, `engine`, `ray_address`, `shard` and `finish` do not influence the bytes of the
    dataset; `max_bad` and `allow_unknown` only decide whether it is published."""

    tokenizer: Path | None = option(None, "Tokenizer directory.", OUTPUT, metavar="DIR", default_text="data/tokenizer")
    max_len: int = option(
        1024,
        "Longest sequence in tokens; bucket lengths are 512, 1024, 2048 … below it, and the limit itself.",
        OUTPUT,
        default_text="the smallest of 512, 1024 and 2048 that keeps 99.5% of the tokens",
        least=8,
        below=2**31,
    )
    val_fraction: float = option(
        0.01,
        "Share of rows held out for validation; rows are chosen by a hash of their content.",
        ROWS,
        default_text="0.01; of less than 5,000 rows 50 rows or 0.02, at most 0.2",
        least=0,
        below=1,
    )
    on_bad: str = option(
        "quarantine",
        "quarantine: set bad rows aside and count them; fail: stop at the first.",
        ROWS,
        choices=("quarantine", "fail"),
    )
    where: str | None = option(
        None,
        "Keep only the rows for which this condition on their columns holds (docs/frames.md).",
        ROWS,
        metavar="CONDITION",
    )
    max_bad: str | None = option(
        None,
        "Stop with an error if a larger share of the rows is bad; also by reason: '1%,not json=0'.",
        ROWS,
        default_text="5%",
    )
    on_lost: str = option(
        "set-aside",
        "Rows of which the chat template leaves out a part. set-aside: leave them out, counted by reason; "
        "fail: stop at the first; warn: pack them without the part.",
        ROWS,
        choices=("set-aside", "fail", "warn"),
    )
    allow_unknown: bool = option(
        False, "Pack also if the tokenizer does not know more than 1% of the text, which is lost.", ROWS
    )
    train_on: str = option(
        "assistant",
        "assistant: train on every answer; last: on the last answer; all: on every token. "
        "Never on messages of weight 0.",
        TEMPLATE,
        choices=("assistant", "last", "all"),
    )
    era: str = option(
        "auto",
        "Generation of MiniMind's chat template; auto detects it, another than the template's is an error.",
        TEMPLATE,
        choices=("auto", "seed", "2", "3"),
    )
    seed: int = option(
        0, "Seed of the only random choice: which rows keep their empty think blocks.", TEMPLATE, **INT64
    )
    end_of_turn: str | None = option(
        None,
        "Append this special token to each answer, for a chat template that writes nothing after answers.",
        TEMPLATE,
        metavar="TOKEN",
    )
    date: str | None = option(
        None,
        "Today's date for a chat template that writes it, YYYY-MM-DD.",
        TEMPLATE,
        metavar="DATE",
        default_text="2024-07-26",
    )
    dedup: str | None = option(
        None,
        "Leave out repeated rows except the first: exact, or near (pip install 'mm-toolkit[dedup]').",
        DUPLICATES,
        choices=DEDUP,
    )
    exclude: tuple[Path, ...] = option(
        (),
        "Leave out rows that overlap with the texts of this file, such as a benchmark; may be repeated.",
        DUPLICATES,
        metavar="FILE",
    )
    workers: int | None = option(None, "Number of processes.", MACHINES, least=1, default_text="one per core")
    encoder: str = option(
        "auto",
        "auto: the fastest installed one that gives the same ids; fastokens: pip install 'mm-toolkit[fast]'.",
        MACHINES,
        choices=("auto", "tokenizers", "fastokens"),
    )
    engine: str = option(
        "local",
        "local: processes on this machine; ray: a Ray cluster (pip install 'mm-toolkit[ray]').",
        MACHINES,
        choices=("local", "ray"),
    )
    ray_address: str | None = option(
        None,
        "Address of the Ray cluster; auto finds a running one.",
        MACHINES,
        metavar="HOST:PORT",
        default_text="a cluster started on this machine",
    )
    shard: str | None = option(
        None,
        "Pack only every N-th part, from the I-th on, on a shared filesystem; then run --finish.",
        MACHINES,
        metavar="I/N",
    )
    finish: bool = option(False, "Publish the dataset from what all --shard runs packed.", MACHINES)
    part_bytes: int = option(
        PART_BYTES,
        "Bytes of input in a part, and so about in its shards; larger ones for terabytes, as a worker holds one in memory.",
        MACHINES,
        flag="--part-size",
        metavar="BYTES",
        least=1,
    )

    @property
    def share(self) -> tuple[int, int] | None:
        """`shard` "i/n" as (i, n), 1 <= i <= n, or None. Raises UsageError if malformed or combined with `finish`."""
        if self.shard is None:
            return None
        if self.finish:
            raise UsageError("--shard packs, --finish publishes when all shards have packed", "leave one of them out")
        number, _, count = self.shard.partition("/")
        if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
            raise UsageError(f"--shard {self.shard} is not I/N with I from 1 to N", "--shard 1/4, …, --shard 4/4")
        return int(number), int(count)


def packing_tokenizer(
    options: PackOptions, kind: str, note: Callable[[str], None] = lambda _: None
) -> "tuple[Tokenizer, dict[str, str]]":
    """Return the tokenizer for packing rows of this kind, its chat template changed where options ask for it or the
    template needs it, and the changes: the arguments of `Tokenizer.amended`. note: called with sentences about them.
    Raises TokenizerError if the tokenizer cannot be used, also because its chat template writes nothing after answers,
    and UsageError if an option does not fit the template."""
    from mmdata.encode.template import Template
    from mmdata.tokenizer.chat_template import DATE
    from mmdata.tokenizer.tokenizer import Tokenizer

    assert options.tokenizer, "PackOptions.tokenizer is required"
    original, token, changes = Tokenizer.load(options.tokenizer), options.end_of_turn, {}
    name, is_used = original.dir, kind != "document"  # whether rows are rendered with the template
    if options.date and not original.asks_for_date:
        raise UsageError(f"--date: the chat template of {name} writes no date, or a fixed one", "leave it out")
    if original.asks_for_date and (options.date or is_used):
        changes["date"] = options.date or DATE
    tokenizer = original.amended(**changes)
    if not token and not is_used:
        return tokenizer, changes
    template = Template(tokenizer)
    if token and token not in tokenizer.control_tokens:
        some = ", ".join(list(tokenizer.control_tokens)[:8])
        raise UsageError(f"--end-of-turn {token} is no special token of {name}", f"it has {some}")
    if token and template.ends and token not in template.ends:
        ends = ", ".join(map(repr, template.ends))
        raise UsageError(f"--end-of-turn {token}, but the chat template writes {ends} after answers", "leave it out")
    if token and not template.ends:
        changes["end_of_turn"] = token
    elif not template.ends:
        raise TokenizerError(
            f"{name}: its chat template writes nothing after an answer, so a model would never stop",
            f"--end-of-turn '{tokenizer.eos_token}' appends this token to each answer; it is trained, and stands in exports",
        )
    if template.missing_prompt:
        changes["generation_prompt"] = template.missing_prompt
        note(f"the chat template does not begin answers in prompts: {template.missing_prompt!r} is added to it")
    ends = template.ends or (token,)
    if tokenizer.eos_token not in ends:
        listed = " or ".join(map(repr, ends))
        note(f"answers end with {listed}, documents with the eos token {tokenizer.eos_token!r}: both stop generation")
    return original.amended(**changes), changes


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectOptions(ReadOptions):
    """The options of `mm select`. They are applied in the order of the fields; `workers` does not change the result."""

    where: str | None = redeclared(PackOptions, "where", default=None)
    quality: str | None = option(
        None,
        "Keep only the rows that meet the published rules for the quality of text (docs/frames.md).",
        ROWS,
        choices=QUALITY,
    )
    exclude: tuple[Path, ...] = redeclared(PackOptions, "exclude", default=())
    dedup: str | None = redeclared(PackOptions, "dedup", default=None)
    sample: str | None = option(
        None,
        "Draw this many of the rows that are left, or this share of them, such as 10%.",
        ROWS,
        metavar="NUMBER|SHARE",
    )
    sort: str | None = option(
        None,
        "Write the rows in ascending order of a column; 'COLUMN desc' in descending order.",
        ORDER,
        metavar="COLUMN",
    )
    shuffle: bool = option(False, "Write the rows in random order.", ORDER)
    seed: int = option(0, "Seed of --sample and --shuffle.", ORDER, **INT64)
    tokenizer: Path | None = redeclared(PackOptions, "tokenizer", default=None)
    workers: int | None = redeclared(PackOptions, "workers", default=None)

    def num_sampled(self, num_rows: int) -> int:
        """Return how many of `num_rows` rows to draw. Raises UsageError if `sample` is no number and no share."""
        text = (self.sample or "100%").strip()
        fix = "--sample 1000, --sample 10% or --sample 0.1"
        try:
            if text.isdecimal():
                return min(int(text), num_rows)
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            share = -1.0
        if not 0 <= share <= 1:
            raise UsageError(f"--sample {text!r} is neither a number of rows nor a share from 0 to 1", fix)
        return round(share * num_rows)


def parse_budget(text: str | None) -> tuple[float | None, dict[str, float]]:
    """Parse limits for bad rows, such as "5%" or "0.05,too long=1%", to shares of all rows, 0 to 1: for all reasons
    together (None: the default), and by reason. Raises UsageError for a bad share or an unknown reason."""
    from mmdata.encode.rows import HELP

    overall, by_reason = None, {}
    for item in text.split(",") if text else ():
        reason, _, amount = (each.strip() for each in item.rpartition("="))
        try:
            share = float(amount.removesuffix("%")) / (100 if amount.endswith("%") else 1)
        except ValueError:
            share = -1.0
        if not 0 <= share <= 1 or (reason and reason not in HELP):
            raise UsageError(f"--max-bad {item.strip()!r} is not a share", f"--max-bad 5%; reasons: {', '.join(HELP)}")
        if reason:
            by_reason[reason] = share
        else:
            overall = share
    return overall, by_reason
