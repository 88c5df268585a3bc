"""Figures for reports: a packed dataset or a jsonl file in, plain dictionaries out, the same for terminal, JSON and HTML.

A dataset's own counts (stats.json, manifest) are taken as they are; its tokens are counted in its shards and its texts in
its inputs, where those are still there unchanged. A file costs one pass, about 15 MB a second of one core.
"""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmdata import measure, rows, scan, shards, texts
from mmdata.arrow import read_arrow
from mmdata.buckets import BUCKETS, buckets_for
from mmdata.encode import RowEncoder
from mmdata.errors import InputError
from mmdata.measure import RowTally
from mmdata.packing import pack
from mmdata.pairs import make_loader
from mmdata.pipeline import length_figures
from mmdata.samples import records
from mmdata.scan import UNCUT, PartScan, Shown
from mmdata.tally import Lengths
from mmdata.token_tally import TokenTally, Vocabulary
from mmdata.tokenizer import Tokenizer

Progress = Callable[[int, int], None]
BATCH_TOKENS = {"document": 65_536, "conversation": 32_768, "pair": 16_384}  # of a step, the stages' defaults
PACKED_FOR_CUTS = 100_000  # sequences whose packing is tried for each cut line
NUM_RANDOM = 12  # samples for show
NUM_TOP = 20  # of any list
QUICK_BYTES = (2**17, 2**20)  # least and most of the rows that a quick look at a dataset reads …
QUICK_SHARE = 1 / 400  # … and what lies between: what `mm pack` can spend on its report


@dataclass(slots=True)
class Measured:
    """A path's figures, rows for show, and a hash of what each row says (empty where texts were not all read)."""

    path: Path
    figures: dict[str, Any]
    samples: list[dict[str, Any]] = field(default_factory=list)
    hashes: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))


def dataset_stats(directory: Path) -> dict[str, Any]:
    """The figures `mm pack` left in stats.json; DatasetError when the dataset is missing or damaged."""
    dataset = shards.open_dataset(directory)
    entry = next(file for file in dataset.manifest["files"] if file["path"] == "stats.json")
    shards.check_size(directory / "stats.json", entry["bytes"], directory)
    return {"path": str(directory), **json.loads((directory / "stats.json").read_bytes())}


def file_stats(path: Path, tokenizer_dir: Path | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """The figures of a jsonl file, every row tokenized where a tokenizer is given. Lengths are those of whole rows (of a
    pair's longer side), before any --max-len. progress counts bytes. InputError when no row can be used."""
    return measure_file(path, tokenizer_dir, is_exact=True, progress=progress).figures


def read_losses(path: Path) -> dict[str, dict[int, float]]:
    """Nats a token by file and line, from the JSON lines of `mm eval --per-sequence` (file, line, tokens, nll).

    InputError when it cannot be read or holds something else.
    """
    found: dict[str, dict[int, float]] = {}
    number = 0
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                number += 1
                record = json.loads(line)
                if record["tokens"]:
                    found.setdefault(record["file"], {})[int(record["line"])] = record["nll"] / record["tokens"]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}", "mm eval RUN --per-sequence FILE writes one") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} line {number}: no record with file, line, tokens and nll",
            "mm eval RUN --per-sequence FILE writes them",
        ) from error
    return found


# --- a jsonl file


