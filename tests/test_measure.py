"""Figures of `mm eval` are those of training's validation, told apart by row; and noisy rows come out first."""

import json
import math
from pathlib import Path

import polars as pl
import pytest
import torch
from command_line import Run, fine
from train_data import Data, pack_to

from mmdata.errors import TokenizerError
from mmdata.pack.pipeline import PackResult
from mmdata.shards.dataset import open_dataset, source_rows
from mmdata.shards.loader import Loader
from mmdata.stats import stats
from mmdata.stats.figures import read_losses
from mmdata.stats.frames import rows
from mmdata.stats.report.data import dataset_page
from mmdata.tokenizer.tokenizer import Tokenizer
from mmdata.tokenizer.vocabulary import token_bytes
from mmtrain.commands.eval import print_scores
from mmtrain.inference.evaluate import evaluate
from mmtrain.inference.score import Scored, figures, noisiest, score, write_scores
from mmtrain.model.model import Model
from mmtrain.shapes import shape_of


@pytest.fixture(scope="module")
def tokenizer(data: Data) -> Tokenizer:
    return Tokenizer.load(data.tokenizer)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Model:
    torch.manual_seed(1)
    return Model(shape_of("tiny", tokenizer.vocab_size)).eval()


@pytest.mark.parametrize("name", ["pretrain", "sft"])
def test_the_figures_are_those_of_validation(data: Data, model: Model, tokenizer: Tokenizer, name: str) -> None:
    dataset = open_dataset(getattr(data, name))
    scored = list(score(model, tokenizer, dataset, "val"))
    found = figures(scored)[str(dataset.dir)]["all"]
    expected = evaluate(model, Loader([dataset], split="val", batch_tokens=4096, seed=0), tokenizer)
    assert found["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], rel=1e-5)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(expected["loss"]), rel=1e-4)
    assert found["tokens"] == expected["tokens"] == dataset.split("val").totals.loss_tokens


def test_a_margin_of_zero_has_no_minus_sign(capsys: pytest.CaptureFixture[str]) -> None:
    figures = {"sequences": 1, "tokens": 1, "loss": 1.0, "bits_per_byte": 1.0, "perplexity": 1.0}
    values = {
        "model": "m",
        "seconds": 1.0,
        "splits": ["val"],
        "datasets": {"shards/dpo": {"all": {**figures, "accuracy": 0.5, "margin": -0.001}}},
        "preference": {"loss": 0.69, "accuracy": 0.5, "reward_margin": -1e-6, "pairs": 1},
    }
    print_scores(values)
    out = capsys.readouterr().out
    assert "-0.0" not in out and "margin +0.0000, 1 pairs" in out


def logps(model: Model, ids: list[int], mask: list[int]) -> float:
    """Summed log-probability of the trained tokens of one sequence alone."""
    tokens, ends = torch.tensor(ids), torch.tensor([0, len(ids)], dtype=torch.int32)
    with torch.no_grad():
        all_logps = (model(tokens, torch.arange(len(ids)), ends, len(ids)) @ model.head_weight.T).log_softmax(-1)
    places = torch.tensor(mask).nonzero()[:, 0]
    return float(all_logps[places - 1, tokens[places]].sum())


def test_pairs_are_ranked_by_their_replies(data: Data, model: Model, tokenizer: Tokenizer) -> None:
    dataset = open_dataset(data.dpo)
    margins = []
    for row in source_rows(dataset, "val"):
        prompt = row["prompt_ids"]
        sides = [
            logps(model, prompt + row[f"{side}_ids"], [0] * len(prompt) + row[f"{side}_mask"])
            for side in ("chosen", "rejected")
        ]
        margins.append(sides[0] - sides[1])
    found = figures(score(model, tokenizer, dataset, "val"))[str(dataset.dir)]["all"]
    assert found["sequences"] == len(margins) > 10
    assert found["accuracy"] == sum(margin > 0 for margin in margins) / len(margins)
    assert found["margin"] == pytest.approx(sum(margins) / len(margins), rel=1e-4)


def test_a_dpo_run_has_the_same_figures_as_at_its_end(runs: Path, data: Data, mm: Run) -> None:
    records = [json.loads(line) for line in (runs / "dpo/metrics.jsonl").read_text().splitlines()]
    last = [record for record in records if "val_accuracy" in record][-1]
    ran = fine(mm(f"eval {runs / 'dpo'} --json"))
    found = json.loads(ran.out)["preference"]
    assert found.pop("pairs") == len(list(source_rows(open_dataset(data.dpo), "val")))
    assert found == pytest.approx({name: last[f"val_{name}"] for name in found}, rel=1e-4, abs=1e-5)
    assert found.keys() == {"loss", "accuracy", "reward_margin"}
    shown = fine(mm(f"eval {runs / 'dpo'}")).out
    assert f"reward accuracy {100 * found['accuracy']:.1f}%" in shown and "higher logp" in shown
    assert "preference" not in json.loads(fine(mm(f"eval {runs / 'sft'} --data {data.dpo} --json")).out)


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_line_says_where_its_row_stands(data: Data, model: Model, tokenizer: Tokenizer, split: str) -> None:
    dataset = open_dataset(data.sft)
    by_row = {(row["file"], row["line"]): row for row in source_rows(dataset, split)}
    scored = list(score(model, tokenizer, dataset, split))
    assert len(scored) == len(by_row)
    sizes = token_bytes(tokenizer)
    for one in scored:
        row = by_row[one.file, one.line]
        trained = [id for id, bit in zip(row["input_ids"], row["loss_mask"], strict=True) if bit]
        assert (one.tokens, one.bytes, one.side) == (len(trained), sum(sizes[trained]), None)
        assert one.nll == pytest.approx(-logps(model, row["input_ids"], row["loss_mask"]), rel=1e-4)
    record = json.loads(json.dumps(scored[0].record()))
    assert {"file", "line", "tokens", "nll", "loss", "dataset", "split", "bucket", "side", "bytes"} == record.keys()


def test_pairs_have_a_line_a_side(data: Data, model: Model, tokenizer: Tokenizer) -> None:
    scored = list(score(model, tokenizer, open_dataset(data.dpo), "val"))
    assert [one.side for one in scored] == ["chosen", "rejected"] * (len(scored) // 2)
    assert all(a.line == b.line for a, b in zip(scored[::2], scored[1::2], strict=True))


def test_buckets_add_up(data: Data, model: Model, tokenizer: Tokenizer, tmp_path: Path) -> None:
    def one(bucket: int, tokens: int, nll: float) -> Scored:
        return Scored("d", "val", bucket, "f", 1, None, tokens, nll, 2 * tokens, nll)

    found = figures([one(1024, 10, 30.0), one(512, 30, 30.0), one(1024, 10, 10.0)])["d"]
    assert list(found) == [512, 1024, "all"]
    assert [values["loss"] for values in found.values()] == [1.0, 2.0, 1.4]
    assert found["all"] == {
        "sequences": 3,
        "tokens": 50,
        "loss": 1.4,
        "bits_per_byte": pytest.approx(0.7 / math.log(2)),
        "perplexity": pytest.approx(math.exp(1.4)),
    }


def test_noise_comes_out_first(tmp_path: Path, data: Data, tokenizer: Tokenizer) -> None:
    """Rows of random letters among sums, under a model that has only counted tokens."""
    lines = (data.tokenizer.parent / "pretrain.jsonl").read_text().splitlines()
    lines[100] = json.dumps({"text": "xqzj vvkw qqxz jjkq wvxz"})
    root = tmp_path / "root"
    root.mkdir()
    tokenizer.save(root / "tokenizer")
    (root / "pretrain.jsonl").write_text("\n".join(lines) + "\n")
    noisy = Data(root / "tokenizer", root, root, root, root)
    pack_to(noisy, "pretrain", root / "shards", val_fraction=0.0)
    dataset = open_dataset(root / "shards")
    counts = torch.ones(tokenizer.vocab_size)
    for row in source_rows(dataset):
        counts += torch.bincount(torch.tensor(row["input_ids"]), minlength=tokenizer.vocab_size)
    model = Model(shape_of("tiny", tokenizer.vocab_size)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        # hidden states are then all zero but for what the last norm lets through: a constant first coordinate
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.model.embed_tokens.weight[:, 1] = counts.log()
        model.model.norm.weight[1] = 1.0
    worst = noisiest(score(model, tokenizer, dataset, "train"), 3)
    assert worst[0].line == 101
    assert worst[0].nll / worst[0].tokens > worst[1].nll / worst[1].tokens


def test_a_dataset_of_another_tokenizer_is_refused(data: Data, model: Model, tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="packed with another tokenizer"):
        next(score(model, tokenizer, open_dataset(data.other), "val"))


def test_losses_are_summed_by_language_length_and_source(tmp_path: Path, packed: dict[str, PackResult]) -> None:
    path = packed["pair"].out.with_suffix(".jsonl")
    scored = [
        Scored(
            "d",
            "val",
            512,
            str(path) if n < 90 else "other",
            n,
            side,
            3 + n % 7,
            0.5 * n + (side == "rejected"),
            9,
            0.0,
        )
        for n in range(1, 100)
        for side in ("chosen", "rejected")
    ]
    write_scores(tmp_path / "losses.jsonl", scored)
    write_scores(tmp_path / "losses.parquet", scored)
    losses = read_losses(tmp_path / "losses.jsonl")
    assert losses.equals(read_losses(tmp_path / "losses.parquet"))
    records = [one.record() for one in scored]
    assert pl.read_parquet(tmp_path / "losses.parquet").to_dicts() == records
    frame = {row["line"]: row for row in rows(path).select("line", "language", "characters").collect().to_dicts()}
    for measured in (stats.measure_file(path, losses=losses), stats.measure_dataset(packed["pair"].out, losses=losses)):
        found = measured.figures["losses"]
        expected: dict[str, list[float]] = {}
        for one in (one for one in scored if one.side == "chosen" and one.line in frame and one.file == str(path)):
            row = frame[one.line]
            length = next((f"{a:,}-{b - 1:,}" for a, b in LENGTHS if a <= row["characters"] < b), "from 4,096")
            for key in (row["language"], length, str(path)):
                sums = expected.setdefault(key, [0, 0, 0.0])
                for i, value in enumerate((1, one.tokens, one.nll)):
                    sums[i] += value
        counted = {k: v for by in ("languages", "lengths", "sources") for k, v in found[by].items()}
        assert {
            key: [of["rows"], of["tokens"], pytest.approx(of["loss"] * of["tokens"])] for key, of in counted.items()
        } == expected
        assert (found["rows"], found["elsewhere"]) == (expected[str(path)][0], 99 - expected[str(path)][0])
        assert measured.rows.filter(line=5)["loss"].to_list() == [pytest.approx(2.5 / 8)]
        for lang in ("en", "zh"):
            assert "from 4,096" in dataset_page([measured], lang=lang) or "from 4,096" not in expected


LENGTHS = ((0, 64), (64, 256), (256, 1024), (1024, 4096))
