"""Compute the numbers of a report ("figures") from tallies, and the warnings about them, as plain dictionaries and
lists of numbers and strings, which `mm stats --json` prints."""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl

from mmdata.encode import rows
from mmdata.errors import InputError
from mmdata.io.files import read_bytes
from mmdata.io.records import decode_record, plain
from mmdata.pack import summary
from mmdata.pack.filter.features import pieces_of
from mmdata.pack.filter.grams import NEAR, near_duplicates
from mmdata.pack.packing import BUCKETS, buckets_for, pack
from mmdata.stats.phrases import repeated_phrases
from mmdata.stats.report.page import percent
from mmdata.stats.scan import OPENING, PartScan
from mmdata.stats.tally import Figures, Tally, counts_of, length_figures, lengths_by, rounded_lengths
from mmdata.stats.tokens import MESSAGE_ROLES, NUM_SHARES, NUM_TURNS, Vocabulary
from mmdata.tokenizer.scripts import LANGUAGES, SCRIPTS

PACKED_FOR_CUTS = 100_000  # sequences, at most, that are packed to estimate the fill of each length limit
LONGER_BY = 3  # pairs are counted whose one reply is more than this many times as long as the other
REPLIES = ("prompt", "chosen", "rejected")  # the parts of a pair
LOSS_LENGTHS = (64, 256, 1024, 4096)  # characters of a row, that divide the lengths by which losses are shown
NUM_TOP = 20  # entries of each list of the most frequent strings or tokens


def token_figures(tally: Tally) -> Figures:
    """Return the figures of the tokens of a file: totals, share of trained tokens, characters per token, buckets and
    lengths. Of a sample of the rows, "tokens" and "loss_tokens" are extrapolated to all by the number of characters,
    "buckets" and "lengths" describe the sample, and "sample" has both numbers of rows."""
    sums = tally.sums
    is_sample = "sampled_rows" in sums and sums["sampled_rows"] < sums["kept"]
    share = sums["sampled_characters"] / max(sums["characters"], 1) if is_sample else 1.0
    values, counts = rounded_lengths(counts_of(tally.frame("sequences", "tokens")["tokens"]))
    by_length = np.zeros(int(values[-1]) + 1 if len(values) else 1, np.int64)
    by_length[values] = counts
    edges = [0, *BUCKETS, max(len(by_length), BUCKETS[-1] + 1)]
    names = [*(str(bucket) for bucket in BUCKETS), "longer"]
    figures = {
        "tokens": round(sums["tokens"] / max(share, 1e-12)),
        "loss_tokens": round(sums["loss_tokens"] / max(share, 1e-12)),
        "trained_share": sums["loss_tokens"] / max(sums["tokens"], 1),
        "characters_per_token": sums["characters"] * share / max(sums["tokens"], 1),
        "buckets": {
            name: {"sequences": int(by_length[low + 1 : high + 1].sum())}
            for name, (low, high) in zip(names, itertools.pairwise(edges), strict=True)
        },
        "lengths": plain(summary.length_figures(by_length)),
    }
    if sums["unknown_bytes"]:
        figures |= {name: round(sums[name] / max(share, 1e-12)) for name in ("text_bytes", "unknown_bytes")}
    return figures | ({"sample": {"rows": sums["sampled_rows"], "of": sums["kept"]}} if is_sample else {})


