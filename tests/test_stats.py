from pathlib import Path

import numpy as np
import pytest

from mmdata.errors import InputError
from mmdata.io.records import plain
from mmdata.pack.pipeline import PackResult
from mmdata.pack.summary import length_figures
from mmdata.shards.dataset import open_dataset, source_rows
from mmdata.stats.stats import dataset_stats, measure_dataset, measure_file


def test_length_figures_are_those_of_the_lengths() -> None:
    lengths = np.random.default_rng(0).integers(3, 200, 1001)
    figures = plain(length_figures(np.bincount(lengths)))
    ordered = np.sort(lengths)
    assert (figures["shortest"], figures["longest"]) == (ordered[0], ordered[-1])
    assert figures["p50"] == ordered[500] and figures["p90"] == ordered[900]
    assert figures["tokens"] == lengths.sum() and figures["mean"] == pytest.approx(lengths.mean())
    assert sum(row["sequences"] for row in figures["histogram"]) == 1001
    assert sum(row["tokens"] for row in figures["histogram"]) == lengths.sum()
    assert figures["histogram"][-1]["up_to"] == ordered[-1]


@pytest.mark.parametrize("kind", ["document", "conversation", "pair"])
def test_a_datasets_figures_balance(packed: dict[str, PackResult], kind: str) -> None:
    figures = dataset_stats(open_dataset(packed[kind].out))
    assert figures["rows"] == figures["kept"] + sum(figures["left_out"].values()) == 300
    assert figures["tokens_in"] == figures["tokens"] + sum(figures["cut"].values())
    for by in ("splits", "buckets"):
        for key in ("tokens", "loss_tokens", "sequences", "samples"):
            assert sum(group[key] for group in figures[by].values()) == figures[key]
    assert figures["fill"] == pytest.approx(1 - figures["waste"])
    assert 0 < figures["trained_share"] < 1


@pytest.mark.parametrize("kind", ["document", "conversation", "pair"])
def test_lengths_by_bucket_are_those_of_the_samples_in_it(packed: dict[str, PackResult], kind: str) -> None:
    dataset = open_dataset(packed[kind].out)
    found = measure_dataset(packed[kind].out).figures["tokens_by"]
    lengths: dict[str, list[int]] = {}
    for name in ("train", "val"):
        split = dataset.split(name)
        for number in range(split.num_samples()):
            bucket, i = split.locate(number)
            sample = split.sample(bucket, i)
            if kind == "pair":
                longer = max(len(sample.chosen), len(sample.rejected))
                lengths.setdefault(str(bucket), []).append(len(sample.prompt) + longer)
            else:
                lengths.setdefault(str(bucket), []).extend(sample.doc_len.tolist())
    assert {b: (f["count"], f["total"], f["longest"]) for b, f in found["buckets"].items()} == {
        bucket: (len(of), sum(of), max(of)) for bucket, of in lengths.items()
    }
    assert found["sequence"]["count"] == sum(map(len, lengths.values()))


def test_fill_is_the_share_of_positions_that_hold_tokens(packed: dict[str, PackResult]) -> None:
    dataset = open_dataset(packed["document"].out)
    used = positions = 0
    for name in ("train", "val"):
        split = dataset.split(name)
        for number in range(split.num_samples()):
            bucket, i = split.locate(number)
            used, positions = used + len(split.sample(bucket, i).ids), positions + bucket
    assert dataset_stats(dataset)["fill"] == pytest.approx(used / positions)


@pytest.mark.parametrize("kind", ["document", "conversation", "pair"])
def test_a_files_figures_agree_with_its_datasets(
    packed: dict[str, PackResult],
    tokenizer_dir: Path,
    kind: str,
) -> None:
    dataset = open_dataset(packed[kind].out)
    of_file = measure_file(Path(dataset.inputs[0]), tokenizer_dir, is_exact=True).figures
    of_dataset = dataset_stats(dataset)
    for key in ("kind", "rows", "kept", "left_out", "characters", "characters_per_token"):
        assert of_file[key] == of_dataset[key]
    assert of_file["tokens"] == of_dataset["tokens_in"]
    if kind != "document":  # a long document is cut into fragments, each with a first token of its own
        assert of_file["lengths"]["longest"] == of_dataset["lengths"]["longest"]
        assert of_file["loss_tokens"] == of_dataset["loss_tokens"]


def test_characters_per_token_counts_what_people_wrote(packed: dict[str, PackResult]) -> None:
    import json

    dataset = open_dataset(packed["document"].out)
    texts = [json.loads(line)["text"] for line in Path(dataset.inputs[0]).read_text().splitlines()]
    tokens = sum(len(row["input_ids"]) for row in source_rows(dataset))
    assert dataset_stats(dataset)["characters_per_token"] == pytest.approx(sum(map(len, texts)) / tokens)


def test_a_file_without_tokenizer_has_no_token_figures(packed: dict[str, PackResult]) -> None:
    figures = measure_file(Path(open_dataset(packed["pair"].out).inputs[0])).figures
    assert figures["kept"] == 300 and "tokens" not in figures


def test_a_file_without_a_usable_row_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("not json\n")
    with pytest.raises(InputError, match=r"bad\.jsonl"):
        measure_file(tmp_path / "bad.jsonl")
