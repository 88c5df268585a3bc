"""Rows, messages and packed samples as polars LazyFrames, for notebooks and scripts (docs/frames.md).

Nothing is read before a frame is collected. Then only the columns that the query needs are computed, part by part, and
filters are applied to each part at once, so that memory holds one part and the result.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
from polars.io.plugins import register_io_source

from mmdata.encode.rows import BadRow, find_kind, parse_row
from mmdata.io.workers import run_jobs
from mmdata.pack.filter.features import COLUMNS, MESSAGE_COLUMNS, TOKENS, message_frame, schema
from mmdata.pack.filter.frames import PartColumns, RowReader, grouped, iter_rows, token_columns
from mmdata.pack.inputs import plan
from mmdata.pack.part import Part, batches
from mmdata.shards.columns import read_back
from mmdata.shards.dataset import Dataset, PartRows, open_dataset, open_sources
from mmdata.shards.manifest import PartRecord
from mmdata.stats.decoded import RowDecoder
from mmdata.stats.tokens import Vocabulary
from mmdata.tokenizer.tokenizer import Tokenizer

PART_BYTES = 4 * 2**20  # of a file that are read at once
DECODED_ROWS = 2**11  # rows decoded from shards at once
SAMPLE_COLUMNS = {
    "split": (pl.Enum(("train", "val")), "train or val"),
    "bucket": (pl.Int64, "padded length in tokens"),
    "part": (pl.Int64, "number of the part of the inputs"),
    "sample": (pl.Int64, "number of the sample in its shard, from 0"),
    "sequences": (pl.Int64, "conversations, or documents and pieces of documents; 1 for a pair"),
    "tokens": (pl.Int64, "tokens; the prompt of a pair counts once"),
    "trained_tokens": (pl.Int64, "tokens that are trained on"),
    "padding": (pl.Int64, "positions without a token; a pair has two sides of the bucket's length"),
}
Names = Sequence[str]


def rows(path: str | Path, *, tokenizer: str | Path | None = None, workers: int = 1) -> pl.LazyFrame:
    """Return the usable rows of a jsonl file or packed dataset with the columns of `features.COLUMNS`.

    tokenizer: directory, for the columns of tokens of a file; those of a dataset are read from its shards, its texts
    from its inputs or, if one is missing or has changed, also from the shards. workers: processes that read a file when
    a column needs all rows. Raises InputError if the file has no usable row, DatasetError if the dataset is damaged.
    Columns of near duplicates need the package rensa.
    """
    path = Path(path)
    if path.is_dir():
        return _lazy(dict(schema(COLUMNS)), partial(_rows_of_dataset, open_dataset(path)))
    kind, directory = find_kind(path), Path(tokenizer) if tokenizer else None
    run = partial(run_jobs, workers=workers)

    def read(names: Names) -> Iterator[pl.DataFrame]:
        return iter_rows(RowReader(kind, tuple(names), directory), plan([path], PART_BYTES)[1], run)

    known = [name for name, column in COLUMNS.items() if directory or column.maker != TOKENS]
    return _lazy(dict(schema(known)), read)


def messages(path: str | Path) -> pl.LazyFrame:
    """Return the messages of a jsonl file's usable rows, with `features.MESSAGE_COLUMNS`. Documents are messages of the
    role "document"; the prompt of a pair comes once. Raises InputError if the file has no usable row."""
    path = Path(path)
    kind = find_kind(path)

    def read(names: Names) -> Iterator[pl.DataFrame]:
        for part in plan([path], PART_BYTES)[1]:
            for lines in batches(part):
                usable, numbers = [], []
                for line in lines:
                    try:
                        usable.append(parse_row(line.raw, kind))
                    except BadRow:
                        continue
                    numbers.append(line.number)
                yield message_frame(usable, numbers).with_columns(file=pl.lit(str(path))).select(names)

    return _lazy({name: column.dtype for name, column in MESSAGE_COLUMNS.items()}, read)


def samples(dataset: str | Path) -> pl.LazyFrame:
    """Return the samples (packs or pairs) of a packed dataset with SAMPLE_COLUMNS. Raises DatasetError if it is missing
    or damaged."""
    opened = open_dataset(Path(dataset))
    types = {name: dtype for name, (dtype, _) in SAMPLE_COLUMNS.items()}

    def read(names: Names) -> Iterator[pl.DataFrame]:
        for entry in opened.shards():
            file = opened.open_shard(*entry.key)
            if opened.kind == "pair":
                prompt, *sides = (file.column(name).lengths() for name in ("prompt", "chosen", "rejected"))
                sequences, tokens = np.ones(len(prompt)), prompt + sum(sides)
                trained = file.column("n_chosen") + file.column("n_rejected")
                padding = 2 * entry.bucket - tokens - prompt
            else:
                tokens, sequences = file.column("ids").lengths(), file.column("doc_len").lengths()
                trained, padding = file.column("n_loss"), entry.bucket - tokens
            columns = {"sample": np.arange(len(tokens)), "sequences": sequences, "tokens": tokens}
            frame = pl.DataFrame({**columns, "trained_tokens": trained, "padding": padding})
            place = {"split": pl.lit(entry.split), "bucket": pl.lit(entry.bucket), "part": pl.lit(entry.part)}
            yield frame.with_columns(**place).select(list(types)).cast(types).select(names)  # type: ignore[arg-type]

    return _lazy(types, read)


def lazy_tables(types: pa.Schema, tables: Callable[[], Iterator[pa.Table]]) -> pl.LazyFrame:
    """Return a LazyFrame of Arrow tables with the columns `types`."""
    schema = pl.from_arrow(types.empty_table()).schema  # type: ignore[union-attr]
    return _lazy(dict(schema), lambda names: (pl.DataFrame(table.select(names)) for table in tables()))


def _lazy(
    types: dict[str, pl.DataType | type[pl.DataType]], read: Callable[[Names], Iterator[pl.DataFrame]]
) -> pl.LazyFrame:
    """Return a LazyFrame of the frames that `read` yields with the columns that a query names."""

    def source(
        names: list[str] | None, predicate: pl.Expr | None, most: int | None, _: int | None
    ) -> Iterator[pl.DataFrame]:
        left = most
        for frame in read(names if names is not None else list(types)):
            found = frame.head(left) if left is not None else frame
            left = None if left is None else left - len(found)
            yield found if predicate is None else found.filter(predicate)
            if left == 0:
                return

    return register_io_source(source, schema=pl.Schema(types))


# --- rows of a dataset


def _rows_of_dataset(dataset: Dataset, names: Names) -> Iterator[pl.DataFrame]:
    """Yield frames of the packed rows of a dataset."""
    reader = RowReader(dataset.kind, tuple(names))
    parts = [part for part in dataset.parts if part.kept]
    of_texts = [name for name in names if COLUMNS[name].maker not in ("", TOKENS)]
    of_texts += ["characters"] if "characters_per_token" in names and "characters" not in of_texts else []
    text_reader = RowReader(dataset.kind, tuple(of_texts))
    read = None
    if text_reader.names:
        entries, planned = _plan_of(dataset)
        is_same = entries == dataset.manifest.inputs
        read = (
            partial(_texts_of_inputs, text_reader, planned)
            if is_same
            else partial(_texts_of_shards, text_reader, dataset)
        )
    frames = (_of_part(dataset, part, read) for part in parts)
    yield from (frame.select(names) for frame in grouped(frames, reader.makers()))


def _plan_of(dataset: Dataset) -> tuple[list, list[Part]]:
    """Return the sizes and hashes of the dataset's inputs as they are now, and their parts; none if one is missing."""
    paths = [Path(path) for path in dataset.inputs]
    arguments = dataset.manifest.arguments
    are_here = all(path.is_file() for path in paths)
    return plan(paths, arguments.part_bytes, arguments.reading) if are_here else ([], [])


