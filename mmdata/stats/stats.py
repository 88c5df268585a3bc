"""Measure a jsonl file or a packed dataset. The results are plain dictionaries for the terminal, JSON and HTML reports.

What `mm pack` stored of a dataset (in stats.json and the manifest) is taken from there, tokens are counted in its
shards, and texts read from its inputs or, if one is missing or has changed, decoded from its shards. A jsonl file is
read once, at about 15 MB per second and core.
"""

import itertools
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import polars as pl

from mmdata.encode.encoder import RowEncoder
from mmdata.encode.rows import NOT_SELECTED, find_kind
from mmdata.encode.sequences import Sequences
from mmdata.errors import DatasetError, InputError
from mmdata.io.arrow import read_arrow
from mmdata.io.files import Progress, no_progress
from mmdata.io.lines import unit_of
from mmdata.io.options import DEFAULT_READING, ReadOptions
from mmdata.io.records import plain, read_record
from mmdata.options import options_of
from mmdata.pack.filter.select import select
from mmdata.pack.filter.where import Where
from mmdata.pack.options import SelectOptions
from mmdata.pack.packing import BUCKETS
from mmdata.shards.dataset import Dataset, open_dataset, open_sources
from mmdata.shards.manifest import DatasetStats, PartRecord
from mmdata.stats import frames, scan
from mmdata.stats.decoded import encoded_at
from mmdata.stats.figures import (
    PACKED_FOR_CUTS,
    count_figures,
    cut_lines,
    is_repeat,
    left_out_figures,
    loss_figures,
    repeats_of,
    text_figures,
    token_figures,
    warning,
    warnings,
)
from mmdata.stats.report.page import percent
from mmdata.stats.samples import records, row_frame
from mmdata.stats.scan import UNCUT, Losses, PartScan, SampleRow, ScanOptions, evenly
from mmdata.stats.tally import NUM_EXAMPLES, Figures, Tally, counts_of, length_figures
from mmdata.stats.tokens import Vocabulary
from mmdata.tokenizer.scripts import LANGUAGES
from mmdata.tokenizer.tokenizer import Tokenizer

NUM_RANDOM, NUM_RANDOM_QUICK = 60, 24  # rows of the random sample that are shown, and in the report of `mm pack`
NUM_TABLED = 2000  # rows of it whose columns the report shows
# `mm pack` measures only a share of the rows for its report, so that the report takes little of its time.
QUICK_BYTES = (2**19, 2**20)  # least and greatest size of this share, in bytes of the inputs
QUICK_SHARE = 1 / 2000  # the share itself, between these limits
QUICK_PARTS = 3  # about as many parts have their rows shown then


@dataclass(slots=True)
class Measured:
    """The result of measuring a file or dataset. path: of the file or directory. figures: numbers and warnings of the
    report. samples: records of the rows that it shows (`samples.records`). rows: a sample of the rows and their columns
    (`samples.row_frame`). tokenizer: its directory and hash, if tokens were counted. hashes: uint64 [rows], of each
    row's roles and texts; empty if not all texts were read."""

    path: Path
    figures: Figures
    samples: list[Figures] = field(default_factory=list)
    rows: pl.DataFrame = field(default_factory=pl.DataFrame)
    tokenizer: str = ""
    hashes: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))


def dataset_stats(dataset: Dataset) -> Figures:
    """Return the figures in a dataset's stats.json, and its "path". DatasetError if the file is missing or no such record."""
    path = dataset.dir / "stats.json"
    stored = read_record(path, DatasetStats, DatasetError, f"mm verify {dataset.dir} --repair")
    return {"path": str(dataset.dir), **plain(stored)}


# --- a jsonl file


