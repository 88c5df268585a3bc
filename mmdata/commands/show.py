"""`mm show`: print samples of a packed dataset or rows of a file as the model sees them; marks trained tokens."""

import sys
from collections.abc import Callable, Iterable
from itertools import groupby, islice
from pathlib import Path
from typing import Annotated, Any

import typer

from mmdata.commands.options import TokenizerDir, is_dataset, tokenizer_dir
from mmdata.commands.terminal import (
    ignored_keys,
    json_text,
    next_command,
    print_json,
    print_styled,
    result,
    same_command,
    say,
)
from mmdata.errors import UsageError
from mmdata.io.options import ReadOptions
from mmdata.options import Option

TRAINED_LOOK = "green, or between ⟦ and ⟧ where there is no colour"
SEQUENCES = (  # keys of the ids and of the loss mask in a sample's record (no mask: not trained on), and title
    ("input_ids", "loss_mask", ""),
    ("prompt_ids", "", "prompt"),
    ("chosen_ids", "chosen_mask", "chosen"),
    ("rejected_ids", "rejected_mask", "rejected"),
)


def show(
    path: Annotated[
        Path, typer.Argument(metavar="DIR|FILE", help="Packed dataset, or a file of rows to see as it would be packed.")
    ],
    index: Annotated[
        int | None,
        Option("Number of the sample (a pack or a pair), or of the row of a file, from 0.", least=0, default_text="0"),
    ] = None,
    split: Annotated[str, Option("Split of the dataset.", choices=("train", "val", "all"))] = "train",
    ids: Annotated[bool, Option("Show the token ids too.")] = False,
    tokenizer: TokenizerDir = None,
    max_len: Annotated[int, Option("For a file: longest sequence in tokens.", least=8, most=2**31 - 1)] = 1024,
    *,
    read: ReadOptions,
    as_json: Annotated[
        bool,
        Option("Print one JSON line per source row, in source order, with ids and loss mask.", flag="--json"),
    ] = False,
) -> None:
    """Show a sample decoded, as the model sees it, with the trained tokens in green.

    Example: mm show shards/sft_512 --index 3    mm show shards/dpo --split all --json
    """
    if is_dataset(path):
        show_dataset(path, index, split, ids, as_json)
    else:
        show_file(path, read, index or 0, tokenizer_dir(tokenizer), max_len, ids, as_json)


def show_dataset(directory: Path, index: int | None, split: str, with_ids: bool, as_json: bool) -> None:
    """Print a sample of a packed dataset, with the file and line of each of its sequences. Raise UsageError if there is
    none. index: from 0; None is 0. split: "all" stands for "train". as_json: print the sample as JSON, without an index
    every source row of the split as a JSON line."""
    from mmdata.io.lines import place_of
    from mmdata.shards.dataset import open_dataset, sample_rows, source_rows
    from mmdata.tokenizer.tokenizer import Tokenizer

    dataset = open_dataset(directory)
    if as_json and index is None:
        for record in source_rows(dataset, split):
            sys.stdout.write(json_text(record) + "\n")
        sys.stdout.flush()
        return
    name = "train" if split == "all" else split
    number = index or 0
    num_samples = dataset.split(name).num_samples()
    try:
        records = sample_rows(dataset, name, number)
    except IndexError:
        message = f"{directory}: --index {number}, but {name} has {num_samples:,} samples"
        raise UsageError(message, "count from 0") from None
    if as_json:
        print_json(records)
        return
    decode = Tokenizer.load(dataset.tokenizer_dir).decode
    for record in records:
        result(place_of(record["file"], record["line"], dataset.manifest.arguments.reading))
        for ids_key, mask_key, title in SEQUENCES:
            if ids_key in record:
                ids = record[ids_key]
                print_segments(decoded(decode, ids, record.get(mask_key) or [0] * len(ids)), title)
                if with_ids:
                    result(f"ids: {' '.join(map(str, ids))}")
    say(f"sample {number} of {num_samples:,} in {name}; trained tokens are {TRAINED_LOOK}")
    if number + 1 < num_samples:
        next_command(same_command("--index", add=f"--index {number + 1}"))


def show_file(
    path: Path, read: ReadOptions, index: int, tokenizer: Path, max_len: int, with_ids: bool, as_json: bool
) -> None:
    """Print row number `index` of a file as it would be packed, or why it would be left out, and its ignored keys.
    Raise UsageError if the file has fewer rows. tokenizer: its directory. max_len: longest sequence in tokens."""
    from mmdata.encode.encoder import RowEncoder, preview
    from mmdata.encode.rows import LEFT_OUT, REASONS, Columns, find_kind
    from mmdata.io.lines import iter_lines, place_of
    from mmdata.shards.dataset import sequence_records
    from mmdata.tokenizer.tokenizer import Tokenizer

    line = next(islice(iter_lines(path, options=read), index, None), None)
    if line is None:
        raise UsageError(f"{path}: --index {index}, but it has fewer rows", "count from 0")
    kind = find_kind(path, read=read)
    encoder = RowEncoder(Tokenizer.load(tokenizer), max_len=max_len, columns=Columns.parse(read.mapping))
    row = preview(line.raw, encoder, kind=kind)
    place: dict[str, Any] = {"file": str(path), "line": line.number}
    if row.bad:
        if as_json:
            print_json({**place, "reason": row.bad.reason, "detail": row.bad.detail})
            return
        result(f"{place_of(path, line.number, read)} would be left out: {row.bad}")
        say(f"fix: {REASONS[row.bad.reason]}")
    else:
        records = sequence_records(row.encoded.sequences)
        if as_json:
            print_json([{**place, **record} for record in records])
            return
        cut = "".join(f", {count:,} cut: {reason}" for reason, count in row.encoded.cut.items())
        result(f"{place_of(path, line.number, read)}: {row.encoded.num_tokens:,} tokens{cut}")
        for record in records if with_ids else ():
            for name, values in record.items():
                result(f"{name}: {' '.join(map(str, values))}")
    titles = ("chosen", "rejected") if kind == "pair" else [""] * len(row.segments)
    for segments, title in zip(row.segments, titles, strict=False):
        print_segments(((segment.text, segment.is_trained) for segment in segments), title)
    for reason in row.encoded.not_written:
        result(f"the chat template leaves out: {reason} ({LEFT_OUT[reason]})")
    for ignored in ignored_keys(row.encoded.extra_keys):
        result(ignored)
    say(f"trained tokens are {TRAINED_LOOK}")


def decoded(decode: Callable[[list[int]], str], ids: list[int], mask: list[int]) -> Iterable[tuple[str, bool]]:
    """Split ids where the loss mask changes; yield the text of each run of tokens and whether it is trained on."""
    for is_trained, run in groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1]):
        yield decode([token for token, _ in run]), bool(is_trained)


def print_segments(segments: Iterable[tuple[str, bool]], title: str) -> None:
    """Print segments (text, is trained) after a bold title, unless it is empty; trained ones are green, or between ⟦
    and ⟧ without colour."""
    pieces = [(f"{title}: ", "bold", f"{title}: ")] if title else []
    for is_trained, run in groupby(segments, key=lambda segment: segment[1]):
        text = "".join(text for text, _ in run)
        pieces.append((text, "green", f"⟦{text}⟧") if is_trained else (text, "", text))
    print_styled(pieces)