def _of_part(
    dataset: Dataset, part: PartRecord, read: Callable[[PartRecord, np.ndarray], pl.DataFrame] | None
) -> pl.DataFrame:
    """Return the columns of the packed rows of a part. read: returns those of their texts; None if none are needed."""
    sources = open_sources(dataset, part.part)
    stored = [read_back(dataset.open_shard(*entry.key), dataset.kind) for entry in part.shards]
    order = np.argsort(np.concatenate([ordinals for ordinals, _ in stored]), kind="stable")
    first = sources["first"].astype(np.int64)
    tokens, trained = (
        np.add.reduceat(np.concatenate(each)[order], first)
        for each in ([flat.lengths for _, flat in stored], [flat.num_loss for _, flat in stored])
    )
    lines = sources["line"].astype(np.int64)
    texts = read(part, lines) if read else pl.DataFrame(height=len(lines))
    characters = texts["characters"].to_numpy() if "characters" in texts.columns else np.zeros(len(lines))
    place = pl.DataFrame({"line": lines}).with_columns(file=pl.lit(dataset.inputs[int(sources["file"][0])]))
    return pl.concat([place, token_columns(tokens, trained, characters), texts], how="horizontal")


def _texts_of_inputs(reader: RowReader, planned: Sequence[Part], part: PartRecord, lines: np.ndarray) -> pl.DataFrame:
    """Return the columns of the rows of a part in these lines, read from its input."""
    found = PartColumns(reader)(planned[part.part], lambda *_: None)
    return found.filter(pl.col("line").is_in(lines)).drop("file", "line", "reason")


def _texts_of_shards(reader: RowReader, dataset: Dataset, part: PartRecord, lines: np.ndarray) -> pl.DataFrame:
    """Return the columns of all packed rows of a part, decoded from its shards."""
    rows = PartRows(dataset, part)
    decoder = RowDecoder(Vocabulary(Tokenizer.load(dataset.tokenizer_dir)), dataset.kind)
    decoded, columns = (decoder.row(rows.encoded(i)) for i in range(len(lines))), PartColumns(reader)
    frames = []
    while some := list(islice(decoded, DECODED_ROWS)):
        frames.append(columns.of_rows(some, []))
    return pl.concat(frames)