def measure_file(
    path: Path,
    tokenizer_dir: Path | None = None,
    *,
    is_exact: bool = False,
    workers: int = 1,
    losses: pl.DataFrame | None = None,
    read: ReadOptions = DEFAULT_READING,
    where: str | None = None,
    progress: Progress = no_progress,
) -> Measured:
    """Measure a jsonl file: everything that its report shows. InputError if the file has no valid row, UsageError if
    `where` is not a condition.

    tokenizer_dir: None to count no tokens. is_exact: False counts the tokens of a large file in a sample of its rows
    (its size: `figures["sample"]`), extrapolated by the number of characters. losses: from `figures.read_losses`; the
    rows of highest loss are shown. where: a condition on the columns of rows (docs/frames.md), else counted as left
    out. progress: called with the bytes read and the size of the file.
    """
    kind = find_kind(path, read=read)
    options = ScanOptions(kind, tokenizer_dir, is_exact, _highest(losses), read=read)
    if where is not None:
        how = {name: getattr(read, name) for name, _ in options_of(ReadOptions)}
        selection = select([path], SelectOptions(where=where, tokenizer=tokenizer_dir, workers=workers, **how))
        left_out = selection.frame.filter(reason=NOT_SELECTED)["line"]
        options = replace(options, not_selected=frozenset(left_out), where=where)
    scans = scan.scan_files([path], options, workers=workers, progress=progress)
    tally = _merged(scans)
    left_out = tally.counters["left_out"]
    if not tally.sums["kept"]:
        reason = max(left_out, key=lambda name: left_out[name])
        first = tally.examples[reason][0]
        place = f"{unit_of(path, read)} {first['line']}: {reason}: {first['detail']}"
        named = ["--tokenizer", str(tokenizer_dir)] if tokenizer_dir else []
        command = shlex.join(["mm", "validate", str(path), *read.flags, *named])
        raise InputError(f"{path}: no row can be used; {place}", f"`{command}` lists the reasons")
    figures: Figures = {
        "path": str(path),
        "kind": kind,
        **({"where": where} if where is not None else {}),
        "rows": tally.sums["rows"],
        "kept": tally.sums["kept"],
        "left_out": dict(sorted(left_out.items())),
        "characters": tally.sums["characters"],
        "bytes": tally.sums["bytes"],
        "control_strings": dict(sorted(tally.counters["control_strings"].items())),
    }
    if lost := tally.counters["not_written"]:  # of the sample whose tokens are counted
        scale = tally.sums["kept"] / max(tally.sums["sampled_rows"], 1)
        figures["not_written"] = {reason: round(count * scale) for reason, count in sorted(lost.items())}
    vocabulary = Vocabulary(Tokenizer.load(tokenizer_dir)) if tokenizer_dir else None
    figures |= _figures_of_rows(tally, scans, vocabulary, kind)
    figures |= _loss_figures(tally, losses, [str(path)])
    examples = {reason: _with_units(rows, read) for reason, rows in tally.examples.items()}
    figures["set_aside"] = left_out_figures(left_out, examples, figures["rows"])
    figures["warnings"] = warnings(figures)
    encoder = RowEncoder(vocabulary.tokenizer, max_len=UNCUT) if vocabulary else None
    frame = row_frame(_random(scans, NUM_TABLED), kind, repeats_of(tally, [str(path)]), losses, tokenizer_dir)
    samples = _with_units(records(_chosen(scans), vocabulary, encoder), read)
    return Measured(path, figures, samples, frame, _named(vocabulary), hashes_of(tally))


def _with_units(rows: list[Figures], read: ReadOptions) -> list[Figures]:
    """Return records of rows with "unit", what their file's rows are called, where they are not lines."""
    units = {file: unit_of(Path(file), read) for file in {row["file"] for row in rows}}
    return [row if units[row["file"]] == "line" else {**row, "unit": units[row["file"]]} for row in rows]


def _figures_of_rows(tally: Tally, scans: Sequence[PartScan], vocabulary: Vocabulary | None, kind: str) -> Figures:
    """Return the figures of rows that are not packed, or are chosen from a dataset; of tokens only with a vocabulary."""
    figures = token_figures(tally) if vocabulary else {}
    figures |= text_figures(tally, scans)
    if vocabulary:
        figures |= count_figures(tally, vocabulary, kind)
        figures["cuts"] = cut_lines(counts_of(tally.frame("sequences", "tokens")["tokens"]), kind, [*BUCKETS])
    return figures


