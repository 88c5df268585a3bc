"""Figures of a report from tallies, plain dictionaries of numbers and strings, and warnings on them."""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from mmdata.encode import rows
from mmdata.pack.packing import BUCKETS, buckets_for, pack
from mmdata.pack.summary import length_figures
from mmdata.stats.frames import LONGER_BY, OPENING, pieces_of, repeated_phrases
from mmdata.stats.report.page import percent
from mmdata.stats.scan import PartScan
from mmdata.stats.tally import Figures, Tally, rounded_lengths
from mmdata.stats.tokens import NUM_SHARES, ROLES, Vocabulary
from mmdata.tokenizer import text as texts

BATCH_TOKENS = {"document": 65_536, "conversation": 32_768, "pair": 16_384}  # of a step, the stages' defaults
PACKED_FOR_CUTS = 100_000  # sequences whose packing is tried for each length limit
NUM_TOP = 20  # of any list


def token_figures(tally: Tally) -> Figures:
    """Tokens of all rows of a file; if only a sample was tokenized, scaled by characters."""
    sums = tally.sums
    is_sample = sums["sampled_rows"] < sums["kept"]
    share = sums["sampled_characters"] / max(sums["characters"], 1) if is_sample else 1.0
    values, counts = rounded_lengths(tally.of("tokens"))
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
        "lengths": length_figures(by_length),
    }
    return figures | ({"sample": {"rows": sums["sampled_rows"], "of": sums["kept"]}} if is_sample else {})


def text_figures(tally: Tally, scans: Sequence[PartScan], *, is_whole: bool = True) -> Figures:
    """Figures of texts; without `is_whole` those that a sample of the rows can tell."""
    sample = [
        "\n".join(text for _, text in pieces_of(row.parsed())) for scan in scans for row in scan.shown.get("random", ())
    ]
    sums = tally.sums
    figures: Figures = {
        "characters_by": {
            "row": tally.lengths("characters"),
            "roles": tally.lengths_by("characters by role"),
            "turns": tally.lengths_by("characters by turn", map(str, range(1, 9))),
        },
        "languages": dict(zip(texts.LANGUAGES, tally.array("languages", len(texts.LANGUAGES)).tolist(), strict=True)),
        "scripts": {
            name: {"characters": count}
            for name, count in zip(texts.SCRIPTS, tally.array("scripts", len(texts.SCRIPTS)).tolist(), strict=True)
            if count
        },
        "turns": {str(turns): count for turns, count in tally.values("turns").items()},
        "openings": tally.top("opening", NUM_TOP),
        "openings_missed": tally.missed["opening"],
        "ngrams": repeated_phrases(sample, NUM_TOP),
        "ngram_rows": len(sample),
        "systems": {
            "rows": sums["rows_with_system"],
            "different": len(tally.of("system")),
            "top": tally.top("system", NUM_TOP, 1),
        },
        "tools": {"rows": sums["rows_with_tools"], "calls": sums["calls"], "top": tally.top("tool", NUM_TOP, 1)},
        "reasoning": sums["reasoning"],
        "rows_with_control": sums["rows_with_control"],
        "extra_keys": dict(tally.counters["extra_keys"].most_common(NUM_TOP)),
        "text_rows": sums["kept"],
    }
    if tally.counters["longer"]:
        ratios = tally.values("ratio")
        figures["pairs"] = {
            "pairs": sums["kept"],
            "longer": dict(tally.counters["longer"]),
            "margins": tally.lengths("margin"),
            "ratios": {str(k): ratios.get(k, 0) for k in range(-8, 9)},
            "similarity": tally.array("likeness", 10).tolist(),
        }
    if is_whole:
        figures["duplicates"] = duplicate_figures(tally)
    return figures


def duplicate_figures(tally: Tally) -> Figures:
    """Rows whose texts equal an earlier row's, and of the others those that nearly do, with how many were compared."""
    is_exact = is_repeat(tally.column("hashes"))
    signatures = tally.columns["signatures"] or [np.empty((0, texts.NUM_BINS), np.uint16)]
    signed = np.concatenate(signatures)
    near = texts.near_duplicates(signed[~is_exact[: len(signed)]])
    return {
        "rows": len(is_exact),
        "exact": int(is_exact.sum()),
        "near": int(near.sum()),
        "rows_compared": len(signed),
        "near_from": texts.NEAR,
    }


def is_repeat(hashes: np.ndarray) -> np.ndarray:
    """bool [rows]: whether an earlier row has the same hash."""
    return ~pl.Series(hashes).is_first_distinct().to_numpy()


