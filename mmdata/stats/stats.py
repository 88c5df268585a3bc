"""Figures for reports: a packed dataset or a jsonl file in, plain dictionaries out, the same for terminal, JSON and HTML.

A dataset's own counts (stats.json, manifest) are taken as they are; its tokens are counted in its shards and its texts in
its inputs, or, where those are gone or have changed, in its shards again, decoded. A file costs one pass, about 15 MB a
second of one core.
"""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmdata.encode import rows
from mmdata.encode.encoder import RowEncoder
from mmdata.errors import InputError
from mmdata.io.arrow import read_arrow
from mmdata.pack.buckets import BUCKETS
from mmdata.shards import dataset as shards
from mmdata.shards.pairs import make_loader
from mmdata.stats import measure, scan
from mmdata.stats.decoded import encoded_at
from mmdata.stats.figures import (
    BATCH_TOKENS,
    PACKED_FOR_CUTS,
    count_figures,
    cut_lines,
    set_aside,
    text_figures,
    token_figures,
)
from mmdata.stats.measure import RowTally
from mmdata.stats.report.page import percent
from mmdata.stats.samples import records
from mmdata.stats.scan import UNCUT, PartScan, Shown
from mmdata.stats.tally import Lengths
from mmdata.stats.token_tally import TokenTally, Vocabulary
from mmdata.stats.warnings import warning, warnings
from mmdata.tokenizer import text
from mmdata.tokenizer.tokenizer import Tokenizer

Progress = Callable[[int, int], None]
NUM_RANDOM = 12  # samples for show
QUICK_BYTES = (2**17, 2**20)  # least and most of the rows that a quick look at a dataset reads …
QUICK_PARTS = 3  # that rows for show are taken from then
QUICK_SHARE = 1 / 2000  # … and what lies between: what `mm pack` can spend on its report


@dataclass(slots=True)
class Measured:
    """A path's figures, rows for show, and a hash of what each row says (empty where texts were not all read)."""

    path: Path
    figures: dict[str, Any]
    samples: list[dict[str, Any]] = field(default_factory=list)
    hashes: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))


def dataset_stats(directory: Path) -> dict[str, Any]:
    """The figures `mm pack` left in stats.json; DatasetError when the dataset is missing or damaged."""
    return _packers_figures(shards.open_dataset(directory))