def _loss_figures(tally: Tally, losses: pl.DataFrame | None, inputs: Sequence[str]) -> Figures:
    return {} if losses is None else {"losses": loss_figures(tally, losses, inputs)}


# --- a packed dataset


def measure_dataset(
    directory: Path,
    *,
    is_quick: bool = False,
    workers: int = 1,
    losses: pl.DataFrame | None = None,
    where: str | None = None,
    progress: Progress = no_progress,
) -> Measured:
    """Measure a packed dataset: everything that its report shows. DatasetError if the dataset is missing or damaged.

    is_quick: take the counts that `mm pack` stored, and measure texts and tokens in a sample of the rows. losses: as in
    `measure_file`. where: a condition on the columns of rows; the figures are those of the rows for which it holds, and
    none are of packing. InputError if there are none. progress: called with the bytes of the inputs read so far and in
    all, or with rows if they are decoded from shards. `figures["texts_from"]` is "inputs" if texts were read from the inputs, and "shards" if they
    were decoded because an input is missing or has changed or, with is_quick, is compressed.
    """
    dataset = open_dataset(directory)
    vocabulary = Vocabulary(Tokenizer.load(dataset.tokenizer_dir))
    num_bytes = sum(entry.bytes for entry in dataset.manifest.inputs)
    least, most = QUICK_BYTES
    share = min(1.0, min(max(num_bytes * QUICK_SHARE, least), most) / max(num_bytes, 1)) if is_quick else 1.0
    parts = [part for part in dataset.parts if part.kept]
    rows = _rows_where(dataset, where) if where is not None else {p.part: evenly(p.kept, share) for p in parts}
    tokens = scan.scan_shards(dataset, vocabulary, rows if where is not None else None, share=share, workers=workers)
    wanted = _highest(losses)
    if is_quick:
        scans = scan.scan_some(_inputs(dataset), dataset, rows)
    else:
        scans = _scan_inputs(dataset, rows, workers, wanted, progress)
    is_decoded = not scans
    if is_decoded:
        workers = workers if share >= 1 else 1
        scans = scan.scan_decoded(dataset, vocabulary, rows, workers=workers, wanted=wanted, progress=progress)
    tally = _merged(scans)
    source = {"bytes": num_bytes, "texts_from": "shards" if is_decoded else "inputs"}
    if where is not None:
        tally.merge(tokens)
        figures = _chosen_figures(dataset, tally, where, source) | _figures_of_rows(
            tally, scans, vocabulary, dataset.kind
        )
    else:
        figures = {**dataset_stats(dataset), **source}
        if is_quick and tally.sums["kept"] < figures["kept"]:
            figures["sample"] = {"rows": tally.sums["kept"], "of": figures["kept"], "tokens": tokens.sums["tokens"]}
        figures |= text_figures(tally, scans, is_whole=not is_quick)
        if is_quick:
            figures["duplicates"] = _line_duplicates(dataset)
        figures |= count_figures(tokens, vocabulary, dataset.kind)
        figures |= _packed_figures(dataset, is_quick)
        figures["tokens_by"]["sequence"], figures["tokens_by"]["buckets"] = figures.pop("lengths_by")
        figures["sources"] = _sources(dataset, [] if is_quick else scans)
    if is_decoded:  # control strings in content and ignored keys cannot be recognized in token ids
        del figures["rows_with_control"], figures["extra_keys"]
    figures |= _loss_figures(tally, losses, dataset.inputs)
    figures["set_aside"] = left_out_figures(figures["left_out"], _rejected(dataset), figures["rows"])
    figures["warnings"] = warnings(figures)
    samples, frame = _shown(dataset, vocabulary, scans, repeats_of(tally, dataset.inputs), losses, is_quick)
    hashes = np.empty(0, np.uint64) if is_quick else hashes_of(tally)
    return Measured(directory, figures, samples, frame, _named(vocabulary), hashes)


