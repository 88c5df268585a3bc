"""Arrow files whose structure hypothesis draws, with hashes and counts in the manifest that fit, as a stranger may send them: what is
opened can be shown, counted and verified, and keeps the format's limits; anything else is refused by the name of the file."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest
import torch
from damage import SEED, refusal
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from pack_data import make_old, old_manifest
from test_records_and_shards import read_everything

from mmdata.io.files import info_of
from mmdata.shards.dataset import open_dataset
from mmdata.shards.pairs import make_loader
from mmdata.shards.verify import verify
from mmtrain.model.batch import to_device

if TYPE_CHECKING:
    from mmdata.pack.pipeline import PackResult

QUICK, SLOW, THOROUGH = 25, 250, 800  # examples: by default, with the slow tests, in make faults
FULL = THOROUGH if "FAULTS_SEED" in os.environ else SLOW
EXAMPLES = FULL if settings.get_current_profile_name() == "full" else QUICK
NUMBERS = [
    pa.uint8(),
    pa.uint16(),
    pa.uint32(),
    pa.uint64(),
    pa.int16(),
    pa.int32(),
    pa.int64(),
    pa.float32(),
    pa.float64(),
]
ITEMS = [
    *NUMBERS,
    pa.bool_(),
    pa.string(),
    pa.binary(),
    pa.binary(1),
    pa.binary(4),
    pa.binary(8),
    pa.timestamp("s"),
    pa.null(),
]
LISTS = [
    *map(pa.list_, ITEMS),
    pa.large_list(pa.uint16()),
    pa.list_(pa.list_(pa.uint16())),
    pa.list_(pa.uint16(), 4),
    pa.dictionary(pa.int32(), pa.uint16()),
    pa.struct([("a", pa.uint16())]),
]
PLACES = st.integers(0, 2**16)
VALUES = st.sampled_from(
    [0, 1, 2, 399, 400, 2**16 - 1, 2**16, 2**31, 2**32 - 5, 2**32 - 1, 2**63, 2**64 - 5, 2**64 - 1]
)
NAMES = st.integers(0, 7)  # of the columns, modulo their number
EDITS = st.one_of(
    st.tuples(st.just("cast"), NAMES, st.sampled_from([*ITEMS, *LISTS])),
    st.tuples(st.just("widen"), NAMES, st.just(0)),
    st.tuples(st.just("value"), NAMES, st.tuples(PLACES, PLACES, VALUES)),
    st.tuples(st.just("length"), NAMES, st.tuples(PLACES, st.integers(-3, 3))),
    st.tuples(st.just("rename"), NAMES, st.sampled_from(["x", "", "ids", "doc", "span", "file", "prompt"])),
    st.tuples(st.just("drop"), NAMES, st.just(0)),
    st.tuples(st.just("train"), st.just(0), st.tuples(PLACES, PLACES, st.integers(-3, 3))),
    st.tuples(st.just("null"), NAMES, PLACES),
    st.tuples(st.just("rows"), NAMES, st.tuples(PLACES, PLACES)),
)
Table = list[tuple[str, Any, list[Any]]]  # name, type and values of each column


def converted(value: Any, kind: Any) -> Any:
    """A value as one of another type: a number that does not fit wraps around, a list becomes its first value, and back."""
    if value is None or pa.types.is_null(kind):
        return None
    if pa.types.is_struct(kind):
        return {"a": converted(value, pa.uint16())}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        values = value if isinstance(value, list) else [value]
        if pa.types.is_fixed_size_list(kind):
            values = (values + [0] * kind.list_size)[: kind.list_size]
        return [converted(each, kind.value_type) for each in values]
    while isinstance(value, list):
        value = value[0] if value else 0
    if isinstance(value, bytes):
        value = int.from_bytes(value[:8], "little")
    if pa.types.is_dictionary(kind):
        return converted(value, kind.value_type)
    if pa.types.is_string(kind):
        return str(value)
    if pa.types.is_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return int(value).to_bytes(16, "little", signed=True)[
            : getattr(kind, "byte_width", 3) if kind != pa.binary() else 3
        ]
    if pa.types.is_floating(kind):
        return float(value)
    if pa.types.is_boolean(kind):
        return bool(value)
    bits = kind.bit_width
    value = int(value) % 2**bits
    return (
        value - 2**bits
        if (pa.types.is_signed_integer(kind) or pa.types.is_timestamp(kind)) and value >= 2 ** (bits - 1)
        else value
    )


def edited(table: Table, edits: list[tuple[str, int, Any]]) -> Table:
    """The table after all edits."""
    for kind, column, what in edits:
        if not table:
            break
        at = column % len(table)
        name, type_, values = table[at]
        if kind == "cast":
            table[at] = (name, what, values)
        elif kind == "widen":  # to 64 bits, in which a difference may wrap around
            item = pa.uint64()
            table[at] = (name, pa.list_(item) if pa.types.is_list(type_) else item, values)
        elif kind == "value" and values:
            row, place, value = what
            row %= len(values)
            if isinstance(values[row], list) and values[row]:
                values[row] = list(values[row])
                values[row][place % len(values[row])] = value
            elif not isinstance(values[row], list):
                values[row] = value
        elif kind == "length" and values and isinstance(values[what[0] % len(values)], list):
            row = what[0] % len(values)
            values[row] = values[row][: what[1]] if what[1] < 0 else values[row] + [1] * what[1]
        elif kind == "rename":
            table[at] = (what, type_, values)
        elif kind == "drop":
            del table[at]
        elif kind == "train":
            move(table, *what)
        elif kind == "null" and values:
            values[what % len(values)] = None
        elif kind == "rows":
            table = [(n, t, v[what[0] % (len(v) + 1) :][: what[1] % (len(v) + 1)]) for n, t, v in table]
    return table


def move(table: Table, row: int, place: int, by: int) -> None:
    """Move a border between trained and other tokens, and the count of trained tokens with it; or end a prompt earlier."""
    columns = {name: values for name, _, values in table}
    names = [name for name in ("span", "chosen_span", "rejected_span", "prompt") if columns.get(name)]
    if not names:
        return
    name = names[place % len(names)]
    values, row = columns[name], row % len(columns[name])
    if not (values[row] and isinstance(values[row], list)):
        return
    if name == "prompt":
        values[row] = values[row][: abs(by) - 1]
        return
    place %= len(values[row])
    values[row] = [value + by * (i == place) for i, value in enumerate(values[row])]
    counts = columns.get(f"n_{'loss' if name == 'span' else name.removesuffix('_span')}", [])
    if row < len(counts) and isinstance(counts[row], int):
        counts[row] += by if place % 2 else -by


def batches(table: Table, schema: Any, sizes: list[int]) -> Iterator[Any]:
    """Record batches of the drawn sizes, which may be 0, and one of the rest."""
    whole = pa.RecordBatch.from_arrays(
        [pa.array([converted(value, type_) for value in values], type_) for _, type_, values in table], schema=schema
    )
    begin = 0
    for size in sizes:
        yield whole.slice(begin, size)
        begin = min(whole.num_rows, begin + size)
    yield whole.slice(begin)


def refit(directory: Path, path: str, table: Table) -> None:
    """Make the manifest's hash, and the counts that a careful stranger would change with it, fit a file."""
    manifest = old_manifest(directory)
    entry = next(each for each in manifest["shards"] + manifest["files"] if each["path"] == path)
    entry.update(info_of(directory / path)._asdict())
    columns = {name: values for name, _, values in table}
    if "samples" in entry:
        before = {name: entry[name] for name in ("samples", "tokens", "loss_tokens")}
        ids = [columns.get(name, []) for name in ("ids", "prompt", "chosen", "rejected")]
        loss = [columns.get(name, []) for name in ("n_loss", "n_chosen", "n_rejected")]
        entry["samples"] = len(table[0][2]) if table else 0
        entry["tokens"] = sum(len(row) if isinstance(row, list) else 1 for column in ids for row in column)
        entry["loss_tokens"] = sum(value for column in loss for value in column if isinstance(value, int)) % 2**63
        for name, old in before.items():
            manifest["totals"][name] += entry[name] - old
        part = next(each for each in manifest["parts"] if each["part"] == entry["part"])
        part["tokens"] += entry["tokens"] - before["tokens"]
        part["tokens_in"] += entry["tokens"] - before["tokens"]
        manifest["totals"]["tokens_in"] += entry["tokens"] - before["tokens"]
    (directory / "manifest.json").write_text(json.dumps(manifest))