def text_figures(tally: Tally, scans: Sequence[PartScan], *, is_whole: bool = True) -> Figures:
    """Return the figures of texts: lengths, languages, scripts, turns, openings, repeated phrases, system prompts,
    tools, pairs. scans: merged into `tally`; repeated phrases are searched for in their "random" rows. is_whole:
    `tally` covers all rows; only then duplicates are included."""
    sample = [
        "\n".join(text for _, text in pieces_of(row.parsed())) for scan in scans for row in scan.shown.get("random", ())
    ]
    rows, texts, sums = tally.frame("rows"), tally.frame("texts"), tally.sums
    languages, turns = (dict(rows[name].value_counts().rows()) for name in ("language", "turns"))
    has_conversations = bool(turns.keys() - {0})
    unused = [entry for entry, count in tally.counters["unused_columns"].items() if count == len(scans)]
    figures: Figures = {
        "characters_by": {
            "row": length_figures(counts_of(rows["length"])),
            "roles": lengths_by(texts, "role", "characters"),
            "turns": lengths_by(texts, "turn", "characters", range(1, NUM_TURNS + 1)),
        },
        "languages": {name: languages.get(name, 0) for name in LANGUAGES},
        "scripts": {
            name: {"characters": count}
            for name, count in zip(SCRIPTS, tally.array("scripts", len(SCRIPTS)).tolist(), strict=True)
            if count
        },
        "turns": {str(number): turns[number] for number in sorted(turns)} if has_conversations else {},
        "openings": tally.top("opening", NUM_TOP),
        "openings_missed": tally.missed["opening"],
        "ngrams": repeated_phrases(sample, NUM_TOP),
        "ngram_rows": len(sample),
        "systems": {
            "rows": int(rows["has_system"].sum()),
            "different": len(tally.counted("system")),
            "top": tally.top("system", NUM_TOP, 1),
        },
        "tools": {
            "rows": int(rows["has_tools"].sum()),
            "calls": int(rows["tool_calls"].sum()),
            "top": tally.top("tool", NUM_TOP, 1),
        },
        "reasoning": int(rows["reasoning_messages"].sum()),
        "rows_with_control": sums["rows_with_control"],
        "extra_keys": dict(tally.counters["extra_keys"].most_common(NUM_TOP)),
        **({"unused_columns": unused} if unused else {}),
        "text_rows": sums["kept"],
    }
    if "similarity" in rows.columns:
        figures["pairs"] = _pair_figures(rows)
    if is_whole:
        figures["duplicates"] = duplicate_figures(tally)
    return figures


def _pair_figures(rows: pl.DataFrame) -> Figures:
    """Return how the lengths (in characters) of pairs' replies differ, the ratio chosen / rejected as 2 log2(ratio),
    rounded, from -8 (1/16) to 8, and how similar they are, in 10 bins of the Jaccard index."""
    chosen, rejected = (pl.col(f"{side}_characters").cast(pl.Int64) for side in ("chosen", "rejected"))
    longer = {
        "chosen": chosen > rejected,
        "rejected": chosen < rejected,
        "equal": chosen == rejected,
        "chosen by 3": chosen > LONGER_BY * rejected,
        "rejected by 3": rejected > LONGER_BY * chosen,
    }
    half_octaves = (2 * (chosen.clip(1) / rejected.clip(1)).log(2)).round().clip(-8, 8).cast(pl.Int64)
    found = rows.select(margin=(chosen - rejected).abs(), ratio=half_octaves)
    ratios = dict(counts_of(found["ratio"]).rows())
    bins = np.minimum(rows["similarity"].to_numpy() * 10, 9).astype(np.int64)
    return {
        "pairs": len(rows),
        "longer": rows.select(**{key: is_so.sum() for key, is_so in longer.items()}).row(0, named=True),
        "margins": length_figures(counts_of(found["margin"])),
        "ratios": {str(k): ratios.get(k, 0) for k in range(-8, 9)},
        "similarity": np.bincount(bins, minlength=10).tolist(),
    }


def duplicate_figures(tally: Tally) -> Figures:
    """Return the number of rows that are exact duplicates of an earlier row (the same roles and texts) and near ones
    (at least the share "near_from" of equal entries of the MinHash signatures), and of those with a computed signature,
    "rows_compared"."""
    rows = tally.frame("rows").with_columns(is_exact=is_repeat(tally))
    signed = rows.filter("is_signed")
    entries = tally.frame("signatures")["entries"].to_numpy()
    near = near_duplicates(entries[~signed["is_exact"].to_numpy()])
    return {
        "rows": len(rows),
        "exact": int(rows["is_exact"].sum()),
        "near": int(near.sum()),
        "rows_compared": len(signed),
        "near_from": NEAR,
    }