def count_figures(tally: Tally, vocabulary: Vocabulary, kind: str) -> Figures:
    """Figures of tokens by script, role, turn and id."""
    return {
        "tokens_by": {
            "sequence": tally.lengths("tokens"),
            "roles": tally.lengths_by("tokens by role", ROLES),
            "turns": tally.lengths_by("tokens by turn", map(str, range(1, 9))),
            **({"pair": tally.lengths_by("tokens by part")} if kind == "pair" else {}),
        },
        "trained_shares": tally.array("trained shares", NUM_SHARES).tolist(),
        "token_scripts": _script_figures(tally),
        "vocabulary": _vocabulary(tally, vocabulary),
    }


def _script_figures(tally: Tally) -> dict[str, Figures]:
    """For each script its tokens, their share, and how many characters and bytes one token holds."""
    scripts = (*texts.SCRIPTS, "control")
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
    """Use of the vocabulary: ids seen and never seen, how many of the most frequent make up half of all, the top, control."""
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
    """Ranks for a curve on a logarithmic axis, from 0."""
    return sorted({min(size, round(2 ** (k / 4))) - 1 for k in range(4 * (size.bit_length() + 1))}) if size else []


def cut_lines(lengths: pl.DataFrame, kind: str, limits: Sequence[int], tried: int = PACKED_FOR_CUTS) -> list[Figures]:
    """What each length limit would cost: sequences and tokens beyond it, and padding, one sequence a line or packed.

    lengths: columns value and count. `packed_fill` is that of the packer on at most `tried` sequences, longer ones cut; None for
    pairs, which are not packed.
    """
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
                "steps": -(-kept // BATCH_TOKENS[kind]),
            }
        )
    return costs


def _packed_fill(lengths: np.ndarray, counts: np.ndarray, limit: int, tried: int) -> float:
    lengths, counts = lengths[lengths > 0], counts[lengths > 0]
    total = int(counts.sum())
    at = np.linspace(0, total - 1, min(total, tried)).astype(np.int64)
    some = lengths[np.searchsorted(np.cumsum(counts), at, "right")]
    return float(some.sum() / sum(bucket for bucket, _ in pack(some, buckets_for(limit))))


def left_out_figures(
    left_out: Mapping[str, int], examples: Mapping[str, list[Figures]], num_rows: int
) -> list[Figures]:
    """Rows left out, by reason, the commonest first: how many, their share of all rows, what helps, and examples."""
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

# By code; {…} are values. Reports translate the sentences.
WARNINGS = {
    "left out": "{share} of the rows were left out, most of them for: {reason}",
    "cut": "{share} of the tokens were cut to fit the length limit",
    "exact duplicates": "{share} of the rows repeat an earlier row word for word",
    "near duplicates": "{share} of the rows nearly repeat an earlier row",
    "control strings": "{share} of the rows contain control strings; they are packed as plain text",
    "chosen longer": "{share} of the pairs prefer the longer answer by more than {factor}×",
    "length bias": "the chosen answer is the longer one in {share} of the pairs: dpo may learn length",
    "alike": "{share} of the pairs have two answers that are nearly the same",
    "little trained": "only {share} of the tokens are trained on",
    "low fill": "packs are only {share} full",
    "unused vocabulary": "{share} of the vocabulary never occurs in these {tokens} tokens",
    "one opening": "{share} of the texts or answers begin with the same words: {text}",
    "few val rows": "only {number} rows are held out for validation",
    "contained": "{share} of {one} is also in {other}",
}


def warnings(figures: Mapping[str, Any]) -> list[Figures]:
    """What a reader should know first, as {"code", "values", "text"}; in the order of WARNINGS."""
    return [warning(code, **values) for code, values in _warnings_on(figures)]


def warning(code: str, **values: Any) -> Figures:
    """A warning with its English sentence."""
    return {"code": code, "values": values, "text": WARNINGS[code].format(**values)}


def _warnings_on(figures: Mapping[str, Any]) -> Iterable[tuple[str, Figures]]:
    num_rows, kept = max(figures["rows"], 1), max(figures["kept"], 1)
    left_out = figures["left_out"]
    if sum(left_out.values()) > 0.001 * num_rows:
        reason = max(left_out, key=lambda r: left_out[r])
        yield "left out", {"share": percent(sum(left_out.values()) / num_rows), "reason": reason}
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
    used = figures.get("vocabulary")
    if used and used["counted"] >= 100 * used["size"] and used["never"] > 0.02 * used["size"]:
        yield (
            "unused vocabulary",
            {"share": percent(used["never"] / used["size"]), "tokens": f"{used['counted']:,}"},
        )
    if figures.get("openings") and figures["openings"][0]["count"] > 0.02 * figures["text_rows"]:
        top = figures["openings"][0]
        text = f"“{top['text']}{'…' if len(top['text']) == OPENING else ''}”"
        yield "one opening", {"share": percent(top["count"] / figures["text_rows"]), "text": text}
    if "val_rows" in figures and figures["val_rows"] < 20 and kept > 200:
        yield "few val rows", {"number": figures["val_rows"]}


def _pair_warnings(pairs: Mapping[str, Any] | None) -> Iterable[tuple[str, Figures]]:
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