def check_limits(directory: Path) -> None:
    """What stands in the format's specification of ids, lengths and spans, of each sample that is shown."""
    dataset = open_dataset(directory)
    for name in ("train", "val"):
        for sample in dataset.split(name).samples():
            if dataset.kind == "pair":
                sides = [(sample.prompt, None, 0), (sample.chosen, sample.chosen_span, sample.n_chosen)]
                sides += [(sample.rejected, sample.rejected_span, sample.n_rejected)]
            else:
                sides = [(sample.ids, sample.span, sample.n_loss)]
                assert int(sample.doc_len.astype(object).sum()) == len(sample.ids)
            for ids, span, num_loss in sides:
                assert ids.ndim == 1 and all(0 <= id < dataset.vocab_size for id in ids.tolist())
                if span is not None:
                    places = span.tolist()
                    assert places == sorted(places) and all(0 <= place <= len(ids) for place in places)
                    assert sum(places[1::2]) - sum(places[::2]) == num_loss
        if dataset.split(name).num_samples():  # as training does
            loader = make_loader([dataset], split=name, batch_tokens=4096, seed=0)
            assert all(to_device(micro, torch.device("cpu")).num_trained >= 0 for micro in loader.micro_batches())


@pytest.fixture
def copies(packed: "dict[str, PackResult]", tmp_path: Path) -> dict[str, Path]:
    found = {
        kind: Path(shutil.copytree(packed[kind].out, tmp_path / kind)) for kind in ("document", "conversation", "pair")
    }
    for directory in found.values():
        make_old(directory)
    return found