def is_repeat(tally: Tally) -> pl.Series:
    """Return for each row whether an earlier row has the same roles and texts."""
    return ~tally.frame("rows", "hash")["hash"].is_first_distinct()


def repeats_of(tally: Tally, inputs: Sequence[str]) -> pl.DataFrame:
    """Return the file and line (int64) of each row that repeats an earlier one. inputs: the paths of the files."""
    places = pl.DataFrame({"file": inputs}, {"file": pl.String}).with_row_index("input")
    rows = tally.frame("rows").filter(is_repeat(tally)).select("input", pl.col("line").cast(pl.Int64))
    return rows.join(places, on="input", maintain_order="left").select("file", "line")


# --- losses


class LossRecord(msgspec.Struct):
    """What a line of `mm eval --per-sequence` must have: nll is the summed loss of the tokens, in nats."""

    file: str
    line: int
    tokens: int
    nll: float
    side: str | None = None


def read_losses(path: Path) -> pl.DataFrame:
    """Return the loss of rows from the output of `mm eval --per-sequence`, JSON lines or parquet: a frame of file,
    line, tokens, nll, each row once, without sequences without trained tokens and rejected replies. Raises InputError
    if the file cannot be read, or a line is not such a record."""
    fix, names = (
        "mm eval RUN --per-sequence FILE writes one, with file, line, tokens and nll",
        LossRecord.__struct_fields__,
    )
    try:
        if path.suffix == ".parquet":
            records = pl.read_parquet(path).select(names)
        else:
            lines = enumerate(read_bytes(path).splitlines(), 1)
            found = [decode_record(raw, LossRecord, f"{path} line {n}", InputError, fix) for n, raw in lines]
            records = pl.DataFrame([msgspec.structs.astuple(one) for one in found], list(names), orient="row")
        types = {"file": pl.String, "line": pl.Int64, "tokens": pl.Int64, "nll": pl.Float64, "side": pl.String}
        records = records.cast(types)  # type: ignore[arg-type]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}", fix) from error
    except pl.exceptions.PolarsError as error:
        raise InputError(f"{path}: {str(error).partition(chr(10))[0]}", fix) from error
    counted = records.filter((pl.col("tokens") > 0) & pl.col("side").ne_missing("rejected"))
    return counted.group_by("file", "line", maintain_order=True).agg(pl.col("tokens", "nll").sum())


def loss_figures(tally: Tally, losses: pl.DataFrame, inputs: Sequence[str]) -> Figures:
    """Return rows, trained tokens and nats per token by language, length in characters, and source. losses: from
    `read_losses`. inputs: paths of the files. "elsewhere": rows of `losses` that are not among the rows."""
    places = pl.DataFrame({"file": inputs}).with_row_index("input")
    keys = losses.join(places, on="file").with_columns(pl.col("line").cast(pl.UInt32))
    found = tally.frame("rows").join(keys, on=["input", "line"])
    bins = pl.sum_horizontal(pl.col("length") >= edge for edge in LOSS_LENGTHS)
    ends = [f"{low:,}-{high - 1:,}" for low, high in itertools.pairwise((0, *LOSS_LENGTHS))] + [
        f"from {LOSS_LENGTHS[-1]:,}"
    ]

    def by(key: pl.Expr) -> dict[str, Figures]:
        groups = found.group_by(key.alias("key")).agg(pl.len().alias("rows"), pl.col("tokens", "nll").sum()).sort("key")
        each = groups.with_columns(loss=pl.col("nll") / pl.col("tokens"), key=pl.col("key").cast(pl.String)).drop("nll")
        return {of.pop("key"): of for of in each.to_dicts()}

    return {
        **found.select(
            rows=pl.len(), tokens=pl.col("tokens").sum(), loss=pl.col("nll").sum() / pl.col("tokens").sum()
        ).row(0, named=True),
        "elsewhere": len(losses) - len(found),
        "languages": by(pl.col("language")),
        "lengths": {ends[int(key)]: of for key, of in by(bins).items()},
        "sources": by(pl.col("file")),
    }