def _chosen_figures(dataset: Dataset, tally: Tally, where: str, source: Figures) -> Figures:
    """Return the counts of rows chosen by a condition, in the order of the report. source: bytes and "texts_from"."""
    stored, kept = dataset_stats(dataset), tally.sums["kept"]
    return {
        **{name: stored[name] for name in ("path", "kind", "rows")},
        "left_out": {**stored["left_out"], NOT_SELECTED: stored["kept"] - kept},
        "kept": kept,
        "where": where,
        "characters": tally.sums["characters"],
        **source,
        "bytes": tally.sums["bytes"] or source["bytes"],
    }


def _shown(
    dataset: Dataset,
    vocabulary: Vocabulary,
    scans: Sequence[PartScan],
    repeats: pl.DataFrame,
    losses: pl.DataFrame | None,
    is_quick: bool,
) -> tuple[list[Figures], pl.DataFrame]:
    """Return the records of the rows that the report shows, and the frame of the sampled rows. repeats: from
    `figures.repeats_of`."""
    few = scans[:: -(-len(scans) // QUICK_PARTS)] if is_quick else scans
    chosen = _chosen(few, NUM_RANDOM_QUICK if is_quick else NUM_RANDOM)
    drawn = _random(few, NUM_TABLED // 10 if is_quick else NUM_TABLED)
    ids = encoded_at(dataset, [(row.file, row.line) for row in [*chosen, *drawn] if not row.encoded])
    chosen, drawn = ([_with_ids(row, ids) for row in some] for some in (chosen, drawn))
    frame = row_frame(drawn, dataset.kind, repeats, losses, None)
    return _with_units(records(chosen, vocabulary), dataset.manifest.arguments.reading), frame


def _with_ids(row: SampleRow, ids: Mapping[tuple[str, int], Sequences]) -> SampleRow:
    return row if row.encoded else replace(row, encoded=ids.get((row.file, row.line)))


def _rows_where(dataset: Dataset, where: str) -> dict[int, np.ndarray]:
    """Return, by part, the indices of the packed rows for which a condition holds."""
    condition = Where(where)
    parts = [part for part in dataset.parts if part.kept]
    frame = frames.rows(dataset.dir).select(condition.names or ["line"]).collect()
    holds = condition.holds(frame).to_numpy()
    if not holds.any():
        raise InputError(f"{dataset.dir}: --where {where!r} holds for no row", "mm stats DIR shows what the rows are")
    split = np.split(holds, np.cumsum([part.kept for part in parts])[:-1])
    return {part.part: np.flatnonzero(of_part) for part, of_part in zip(parts, split, strict=True)}


def _packed_figures(dataset: Dataset, is_quick: bool) -> Figures:
    """Return the figures of the sequences as they are packed: their lengths, in all and by bucket (that of a pair is its
    longer side's, prompt included), and what length limits would cut.
    """
    lengths = pl.DataFrame(schema={"bucket": pl.Int64, "value": pl.Int64})
    for entry in dataset.shards():
        for batch in dataset.open_shard(*entry.key).batches:
            if dataset.kind == "pair":
                sides = [batch[side].lengths() for side in ("chosen", "rejected")]
                values = batch["prompt"].lengths() + np.maximum(*sides)
            else:
                values = batch["doc_len"].values
            lengths.vstack(
                pl.select(bucket=pl.lit(entry.bucket, pl.Int64), value=pl.Series(values, dtype=pl.Int64)), in_place=True
            )
    counts = lengths.group_by("bucket", "value").agg(count=pl.len().cast(pl.Int64)).sort("bucket", "value")
    every = counts.select("value", "count")
    limits = [bucket for bucket in dict.fromkeys([*BUCKETS, dataset.max_len]) if bucket <= dataset.max_len]
    return {
        "lengths_by": (
            length_figures(every),
            {str(of[0]): length_figures(each) for of, each in counts.partition_by("bucket", as_dict=True).items()},
        ),
        "cuts": cut_lines(every, dataset.kind, limits, PACKED_FOR_CUTS // (100 if is_quick else 1)),
    }


def _scan_inputs(
    dataset: Dataset, rows: Mapping[int, np.ndarray], workers: int, wanted: Losses, progress: Progress
) -> list[PartScan]:
    """Count the rows of the inputs, except those left out; none if an input is missing or has changed. rows: indices of
    the packed rows to count, by part."""
    paths = [path for path in _inputs(dataset) if path]
    if len(paths) < len(dataset.inputs):
        return []
    left_out: dict[str, set[int]] = {}
    for part in dataset.parts:
        for record in _rejected_rows(dataset, part):
            left_out.setdefault(record["file"], set()).add(record["line"])
        if part.kept and len(rows[part.part]) < part.kept:
            sources = open_sources(dataset, part.part)
            lines = np.delete(sources["line"], rows[part.part])
            left_out.setdefault(dataset.inputs[int(sources["file"][0])], set()).update(lines.tolist())
    lines = {file: frozenset(numbers) for file, numbers in left_out.items()}
    sha256s = [entry.sha256 for entry in dataset.manifest.inputs]
    reading = dataset.manifest.arguments.reading
    options = ScanOptions(dataset.kind, wanted=wanted, left_out=lines, read=reading)
    return scan.scan_files(paths, options, workers=workers, sha256s=sha256s, progress=progress)


def _inputs(dataset: Dataset) -> list[Path | None]:
    """Return the path of each input, or None if the file is missing or its size differs from the manifest."""
    sizes = {Path(entry.path): entry.bytes for entry in dataset.manifest.inputs}
    return [path if path.is_file() and path.stat().st_size == size else None for path, size in sizes.items()]


def _rejected_rows(dataset: Dataset, part: PartRecord) -> Iterator[Figures]:
    """Yield the records of the rows of a part that packing left out (from rejected/); none if there is no such file."""
    path = dataset.dir / part.file_in("rejected")
    if path.exists():
        with path.open(encoding="utf-8") as file:
            yield from map(json.loads, file)


def _rejected(dataset: Dataset) -> dict[str, list[Figures]]:
    """Return records of the first NUM_EXAMPLES rows that packing left out for each reason: file, line, detail and raw
    (the beginning of the line)."""
    examples: dict[str, list[Figures]] = {}
    missing = {reason for part in dataset.parts for reason in part.left_out}
    for part in dataset.parts:
        for record in _rejected_rows(dataset, part) if missing & part.left_out.keys() else ():
            of_reason = examples.setdefault(record["reason"], [])
            if len(of_reason) < NUM_EXAMPLES:
                fields = {name: record[name] for name in ("file", "line", "detail")}
                of_reason.append({**fields, "raw": record["raw"][: scan.RAW_SHOWN]})
            if len(of_reason) == NUM_EXAMPLES:
                missing.discard(record["reason"])
            if not missing:
                break
    return {reason: _with_units(rows, dataset.manifest.arguments.reading) for reason, rows in examples.items()}


def _line_duplicates(dataset: Dataset) -> Figures:
    """Return the number of exact duplicates among the packed rows, by the hashes of lines that packing recorded."""
    parts = [part.part for part in dataset.parts if part.kept]
    sha256s = [np.ascontiguousarray(open_sources(dataset, part)["sha"]) for part in parts]
    hashes = pl.Series(np.concatenate([each.view(np.uint64).reshape(-1) for each in sha256s]))
    repeats = len(hashes) - hashes.n_unique()
    return {"rows": len(hashes), "exact": repeats, "near": None, "rows_compared": 0, "near_from": None}


def _sources(dataset: Dataset, scans: Sequence[PartScan]) -> list[Figures]:
    """Return figures of each input: rows, tokens, bytes and, if its texts were read, languages and exact duplicates.
    scans: of all rows, or empty."""
    names = {"kept": "rows", "tokens": "tokens", "loss_tokens": "loss_tokens"}
    sums = [dict.fromkeys(names, 0) for _ in dataset.inputs]
    for part in dataset.parts:
        if part.kept:
            of_input = sums[int(read_arrow(dataset.dir / part.file_in("sources")).column("file")[0])]
            for name, field in names.items():
                of_input[name] += sum(getattr(shard, field) for shard in part.shards)
    sources = []
    for number, path in enumerate(dataset.inputs):
        source: Figures = {}
        if parts := [part for part in scans if part.input == number]:
            tally = _merged(parts)
            languages = dict(tally.frame("rows", "language")["language"].value_counts().rows())
            source["languages"] = {name: languages.get(name, 0) for name in LANGUAGES}
            source["exact_duplicates"] = int(is_repeat(tally).sum())
        source |= {"path": path, "bytes": dataset.manifest.inputs[number].bytes, **sums[number]}
        sources.append(source)
    return sources


# --- both


def _named(vocabulary: Vocabulary | None) -> str:
    """Return the directory of a tokenizer and its hash; "" without one."""
    if vocabulary is None:
        return ""
    tokenizer = vocabulary.tokenizer
    return f"{tokenizer.dir.resolve()} ({tokenizer.vocab_size:,}, sha256 {tokenizer.sha256[:12]})"


def _merged(scans: Sequence[PartScan]) -> Tally:
    tally = Tally()
    for part in scans:
        tally.merge(part.tally)
    return tally


def hashes_of(tally: Tally) -> np.ndarray:
    """Return the hash of each row's roles and texts: uint64 [rows]."""
    return tally.frame("rows", "hash")["hash"].to_numpy()


def _highest(losses: pl.DataFrame | None) -> Losses:
    """Return the rows of highest loss, at most scan.NUM_EXTREMES, as {file: {line number: loss in nats per token}}."""
    if losses is None:
        return {}
    means = losses.select("file", "line", loss=pl.col("nll") / pl.col("tokens"))
    highest: dict[str, dict[int, float]] = {}
    for file, line, loss in means.sort("loss", "file", "line", descending=True).head(scan.NUM_EXTREMES).rows():
        highest.setdefault(file, {})[line] = loss
    return highest


def _random(scans: Sequence[PartScan], number: int) -> list[SampleRow]:
    """Return at most `number` of the rows of the sample, spread evenly over it."""
    rows = [row for part in scans for row in part.shown.get("random", ())]
    return [rows[i] for i in sorted({i * (len(rows) - 1) // (number - 1) for i in range(number)})] if rows else []


def _chosen(scans: Sequence[PartScan], num_random: int = NUM_RANDOM) -> list[SampleRow]:
    """Return the rows to show: random ones, then the longest, the shortest, and those of highest loss. A row may be chosen for several reasons."""
    longest, shortest, highest = (
        [row for part in scans for row in part.shown.get(why, ())] for why in ("longest", "shortest", "loss")
    )
    return [
        *_random(scans, num_random),
        *sorted(longest, key=lambda row: -row.characters)[: scan.NUM_EXTREMES],
        *sorted(shortest, key=lambda row: row.characters)[: scan.NUM_EXTREMES],
        *sorted(highest, key=lambda row: -(row.nll or 0)),
    ]


def contained(measured: Sequence[Measured]) -> list[Figures]:
    """Return a warning for each path that has at least 1 % of its rows (equal roles and texts), the share "exact", in
    common with another path. Paths without hashes are not compared."""
    shared = []
    for one, other in itertools.permutations(measured, 2):
        if len(one.hashes) and len(other.hashes):
            share = float(np.isin(one.hashes, other.hashes).mean())
            if share >= 0.01:
                values = {"share": percent(share), "one": one.path.name, "other": other.path.name}
                shared.append(warning("contained", **values) | {"exact": share})
    return shared
