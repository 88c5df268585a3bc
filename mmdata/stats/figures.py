"""Tallies in, the figures of a report out: plain dictionaries of numbers and strings, the same for terminal, JSON and HTML."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmdata.encode import rows
from mmdata.pack.buckets import BUCKETS, buckets_for
from mmdata.pack.packing import pack
from mmdata.pack.pipeline import length_figures
from mmdata.stats import measure
from mmdata.stats.measure import RowTally
from mmdata.stats.scan import PartScan
from mmdata.stats.tally import Lengths
from mmdata.stats.token_tally import TokenTally, Vocabulary
from mmdata.tokenizer import text as texts

BATCH_TOKENS = {"document": 65_536, "conversation": 32_768, "pair": 16_384}  # of a step, the stages' defaults
PACKED_FOR_CUTS = 100_000  # sequences whose packing is tried for each cut line
NUM_TOP = 20  # of any list


def token_figures(tokens: TokenTally, found: Sequence[PartScan], characters: int) -> dict[str, Any]:
    """Tokens of all rows; where only a sample was tokenized, scaled by characters."""
    sampled, of = sum(part.sampled_rows for part in found), sum(part.rows.kept for part in found)
    share = sum(part.sampled_characters for part in found) / max(characters, 1)
    is_sample = sampled < of
    values, counts = tokens.lengths.arrays()
    by_length = np.zeros(int(values[-1]) + 1 if len(values) else 1, np.int64)
    by_length[values] = counts
    edges = [0, *BUCKETS, max(len(by_length), BUCKETS[-1] + 1)]
    names = [*(str(bucket) for bucket in BUCKETS), "longer"]
    figures = {
        "tokens": round(tokens.tokens / max(share, 1e-12)) if is_sample else tokens.tokens,
        "loss_tokens": round(tokens.loss_tokens / max(share, 1e-12)) if is_sample else tokens.loss_tokens,
        "trained_share": tokens.loss_tokens / max(tokens.tokens, 1),
        "characters_per_token": characters * (share if is_sample else 1) / max(tokens.tokens, 1),
        "buckets": {
            name: {"sequences": int(by_length[low + 1 : high + 1].sum())}
            for name, (low, high) in zip(names, itertools.pairwise(edges), strict=True)
        },
        "lengths": length_figures(by_length),
    }
    return figures | ({"sample": {"rows": sampled, "of": of}} if is_sample else {})


def text_figures(tally: RowTally, found: Sequence[PartScan], *, is_whole: bool = True) -> dict[str, Any]:
    """Figures of texts; of a sample those that a sample can tell."""
    sampled = ["\n".join(text for _, text in measure.pieces_of(s.parsed())) for part in found for s in part.sample]
    figures: dict[str, Any] = {
        "characters_by": {
            "row": tally.lengths.figures(),
            "roles": {role: lengths.figures() for role, lengths in tally.by_role.items()},
            "turns": {str(turn): lengths.figures() for turn, lengths in sorted(tally.by_turn.items())},
        },
        "languages": dict(zip(texts.LANGUAGES, tally.languages.tolist(), strict=True)),
        "scripts": {
            name: {"characters": int(count)} for name, count in zip(texts.SCRIPTS, tally.scripts, strict=True) if count
        },
        "turns": {str(turns): count for turns, count in sorted(tally.turns.items())},
        "openings": tally.openings.top(NUM_TOP),
        "openings_missed": tally.openings.missed,
        "ngrams": measure.repeated(sampled, NUM_TOP),
        "ngram_rows": len(sampled),
        "systems": {
            "rows": tally.rows_with_system,
            "different": len(tally.systems.counts),
            "top": tally.systems.top(NUM_TOP, 1),
        },
        "tools": {"rows": tally.rows_with_tools, "calls": tally.calls, "top": tally.tools.top(NUM_TOP, 1)},
        "reasoning": tally.reasoning,
        "rows_with_control": tally.rows_with_control,
        "extra_keys": dict(tally.extra_keys.most_common(NUM_TOP)),
        "text_rows": tally.kept,
    }
    if tally.longer:
        figures["pairs"] = {
            "pairs": tally.kept,
            "longer": dict(tally.longer),
            "margins": tally.margins.figures(),
            "ratios": {str(k): tally.ratios[k] for k in range(-8, 9)},
            "similarity": tally.similarity.tolist(),
        }
    if is_whole:
        figures["duplicates"] = measure.duplicates(tally)
    return figures


def count_figures(tokens: TokenTally, known: Vocabulary, kind: str) -> dict[str, Any]:
    """Figures of tokens by script, role, turn and id."""
    figures: dict[str, Any] = {
        "tokens_by": {
            "sequence": tokens.lengths.figures(),
            "roles": {role: lengths.figures() for role, lengths in tokens.by_role.items()},
            "turns": {str(turn): lengths.figures() for turn, lengths in sorted(tokens.by_turn.items())},
            **({"pair": {name: lengths.figures() for name, lengths in tokens.pairs.items()}} if kind == "pair" else {}),
        },
        "trained_shares": tokens.shares.tolist(),
        "token_scripts": _script_figures(tokens),
        "vocabulary": _vocabulary(tokens, known),
    }
    return figures


def _script_figures(tokens: TokenTally) -> dict[str, dict[str, Any]]:
    """For each script its tokens, characters and bytes, and how many of these one token holds."""
    found = {}
    for name, (count, characters, num_bytes) in zip((*texts.SCRIPTS, "control"), tokens.scripts.tolist(), strict=True):
        if count:
            found[name] = {
                "tokens": count,
                "share": count / max(tokens.tokens, 1),
                "characters_per_token": characters / count,
                "bytes_per_token": num_bytes / count,
            }
    return found


def _vocabulary(tokens: TokenTally, known: Vocabulary) -> dict[str, Any]:
    """Use of the vocabulary: ids seen and never seen, how many of the most frequent make up half of all, the top, control."""
    counts = tokens.vocabulary if len(tokens.vocabulary) else np.zeros(known.size, np.int64)
    order = np.argsort(-counts, kind="stable")
    reached = np.cumsum(counts[order]) / max(1, counts.sum())
    never = np.flatnonzero((counts == 0) & ~known.control)

    def record(id: int) -> dict[str, Any]:
        return {"id": id, "text": known.text(id), "count": int(counts[id])}

    return {
        "size": known.size,
        "counted": int(counts.sum()),
        "seen": int((counts > 0).sum()),
        "never": len(never),
        "never_ids": [{"id": id, "text": known.text(id)} for id in never[:60].tolist()],
        "cover": {str(share): int(np.searchsorted(reached, share / 100) + 1) for share in (50, 90, 99)},
        "top": [record(int(id)) for id in order[:NUM_TOP] if counts[id]],
        "control": [record(int(id)) for id in np.flatnonzero(known.control)],
        "by_rank": [int(counts[order[rank]]) for rank in _ranks(known.size)],
        "ranks": [rank + 1 for rank in _ranks(known.size)],
    }


def _ranks(size: int) -> list[int]:
    """Ranks for a curve on a logarithmic axis, from 0."""
    return sorted({min(size, round(2 ** (k / 4))) - 1 for k in range(4 * (size.bit_length() + 1))}) if size else []


def cut_lines(lengths: Lengths, kind: str, limits: Sequence[int], tried: int = PACKED_FOR_CUTS) -> list[dict[str, Any]]:
    """What each length limit would cost: sequences and tokens beyond it, and padding, alone in a line or packed.

    `packed_fill` is that of the packer on at most `tried` sequences, longer ones cut (pairs are not packed: None).
    """
    values, counts = lengths.arrays()
    if not len(values):
        return []
    number, tokens = int(counts.sum()), int((values * counts).sum())
    found = []
    for limit in limits:
        cut = np.minimum(values, limit)
        kept = int((cut * counts).sum())
        longer = values > limit
        found.append(
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
    return found


def _packed_fill(lengths: np.ndarray, counts: np.ndarray, limit: int, tried: int) -> float:
    lengths, counts = lengths[lengths > 0], counts[lengths > 0]
    total = int(counts.sum())
    at = np.linspace(0, total - 1, min(total, tried)).astype(np.int64)
    some = lengths[np.searchsorted(np.cumsum(counts), at, "right")]
    return float(some.sum() / sum(bucket for bucket, _ in pack(some, buckets_for(limit))))


def set_aside(
    left_out: Mapping[str, int], examples: Mapping[str, list[dict[str, Any]]], num_rows: int
) -> list[dict[str, Any]]:
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