def count_figures(tally: Tally, vocabulary: Vocabulary, kind: str) -> Figures:
    """Return the figures of tokens by role, turn and script, of shares of trained tokens, and of the use of the
    vocabulary. tally: of `count_tokens`. kind: of the rows; "pair" adds lengths of prompts and replies."""
    sequences, messages = (
        tally.frame("sequences", "tokens", *REPLIES),
        tally.frame("messages", "role", "turn", "tokens"),
    )
    return {
        "tokens_by": {
            "sequence": length_figures(counts_of(sequences["tokens"])),
            "roles": lengths_by(messages, "role", "tokens", MESSAGE_ROLES),
            "turns": lengths_by(messages, "turn", "tokens", range(1, NUM_TURNS + 1)),
            **(
                {"pair": {name: length_figures(counts_of(sequences[name])) for name in REPLIES}}
                if kind == "pair"
                else {}
            ),
        },
        "trained_shares": tally.array("trained shares", NUM_SHARES).tolist(),
        "token_scripts": _script_figures(tally),
        "vocabulary": _vocabulary(tally, vocabulary),
    }


def _script_figures(tally: Tally) -> dict[str, Figures]:
    """Return, for each script that occurs, its tokens, their share of all, and characters and bytes per token."""
    scripts = (*SCRIPTS, "control")
    counts = tally.arrays.get("token scripts", np.zeros((len(scripts), 3), np.int64)).tolist()
    return {
        name: {
            "tokens": count,
            "share": count / max(tally.sums["tokens"], 1),
            "characters_per_token": characters / count,
            "bytes_per_token": num_bytes / count,
        }
        for name, (count, characters, num_bytes) in zip(scripts, counts, strict=True)
        if count
    }


def _vocabulary(tally: Tally, vocabulary: Vocabulary) -> Figures:
    """Return how the vocabulary is used. "never": number of ids that do not occur, control tokens aside, and the first
    60 of them in "never_ids". "cover": how many of the most frequent ids make up at least 50, 90 and 99 % of all
    tokens. "by_rank": count of the id at each of the "ranks" (1: the most frequent)."""
    counts = tally.array("vocabulary", vocabulary.size)
    order = np.argsort(-counts, kind="stable")
    reached = np.cumsum(counts[order]) / max(1, counts.sum())
    never = np.flatnonzero((counts == 0) & ~vocabulary.control)

    def record(id: int) -> Figures:
        return {"id": id, "text": vocabulary.text(id), "count": int(counts[id])}

    return {
        "size": vocabulary.size,
        "counted": int(counts.sum()),
        "seen": int((counts > 0).sum()),
        "never": len(never),
        "never_ids": [{"id": id, "text": vocabulary.text(id)} for id in never[:60].tolist()],
        "cover": {str(share): int(np.searchsorted(reached, share / 100) + 1) for share in (50, 90, 99)},
        "top": [record(int(id)) for id in order[:NUM_TOP] if counts[id]],
        "control": [record(int(id)) for id in np.flatnonzero(vocabulary.control)],
        "by_rank": [int(counts[order[rank]]) for rank in _ranks(vocabulary.size)],
        "ranks": [rank + 1 for rank in _ranks(vocabulary.size)],
    }


def _ranks(size: int) -> list[int]:
    """Return ascending ranks from 0 to size - 1, evenly spaced on a logarithmic axis, four per power of two."""
    return sorted({min(size, round(2 ** (k / 4))) - 1 for k in range(4 * (size.bit_length() + 1))}) if size else []


