"""Any shape from the command line: what replaces what, what fits, and rows that no token uses."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Run, fine, refused
from train_data import Data, run_json
from train_runs import config_of

from mmdata.errors import UsageError
from mmdata.options import flag_of, options_of
from mmdata.pack.options import PackOptions
from mmtrain import checkpoint
from mmtrain.commands.other_flags import OTHER_FLAGS
from mmtrain.config import TrainOptions, shape_from
from mmtrain.convert.export import export
from mmtrain.convert.foreign import open_model, read
from mmtrain.inference.engine import Engine
from mmtrain.inference.settings import Sampling
from mmtrain.model.model import Model
from mmtrain.resolve import resolve
from mmtrain.shapes import MODEL_SHAPES, ModelConfig, shape_of
from mmtrain.train.loop import train


def shaped(vocab_size: int = 6400, **given: Any) -> ModelConfig:
    """The shape of a new model by these options of `mm train pretrain`."""
    return shape_from(resolve(TrainOptions("pretrain", (), Path("run"), **given))[0], vocab_size)


@pytest.mark.parametrize(
    ("name", "size"), [("minimind2", 104_030_976), ("minimind2-small", 25_829_888), ("minimind3", 63_912_192)]
)
def test_the_vocabulary_is_the_tokenizers(name: str, size: int) -> None:
    assert shaped(model=name).num_params == size
    for vocab_size in (300, 4096, 8192):
        assert shaped(vocab_size, model=name) == replace(MODEL_SHAPES[name], vocab_size=vocab_size)


def test_the_tutorials_numbers_give_the_tutorials_model() -> None:
    assert shaped(layers=16, width=768) == MODEL_SHAPES["minimind2"]
    assert shaped() == MODEL_SHAPES["minimind2-small"]


def test_options_replace_fields_of_a_shape() -> None:
    given = {"kv_heads": 1, "rope_theta": 5e5, "norm_eps": 1e-4, "qk_norm": False, "max_positions": 99, "ffn": 100}
    shape = shaped(model="minimind3", heads=6, head_size=20, untie=True, **given)
    expected = {"num_kv_heads": 1, "rope_theta": 5e5, "norm_eps": 1e-4, "qk_norm": False, "max_positions": 99}
    expected |= {"ffn_size": 100, "num_heads": 6, "own_head_size": 20, "tied": False}
    assert shape == replace(MODEL_SHAPES["minimind3"], **expected)
    assert (
        sum(p.numel() for p in Model(replace(shape, num_layers=1)).parameters())
        == replace(shape, num_layers=1).num_params
    )


@pytest.mark.parametrize("depth", [1, 2, 7, 12, 16])
def test_depth_gives_a_whole_shape(depth: int) -> None:
    shape = shaped(depth=depth)
    assert (shape.num_layers, shape.hidden_size, shape.head_size) == (depth, 64 * depth, 64)
    assert shaped(depth=depth, kv_heads=1, qk_norm=True) == replace(shape, num_kv_heads=1, qk_norm=True)
    with pytest.raises(UsageError, match="--depth and --width both say"):
        shaped(depth=depth, width=100)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"width": 700}, "width 700 is not 8 heads of an even width"),
        ({"heads": 12}, "width 512 is not 12 heads"),
        ({"width": 10, "heads": 9, "kv_heads": 3}, "width 10 is not 9 heads"),
        ({"kv_heads": 3}, "3 key/value heads do not divide 8 query heads"),
        ({"head_size": 25}, "--head-size 25 is odd"),
    ],
)
def test_numbers_that_fit_no_model_are_refused_with_those_that_do(given: dict[str, int], problem: str) -> None:
    with pytest.raises(UsageError, match=problem) as caught:
        shaped(**given)
    offers = re.findall(r"--([a-z-]+) ((?:\d+(?:, | or )?)+)", str(caught.value.fix))
    assert offers
    for flag, numbers in offers:
        for number in re.findall(r"\d+", numbers):
            shaped(**given | {flag.replace("-", "_"): int(number)})


def test_options_of_a_new_model_and_a_checkpoint_exclude_each_other(data: Data, tmp_path: Path) -> None:
    options = config_of("pretrain", data, tmp_path / "run", init=tmp_path / "none", model=None)
    for given in ({"layers": 3}, {"pad_vocab": 64}, {"model": "tiny"}):
        with pytest.raises(UsageError, match=f"--{next(iter(given)).replace('_', '-')} is for new weights"):
            train(replace(options, **given))


def test_padding_rows_are_recorded_never_sampled_and_cut_at_export(data: Data, tmp_path: Path) -> None:
    given = {"model": "tiny", "pad_vocab": 64, "untie": True, "steps": 2, "quiet": True, "schedule": "constant"}
    options = config_of("pretrain", data, tmp_path / "run", **given)
    train(options)
    model, tokenizer = open_model(tmp_path / "run")
    assert (tokenizer.vocab_size, model.config.vocab_size, model.config.num_padding) == (300, 320, 20)
    assert run_json(tmp_path / "run")["settings"]["pad_vocab"] == {"value": 64, "from": "flag"}
    again = train(replace(options, resume=True, steps=3, pad_vocab=None, model=None, untie=None))
    assert again.final_step == 3 and checkpoint.find(tmp_path / "run").model_config == model.config
    with torch.no_grad():
        model.head_weight[300:] *= 1000  # so that a row beyond the tokenizer's ids has the largest or smallest logit
    row = Engine(model, tokenizer).answer([[5, 6, 7]], Sampling(max_new_tokens=30, temperature=0))[0]
    assert max(row.ids) < 300
    made = export(tmp_path / "run", tmp_path / "hf", format="hf")
    found = read(tmp_path / "hf")
    assert found.shape == replace(model.config, vocab_size=300, num_padding=0)
    assert made.num_params == found.shape.num_params
    assert torch.equal(
        found.weights["model.embed_tokens.weight"],
        open_model(tmp_path / "run")[0].state_dict()["model.embed_tokens.weight"][:300],
    )


def test_a_run_of_before_a_field_was_there_has_the_old_shape(data: Data, tmp_path: Path) -> None:
    options = config_of("pretrain", data, tmp_path / "run", model="tiny", steps=1, quiet=True, schedule="constant")
    train(options)
    (path,) = (tmp_path / "run").glob("checkpoints/*/state.json")
    state = json.loads(path.read_text())
    del state["record_sha256"]
    old = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "ffn_size", "rope_theta", "norm_eps")
    state["model"] = {name: state["model"][name] for name in (*old, "qk_norm", "max_positions")}
    new = {"depth", "layers", "width", "heads", "kv_heads", "head_size", "ffn", "untie", "pad_vocab"}
    state["settings"] = {name: value for name, value in state["settings"].items() if name not in new}
    path.write_text(json.dumps(state))
    assert checkpoint.find(tmp_path / "run").model_config == shape_of("tiny", 300)
    assert train(replace(options, resume=True, steps=2)).final_step == 2


def test_options_of_other_programs_are_answered_with_ones_that_exist(mm: Run) -> None:
    known = {
        flag.split("/")[0]
        for kind in (TrainOptions, PackOptions)
        for flag in (flag_of(*one) for one in options_of(kind))
    }
    for flag, fix in OTHER_FLAGS.items():
        for named in re.findall(r"--[a-z][a-z-]*", fix):
            assert named in known | {
                "--data",
                "--out",
                "--nproc",
                "--window",
                "--max-new-tokens",
                "--top-p",
                "--think",
            }, (flag, named)
    refused(mm("train pretrain --n_layers 16 --dim 768"), "mm train has no option --n_layers", "fix: --layers N")
    refused(mm("train sft --batch_size=32"), "--batch-tokens N: sequences per step")
    refused(mm("chat --model_mode 1"), "mm chat RUN")


def test_a_plan_compares_the_runs_tokens_with_a_compute_optimal_run(data: Data, tmp_path: Path) -> None:
    from mmtrain.train.run import needs_of

    needs = needs_of(config_of("pretrain", data, tmp_path / "run", model="tiny", steps=3))
    assert needs.optimal_tokens == 20 * needs.num_params and asdict(needs)["shape"]["num_layers"] == 2
    assert 2 * needs.batch_tokens < needs.run_tokens <= 3 * needs.batch_tokens
    assert needs_of(config_of("sft", data, tmp_path / "run", model="tiny", steps=3)).optimal_tokens == 0


def test_the_data_report_shows_what_models_the_data_feeds(home: Path, mm: Run) -> None:
    fine(mm("pack data/pretrain_hq.jsonl data/sft_512.jsonl --no-report"))
    figures = json.loads(fine(mm("stats shards/pretrain_hq shards/sft_512 --json")).out)
    models = figures["shards/pretrain_hq"]["models"]
    expected = shape_of("minimind2", 300).num_params
    tokens = figures["shards/pretrain_hq"]["tokens"]
    assert models["minimind2"] == {"parameters": expected, "tokens_per_parameter": tokens / expected}
    assert "models" not in figures["shards/sft_512"]
    page = fine(mm("stats shards/pretrain_hq --html page.html")).out
    assert "tokens per parameter" in page and "smollm2-135m" in (home / "page.html").read_text()