def _packers_figures(dataset: shards.Dataset) -> dict[str, Any]:
    path = dataset.dir / "stats.json"
    entry = next(file for file in dataset.manifest["files"] if file["path"] == "stats.json")
    shards.check_size(path, entry["bytes"], dataset.dir)
    return {"path": str(dataset.dir), **json.loads(path.read_bytes())}


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
        figures |= token_figures(tokens, found, characters)
    figures |= text_figures(tally, found)
    if known:
        figures |= count_figures(tokens, known, kind)
        figures["cuts"] = cut_lines(tokens.lengths, kind, [*BUCKETS])
        figures["epoch"] = {
            "batch_tokens": BATCH_TOKENS[kind],
            "steps": -(-figures["tokens"] // BATCH_TOKENS[kind]),
        }
    figures["set_aside"] = set_aside(tally.left_out, tally.examples, tally.rows)
    figures["warnings"] = warnings(figures)
    encoder = RowEncoder(known.tokenizer, max_len=UNCUT) if known else None
    return Measured(path, figures, records(_chosen(found), known, encoder), _all(tally.hashes))


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

    figures["texts_from"] says where texts were read: "inputs", or "shards", decoded, where those are gone or have changed.
    DatasetError when the dataset is missing or damaged. progress counts bytes of the inputs.
    """
    dataset = shards.open_dataset(directory)
    figures = _packers_figures(dataset)
    known = Vocabulary(Tokenizer.load(dataset.tokenizer_dir))
    num_bytes = sum(entry["bytes"] for entry in dataset.manifest["inputs"])
    share = _quick_share(num_bytes) if is_quick else 1.0
    tokens = scan.scan_shards(dataset, known, share=share, workers=workers)
    found, is_decoded = _scan_rows(dataset, known, is_quick, share, workers, losses, progress)
    tally, _ = _merged(found)
    figures |= {"bytes": num_bytes, "texts_from": "shards" if is_decoded else "inputs"}
    if tally.kept < figures["kept"] and is_quick:
        figures["sample"] = {"rows": tally.kept, "of": figures["kept"], "tokens": tokens.tokens}
    figures |= text_figures(tally, found, is_whole=not is_quick)
    if is_decoded:  # what no id tells
        del figures["rows_with_control"], figures["extra_keys"]
    if is_quick:
        figures["duplicates"] = _line_duplicates(dataset)
    figures |= count_figures(tokens, known, dataset.kind)
    lengths = _add_lengths(figures, dataset)
    limits = [b for b in dict.fromkeys([*BUCKETS, dataset.max_len]) if b <= dataset.max_len]
    figures["cuts"] = cut_lines(lengths, dataset.kind, limits, PACKED_FOR_CUTS // (100 if is_quick else 1))
    figures["sources"] = _sources(dataset, found if not is_quick else [])
    batch_tokens = BATCH_TOKENS[dataset.kind]
    steps = make_loader([dataset], batch_tokens=batch_tokens, seed=0).steps_per_epoch
    figures["epoch"] = {"batch_tokens": batch_tokens, "steps": steps}
    figures["set_aside"] = set_aside(figures["left_out"], _rejected(dataset), figures["rows"])
    figures["warnings"] = warnings(figures)
    hashes = np.empty(0, np.uint64) if is_quick else _all(tally.hashes)
    shown_from = found[:: -(-len(found) // QUICK_PARTS)] if is_quick else found
    return Measured(directory, figures, _packed_records(dataset, _chosen(shown_from), known), hashes)


def _quick_share(num_bytes: int) -> float:
    """The share of rows and tokens that a quick look reads."""
    return min(1.0, min(max(num_bytes * QUICK_SHARE, QUICK_BYTES[0]), QUICK_BYTES[1]) / max(num_bytes, 1))


def _scan_rows(
    dataset: shards.Dataset,
    known: Vocabulary,
    is_quick: bool,
    share: float,
    workers: int,
    losses: Mapping[str, Mapping[int, float]] | None,
    progress: Progress | None,
) -> tuple[list[PartScan], bool]:
    """Rows measured from the inputs or, where these are gone or have changed, decoded from the shards; whether they were."""
    if is_quick:
        found = scan.scan_some(_inputs(dataset), dataset, share)
    else:
        found = _scan_inputs(dataset, workers, losses, progress)
    if found:
        return found, False
    wanted = _wanted(losses)
    return scan.scan_decoded(dataset, known, share=share, workers=workers, wanted=wanted, progress=progress), True


def _add_lengths(figures: dict[str, Any], dataset: shards.Dataset) -> Lengths:
    """Add the lengths of all sequences and of those in each bucket; gives the former."""
    by_bucket, every = _sequence_lengths(dataset), Lengths()
    for one in by_bucket.values():
        every.merge(one)
    figures["tokens_by"]["sequence"] = every.figures()
    figures["tokens_by"]["buckets"] = {str(bucket): one.figures() for bucket, one in by_bucket.items()}
    return every


def _packed_records(dataset: shards.Dataset, chosen: Sequence[Shown], known: Vocabulary) -> list[dict[str, Any]]:
    """Rows for show with the ids that stand in the shards."""
    encoded = encoded_at(dataset, [(shown.file, shown.line) for shown in chosen if not shown.encoded])
    whole = [
        shown if shown.encoded else replace(shown, encoded=encoded.get((shown.file, shown.line))) for shown in chosen
    ]
    return records(whole, known)


def _scan_inputs(
    dataset: shards.Dataset, workers: int, losses: Mapping[str, Mapping[int, float]] | None, progress: Progress | None
) -> list[PartScan]:
    """Measure the inputs; nothing where one is gone or has changed."""
    paths = [path for path in _inputs(dataset) if path]
    if len(paths) < len(dataset.inputs):
        return []
    return scan.scan_files(
        paths,
        dataset.kind,
        None,
        workers=workers,
        wanted=_wanted(losses),
        left_out=_left_out_lines(dataset),
        sha256s=[entry["sha256"] for entry in dataset.manifest["inputs"]],
        progress=progress,
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


def _line_duplicates(dataset: shards.Dataset) -> dict[str, Any]:
    """Exact repeats by the hash of each line that the sources hold."""
    hashes = [
        np.ascontiguousarray(shards.open_sources(dataset, part["part"])["sha"]).view(np.uint64).reshape(-1)
        for part in dataset.manifest["parts"]
        if part["kept"]
    ]
    ordered = np.sort(_all(hashes))
    repeats = int((ordered[1:] == ordered[:-1]).sum())
    return {"rows": len(ordered), "exact": repeats, "near": None, "rows_compared": 0, "near_from": None}


def _sequence_lengths(dataset: shards.Dataset) -> dict[int, Lengths]:
    """Lengths of all sequences (of a pair: its longer side) by the bucket they stand in, from the shards' own columns."""
    found: dict[int, Lengths] = {}
    for entry in dataset.manifest["shards"]:
        lengths = found.setdefault(entry["bucket"], Lengths())
        for batch in dataset.open_shard(entry).batches:
            if dataset.kind == "pair":
                sides = np.maximum(batch["chosen"].lengths(), batch["rejected"].lengths())
                lengths.add((batch["prompt"].lengths() + sides).astype(np.int64))
            else:
                lengths.add(batch["doc_len"].values.astype(np.int64))
    return dict(sorted(found.items()))


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
    languages = sum((part.rows.languages for part in parts), np.zeros(len(text.LANGUAGES), np.int64))
    return {
        "languages": dict(zip(text.LANGUAGES, languages.tolist(), strict=True)),
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


def _chosen(found: Sequence[PartScan]) -> list[Shown]:
    """Rows for show: drawn evenly from the sample, then the longest, the shortest, those of highest loss."""
    sample = [shown for part in found for shown in part.sample]
    at = sorted({i * (len(sample) - 1) // (NUM_RANDOM - 1) for i in range(NUM_RANDOM)}) if sample else []
    longest = sorted((s for part in found for s in part.longest), key=lambda s: -s.characters)
    shortest = sorted((s for part in found for s in part.shortest), key=lambda s: s.characters)
    wanted = sorted((s for part in found for s in part.wanted), key=lambda s: -(s.nll or 0))
    number = scan.NUM_EXTREMES
    chosen = [(sample[i], "random") for i in at]
    chosen += [(s, "longest") for s in longest[:number]] + [(s, "shortest") for s in shortest[:number]]
    return [replace(shown, why=why) for shown, why in chosen] + wanted


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