def cut_lines(lengths: pl.DataFrame, kind: str, limits: Sequence[int], tried: int = PACKED_FOR_CUTS) -> list[Figures]:
    """Return what each length limit (in tokens) would cut and how much padding it would need, a dictionary per limit.
    lengths: a frame of value (length of a sequence in tokens) and count. "tokens_beyond": tokens after the limit.
    "tokens_in_longer_share": share of all tokens that are in longer sequences. "padding_share": if each cut sequence is
    padded to the limit. "packed_fill": what packing reaches, measured on at most `tried` cut sequences; None for
    pairs."""
    values, counts = rounded_lengths(lengths)
    if not len(values):
        return []
    number, tokens = int(counts.sum()), int((values * counts).sum())
    costs = []
    for limit in limits:
        cut = np.minimum(values, limit)
        kept = int((cut * counts).sum())
        longer = values > limit
        costs.append(
            {
                "max_len": limit,
                "longer": int(counts[longer].sum()),
                "longer_share": float(counts[longer].sum() / number),
                "tokens_beyond": tokens - kept,
                "tokens_beyond_share": (tokens - kept) / max(tokens, 1),
                "tokens_in_longer_share": float((values * counts)[longer].sum() / max(tokens, 1)),
                "padding_share": 1 - kept / (number * limit),
                "packed_fill": None if kind == "pair" else _packed_fill(cut, counts, limit, tried),
            }
        )
    return costs


def _packed_fill(lengths: np.ndarray, counts: np.ndarray, limit: int, tried: int) -> float:
    """Pack at most `tried` sequences, spread evenly over the distribution of lengths, and return the fill, the share of
    positions with tokens. lengths: int64, ascending, at most `limit`, the largest bucket; 0 is ignored. counts: of
    each."""
    lengths, counts = lengths[lengths > 0], counts[lengths > 0]
    total = int(counts.sum())
    at = np.linspace(0, total - 1, min(total, tried)).astype(np.int64)
    some = lengths[np.searchsorted(np.cumsum(counts), at, "right")]
    return float(some.sum() / sum(bucket for bucket, _ in pack(some, buckets_for(limit))))


def left_out_figures(
    left_out: Mapping[str, int], examples: Mapping[str, list[Figures]], num_rows: int
) -> list[Figures]:
    """Return the rows left out by reason, the most frequent first: number, share of `num_rows`, help and examples.
    left_out: rows by reason. examples: records of some of them by reason."""
    return [
        {
            "reason": reason,
            "rows": count,
            "share": count / max(num_rows, 1),
            "help": rows.HELP.get(reason, ""),
            "examples": examples.get(reason, []),
        }
        for reason, count in sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    ]


# --- warnings

# The sentence of each warning code. The values of {…} are filled in by `warning`; HTML reports translate the sentences.
WARNINGS = {
    "left out": "{share} of the rows were left out, most of them for: {reason}",
    "unused column": "--map {entry}: no row has a value in this column",
    "cut": "{share} of the tokens were cut to fit the length limit",
    "exact duplicates": "{share} of the rows repeat an earlier row word for word",
    "near duplicates": "{share} of the rows nearly repeat an earlier row",
    "control strings": "{share} of the rows contain control strings; they are packed as plain text",
    "chosen longer": "{share} of the pairs prefer the longer answer by more than {factor}×",
    "length bias": "the chosen answer is the longer one in {share} of the pairs: dpo may learn length",
    "alike": "{share} of the pairs have two answers that are nearly the same",
    "little trained": "only {share} of the tokens are trained on",
    "low fill": "packs are only {share} full",
    "unknown characters": "the tokenizer does not know {share} of the bytes of the texts: they are lost",
    "unused vocabulary": "{share} of the vocabulary never occurs in these {tokens} tokens",
    "one opening": "{share} of the texts or answers begin with the same words: {text}",
    "few val rows": "only {number} rows are held out for validation",
    "contained": "{share} of {one} is also in {other}",
}