@seed(SEED)
@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    kind=st.sampled_from(["document", "conversation", "pair"]),
    folder=st.sampled_from(["train", "val", "sources"]),
    edits=st.lists(EDITS, max_size=4),
    sizes=st.lists(st.integers(0, 40), max_size=3),
    compression=st.sampled_from([None, None, "lz4", "zstd"]),
    keeps_metadata=st.integers(0, 9).map(bool),
)
def test_crafted_files(
    copies: dict[str, Path],
    kind: str,
    folder: str,
    edits: list[tuple[str, int, Any]],
    sizes: list[int],
    compression: str | None,
    keeps_metadata: bool,
) -> None:
    directory = copies[kind]
    path = min((directory / folder).rglob("*.arrow"))
    manifest, content = (directory / "manifest.json").read_bytes(), path.read_bytes()
    with pa.OSFile(str(path)) as file:
        before = pa.ipc.open_file(file).read_all()
    table = edited(
        [(n, c.type, c.to_pylist()) for n, c in zip(before.column_names, before.columns, strict=True)], edits
    )
    schema = pa.schema([pa.field(n, t) for n, t, _ in table], before.schema.metadata if keeps_metadata else None)
    options = pa.ipc.IpcWriteOptions(compression=compression)
    expected = read_everything(directory) if not edits else None
    path.unlink()
    try:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema, options=options) as writer:
            for batch in batches(table, schema, sizes):
                writer.write_batch(batch)
        refit(directory, str(path.relative_to(directory)), table)
        result, message = refusal(lambda: read_everything(directory))
        verified, problems = refusal(lambda: verify(directory))
        if message:
            assert path.name in message or "manifest.json" in message, message
            assert verified or problems
        else:
            check_limits(directory)
            assert expected is None or result == expected
        assert message or edits or keeps_metadata or folder == "sources"
    finally:
        path.unlink(missing_ok=True)  # not written over: views of its map may still be there
        path.write_bytes(content)
        (directory / "manifest.json").write_bytes(manifest)