def measure_file(
    path: Path,
    tokenizer_dir: Path | None = None,
    *,
    is_exact: bool = False,
    workers: int = 1,
    losses: Mapping[str, Mapping[int, float]] | None = None,
    progress: Progress | None = None,
) -> Measured:
    """Everything a report says about a jsonl file. Without `is_exact` the tokens of a large file are those of a sample of
    its rows, scaled by characters; `figures["sample"]` says so. losses: nats a token by file and line, rows to show."""
    kind = rows.find_kind(path)
    found = scan.scan_files(
        [path], kind, tokenizer_dir, is_exact=is_exact, workers=workers, wanted=_wanted(losses), progress=progress
    )
    tally, tokens = _merged(found)
    if not tally.kept:
        raise InputError(f"{path}: no row can be used", f"`mm validate {path}` lists the reasons")
    characters = sum(part.characters for part in found)
    figures: dict[str, Any] = {
        "path": str(path),
        "kind": kind,
        "rows": tally.rows,
        "kept": tally.kept,
        "left_out": dict(sorted(tally.left_out.items())),
        "characters": characters,
        "bytes": tally.num_bytes,
        "control_strings": dict(sorted(tally.control_strings.items())),
    }
    known = None
    if tokenizer_dir:
        known = Vocabulary(Tokenizer.load(tokenizer_dir))
        figures |= _token_figures(tokens, found, characters)
    figures |= _text_figures(tally, found)
    if known:
        figures |= _count_figures(tokens, known, kind)
        figures["cuts"] = cut_lines(tokens.lengths, kind, [*BUCKETS])
        figures["epoch"] = {
            "batch_tokens": BATCH_TOKENS[kind],
            "steps": -(-figures["tokens"] // BATCH_TOKENS[kind]),
        }
    figures["set_aside"] = _set_aside(tally.left_out, tally.examples, tally.rows)
    figures["warnings"] = warnings(figures)
    encoder = RowEncoder(known.tokenizer, max_len=UNCUT) if known else None
    return Measured(path, figures, records(_chosen(found), encoder, known), _all(tally.hashes))


def _token_figures(tokens: TokenTally, found: Sequence[PartScan], characters: int) -> dict[str, Any]:
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


# --- a packed dataset


def measure_dataset(
    directory: Path,
    *,
    is_quick: bool = False,
    workers: int = 1,
    losses: Mapping[str, Mapping[int, float]] | None = None,
    progress: Progress | None = None,
) -> Measured:
    """Everything a report says about a packed dataset; `is_quick`: its counts, and the rest from a sample of its rows.

    figures["texts_from"] says where texts were read: "inputs", "sample" of them, or "none" when they are gone or changed.
    DatasetError when the dataset is missing or damaged. progress counts bytes of the inputs.
    """
    figures = dataset_stats(directory)
    dataset = shards.open_dataset(directory)
    known = Vocabulary(Tokenizer.load(dataset.tokenizer_dir))
    inputs = _inputs(dataset)
    arguments = {name: dataset.manifest["arguments"][name] for name in ("era", "train_on", "seed")}
    encoder = RowEncoder(known.tokenizer, max_len=dataset.max_len, **arguments)
    if is_quick:
        num_bytes = max(1, sum(entry["bytes"] for entry in dataset.manifest["inputs"]))
        share = min(1.0, min(max(num_bytes * QUICK_SHARE, QUICK_BYTES[0]), QUICK_BYTES[1]) / num_bytes)
        tokens = scan.scan_shards(dataset, known, share=share)
        found = _quick_scan(dataset, inputs, share)
    else:
        tokens = scan.scan_shards(dataset, known, workers=workers)
        paths = [path for path in inputs if path]
        found = []
        if len(paths) == len(inputs):
            found = scan.scan_files(
                paths,
                dataset.kind,
                None,
                workers=workers,
                wanted=_wanted(losses),
                left_out=_left_out_lines(dataset),
                sha256s=[entry["sha256"] for entry in dataset.manifest["inputs"]],
                progress=progress,
            )
    tally, _ = _merged(found)
    figures["bytes"] = sum(entry["bytes"] for entry in dataset.manifest["inputs"])
    figures["texts_from"] = "none" if not found else "sample" if is_quick else "inputs"
    if tally.kept < figures["kept"] and is_quick:
        figures["sample"] = {"rows": tally.kept, "of": figures["kept"], "tokens": tokens.tokens}
    if found:
        figures |= _text_figures(tally, found, is_whole=not is_quick)
    if is_quick or not found:
        figures["duplicates"] = _line_duplicates(dataset)
    lengths = _sequence_lengths(dataset)
    figures |= _count_figures(tokens, known, dataset.kind)
    figures["tokens_by"]["sequence"] = lengths.figures()
    figures["cuts"] = cut_lines(
        lengths,
        dataset.kind,
        [b for b in dict.fromkeys([*BUCKETS, dataset.max_len]) if b <= dataset.max_len],
        PACKED_FOR_CUTS // (20 if is_quick else 1),
    )
    figures["sources"] = _sources(dataset, found if not is_quick else [])
    batch_tokens = BATCH_TOKENS[dataset.kind]
    steps = make_loader([dataset], batch_tokens=batch_tokens, seed=0).steps_per_epoch
    figures["epoch"] = {"batch_tokens": batch_tokens, "steps": steps}
    figures["set_aside"] = _set_aside(figures["left_out"], _rejected(dataset), figures["rows"])
    figures["warnings"] = warnings(figures)
    return Measured(
        directory,
        figures,
        records(_chosen(found), encoder, known),
        np.empty(0, np.uint64) if is_quick else _all(tally.hashes),
    )


def _inputs(dataset: shards.Dataset) -> list[Path | None]:
    """The inputs where they are still there with their size; None for one that is not."""
    found = []
    for entry in dataset.manifest["inputs"]:
        path = Path(entry["path"])
        found.append(path if path.is_file() and path.stat().st_size == entry["bytes"] else None)
    return found


def _left_out_lines(dataset: shards.Dataset) -> dict[str, frozenset[int]]:
    """The lines of each input that packing left out."""
    found: dict[str, set[int]] = {}
    for path in sorted((dataset.dir / "rejected").glob("part-*.jsonl")):
        with path.open(encoding="utf-8") as file:
            for line in file:
                record = json.loads(line)
                found.setdefault(record["file"], set()).add(record["line"])
    return {file: frozenset(lines) for file, lines in found.items()}


def _quick_scan(dataset: shards.Dataset, inputs: Sequence[Path | None], share: float) -> list[PartScan]:
    """Rows drawn from the dataset's sources and read from its inputs, a part each."""
    found = []
    for part in dataset.manifest["parts"]:
        if not part["kept"]:
            continue
        sources = shards.open_sources(dataset, part["part"])
        path = inputs[int(sources["file"][0])]
        if path is None or not rows.is_seekable(path):
            return []
        number = min(part["kept"], max(1, round(part["kept"] * share)))
        chosen = np.linspace(0, part["kept"] - 1, number).astype(np.int64)
        found.append(_read_rows(path, dataset.kind, sources, chosen))
    return found


def _read_rows(path: Path, kind: str, sources: Mapping[str, Any], chosen: np.ndarray) -> PartScan:
    """Measure single rows of a part, found by their offsets."""
    part = PartScan(int(sources["file"][0]), RowTally(), TokenTally())
    good, lines = [], []
    with path.open("rb") as file:
        for i in chosen.tolist():
            file.seek(int(sources["offset"][i]))
            raw = file.readline().rstrip(b"\r\n").removeprefix(b"\xef\xbb\xbf")
            try:
                good.append(rows.parse_row(raw, kind))
            except rows.BadRow:
                continue  # the file was changed, and kept its size
            lines.append((int(sources["line"][i]), raw))
    if good:
        lengths = part.rows.add(good, [raw for _, raw in lines]).tolist()
        shown = [
            Shown("random", str(path), line, raw, length)
            for (line, raw), length in zip(lines, lengths, strict=True)
            if len(raw) <= scan.RAW_KEPT
        ]
        by_length = sorted(shown, key=lambda one: one.characters)
        part.sample = shown
        part.shortest, part.longest = by_length[: scan.NUM_EXTREMES], by_length[-scan.NUM_EXTREMES :]
    return part


def _line_duplicates(dataset: shards.Dataset) -> dict[str, Any]:
    """Exact repeats by the hash of each line that the sources hold."""
    hashes = [
        np.ascontiguousarray(shards.open_sources(dataset, part["part"])["sha"]).view(np.uint64).reshape(-1)
        for part in dataset.manifest["parts"]
        if part["kept"]
    ]
    repeats = measure.is_repeat(_all(hashes))
    return {"rows": len(repeats), "exact": int(repeats.sum()), "near": None, "rows_compared": 0, "near_from": None}


def _sequence_lengths(dataset: shards.Dataset) -> Lengths:
    """Lengths of all sequences (of a pair: its longer side), from the shards' own columns."""
    found = Lengths()
    for entry in dataset.manifest["shards"]:
        for batch in dataset.open_shard(entry).batches:
            if dataset.kind == "pair":
                sides = np.maximum(batch["chosen"].lengths(), batch["rejected"].lengths())
                found.add((batch["prompt"].lengths() + sides).astype(np.int64))
            else:
                found.add(batch["doc_len"].values.astype(np.int64))
    return found


def _rejected(dataset: shards.Dataset) -> dict[str, list[dict[str, Any]]]:
    """The first rows set aside of each reason."""
    found: dict[str, list[dict[str, Any]]] = {}
    missing = {reason for part in dataset.manifest["parts"] for reason in part["left_out"]}
    for part in dataset.manifest["parts"]:
        path = dataset.dir / "rejected" / f"part-{part['part']:05d}.jsonl"
        if not missing & part["left_out"].keys() or not path.exists():
            continue
        with path.open(encoding="utf-8") as file:
            for line in file:
                record = json.loads(line)
                shown = found.setdefault(record["reason"], [])
                if len(shown) < measure.NUM_EXAMPLES:
                    kept = {name: record[name] for name in ("file", "line", "detail")}
                    shown.append({**kept, "raw": record["raw"][: measure.RAW_SHOWN]})
                    missing -= {record["reason"]} if len(shown) == measure.NUM_EXAMPLES else set()
                if not missing:
                    return found
    return found


def _sources(dataset: shards.Dataset, found: Sequence[PartScan]) -> list[dict[str, Any]]:
    """Figures of each input: rows and tokens by the manifest, texts where they were read."""
    file_of = {}
    for part in dataset.manifest["parts"]:
        if part["kept"]:
            file_of[part["part"]] = int(read_arrow(dataset.dir / shards.sources_path(part["part"])).column("file")[0])
    by_file = [_text_source(found, i) for i in range(len(dataset.inputs))]
    for number, source in enumerate(by_file):
        entries = [e for e in dataset.manifest["shards"] if file_of[e["part"]] == number]
        source["path"] = dataset.inputs[number]
        source["bytes"] = dataset.manifest["inputs"][number]["bytes"]
        source["kept"] = sum(entry["rows"] for entry in entries)
        source["tokens"] = sum(entry["tokens"] for entry in entries)
        source["loss_tokens"] = sum(entry["loss_tokens"] for entry in entries)
    return by_file


def _text_source(found: Sequence[PartScan], number: int) -> dict[str, Any]:
    parts = [part for part in found if part.input == number]
    if not parts:
        return {}
    languages = sum((part.rows.languages for part in parts), np.zeros(len(texts.LANGUAGES), np.int64))
    return {
        "languages": dict(zip(texts.LANGUAGES, languages.tolist(), strict=True)),
        "exact_duplicates": int(measure.is_repeat(_all([h for part in parts for h in part.rows.hashes])).sum()),
    }


# --- tallies -> figures


def _merged(found: Sequence[PartScan]) -> tuple[RowTally, TokenTally]:
    tally, tokens = RowTally(), TokenTally()
    for part in found:
        tally.merge(part.rows)
        tokens.merge(part.tokens)
    return tally, tokens


def _all(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.empty(0, np.uint64)


def _wanted(losses: Mapping[str, Mapping[int, float]] | None) -> dict[str, dict[int, float]]:
    """The lines of highest loss, by file."""
    every = ((loss, file, line) for file, lines in (losses or {}).items() for line, loss in lines.items())
    found: dict[str, dict[int, float]] = {}
    for loss, file, line in sorted(every, reverse=True)[: scan.NUM_EXTREMES]:
        found.setdefault(file, {})[line] = loss
    return found


def _text_figures(tally: RowTally, found: Sequence[PartScan], *, is_whole: bool = True) -> dict[str, Any]:
    """Figures of texts; of a sample those that a sample can tell."""
    sampled = [shown for part in found for shown in part.sample]
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
        "ngrams": measure.repeated([_text_of(shown) for shown in sampled], NUM_TOP),
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


def _text_of(shown: Shown) -> str:
    return "\n".join(text for _, text in measure.pieces_of(rows.parse_row(shown.raw)))


def _count_figures(tokens: TokenTally, known: Vocabulary, kind: str) -> dict[str, Any]:
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


def _set_aside(
    left_out: Mapping[str, int], examples: Mapping[str, list[dict[str, Any]]], num_rows: int
) -> list[dict[str, Any]]:
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


def _chosen(found: Sequence[PartScan]) -> list[Shown]:
    """Rows for show: drawn evenly from the sample, then the longest, the shortest, those of highest loss."""
    sample = [shown for part in found for shown in part.sample]
    at = np.unique(np.linspace(0, len(sample) - 1, NUM_RANDOM).astype(np.int64)) if sample else []
    longest = sorted((s for part in found for s in part.longest), key=lambda s: -s.characters)
    shortest = sorted((s for part in found for s in part.shortest), key=lambda s: s.characters)
    wanted = sorted((s for part in found for s in part.wanted), key=lambda s: -(s.nll or 0))
    number = scan.NUM_EXTREMES
    chosen = [(sample[i], "random") for i in at]
    chosen += [(s, "longest") for s in longest[:number]] + [(s, "shortest") for s in shortest[:number]]
    return [Shown(why, s.file, s.line, s.raw, s.characters) for s, why in chosen] + wanted


# --- in plain words

# Code -> sentence; values in percent stand as {…}. A report may translate the sentence.
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
    "one system": "{share} of the rows share one system prompt",
    "few val rows": "only {number} rows are held out for validation",
    "contained": "{share} of {one} is also in {other}",
}


def warnings(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a reader should know first, as {"code", "values", "text"}; in the order of WARNINGS."""
    return [warning(code, **values) for code, values in _found_warnings(figures)]


def warning(code: str, **values: Any) -> dict[str, Any]:
    """A warning with its English sentence."""
    return {"code": code, "values": values, "text": WARNINGS[code].format(**values)}


def percent(share: float) -> str:
    """A share as people read it: 31 %, 0.4 %."""
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def _found_warnings(figures: Mapping[str, Any]) -> Iterable[tuple[str, dict[str, Any]]]:
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
        yield "one opening", {"share": percent(top["count"] / figures["text_rows"]), "text": f"“{top['text']}”"}
    if "val_rows" in figures and figures["val_rows"] < 20 and kept > 200:
        yield "few val rows", {"number": figures["val_rows"]}


def _pair_warnings(pairs: Mapping[str, Any] | None) -> Iterable[tuple[str, dict[str, Any]]]:
    if not pairs or not pairs["pairs"]:
        return
    number, longer = pairs["pairs"], Counter(pairs["longer"])
    if longer["chosen by 3"] > 0.02 * number:
        share = percent(longer["chosen by 3"] / number)
        yield "chosen longer", {"share": share, "factor": measure.LONGER_BY}
    if longer["chosen"] > 0.6 * number:
        yield "length bias", {"share": percent(longer["chosen"] / number)}
    if sum(pairs["similarity"][9:]) > 0.01 * number:
        yield "alike", {"share": percent(sum(pairs["similarity"][9:]) / number)}


def contained(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """Warnings of what stands in several of these paths, from 1 % on, by what rows say."""
    found = []
    for one, other in itertools.permutations(measured, 2):
        if len(one.hashes) and len(other.hashes):
            share = measure.shared(one.hashes, other.hashes)
            if share >= 0.01:
                found.append(
                    warning("contained", share=percent(share), one=one.path.name, other=other.path.name)
                    | {"exact": share}
                )
    return found