def warnings(figures: Figures) -> list[Figures]:
    """Return the warnings that apply, as [{"code", "values", "text"}], in the order of WARNINGS. figures: of a file or
    dataset, as far as measured."""
    return [warning(code, **values) for code, values in _warnings_on(figures)]


def warning(code: str, **values: Any) -> Figures:
    """Return {"code", "values", "text"}, where text is WARNINGS[code] with the values. KeyError if one is missing."""
    return {"code": code, "values": values, "text": WARNINGS[code].format(**values)}


def _warnings_on(figures: Figures) -> Iterable[tuple[str, Figures]]:
    """Yield (code, values) of each warning that applies."""
    num_rows, kept = max(figures["rows"], 1), max(figures["kept"], 1)
    left_out = {reason: count for reason, count in figures["left_out"].items() if reason != rows.NOT_SELECTED}
    if sum(left_out.values()) > 0.001 * num_rows:
        reason = max(left_out, key=lambda r: left_out[r])
        yield "left out", {"share": percent(sum(left_out.values()) / num_rows), "reason": reason}
    for entry in figures.get("unused_columns", ()):
        yield "unused column", {"entry": entry}
    if sum(figures.get("cut", {}).values()) > 0.001 * max(figures.get("tokens_in", 0), 1):
        yield "cut", {"share": percent(sum(figures["cut"].values()) / figures["tokens_in"])}
    repeated = figures.get("duplicates") or {"exact": 0, "near": 0, "rows": 0}
    if repeated["exact"] > 0.001 * kept:
        yield "exact duplicates", {"share": percent(repeated["exact"] / repeated["rows"])}
    if (repeated["near"] or 0) > 0.005 * kept:
        yield "near duplicates", {"share": percent(repeated["near"] / repeated["rows_compared"])}
    if figures.get("rows_with_control"):
        yield "control strings", {"share": percent(figures["rows_with_control"] / figures["text_rows"])}
    yield from _pair_warnings(figures.get("pairs"))
    if figures.get("tokens") and figures["kind"] == "conversation" and figures["trained_share"] < 0.2:
        yield "little trained", {"share": percent(figures["trained_share"])}
    if figures["kind"] != "pair" and figures.get("fill", 1) < 0.9:
        yield "low fill", {"share": percent(figures["fill"])}
    if figures.get("unknown_bytes", 0) > 0.001 * figures.get("text_bytes", 0):
        yield "unknown characters", {"share": percent(figures["unknown_bytes"] / figures["text_bytes"])}
    used = figures.get("vocabulary")
    if used and used["counted"] >= 100 * used["size"] and used["never"] > 0.02 * used["size"]:
        yield ("unused vocabulary", {"share": percent(used["never"] / used["size"]), "tokens": f"{used['counted']:,}"})
    if figures.get("openings") and figures["openings"][0]["count"] > 0.02 * figures["text_rows"]:
        top = figures["openings"][0]
        text = f"“{top['text']}{'…' if len(top['text']) == OPENING else ''}”"
        yield "one opening", {"share": percent(top["count"] / figures["text_rows"]), "text": text}
    if "val_rows" in figures and figures["val_rows"] < 20 and kept > 200:
        yield "few val rows", {"number": figures["val_rows"]}


def _pair_warnings(pairs: Figures | None) -> Iterable[tuple[str, Figures]]:
    """Yield (code, values) of the warnings on pairs that apply; none without figures of pairs."""
    if not pairs or not pairs["pairs"]:
        return
    number, longer = pairs["pairs"], Counter(pairs["longer"])
    if longer["chosen by 3"] > 0.02 * number:
        share = percent(longer["chosen by 3"] / number)
        yield "chosen longer", {"share": share, "factor": LONGER_BY}
    if longer["chosen"] > 0.6 * number:
        yield "length bias", {"share": percent(longer["chosen"] / number)}
    if sum(pairs["similarity"][9:]) > 0.01 * number:
        yield "alike", {"share": percent(sum(pairs["similarity"][9:]) / number)}
