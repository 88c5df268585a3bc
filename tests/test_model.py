"""The transformer: published sizes, documents that do not see each other, and decoding that equals the flat forward."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mmtrain.model.model import Model, RMSNorm, Rotary, make_layout, rotary_table, rotate
from mmtrain.shapes import MODEL_SHAPES, ModelConfig

LENGTHS = [7, 1, 12, 7, 3, 12, 1, 20]


@pytest.fixture(params=[False, True], ids=["plain", "qk_norm"])
def model(request: pytest.FixtureRequest) -> Model:
    torch.manual_seed(1)
    model = Model(replace(MODEL_SHAPES["tiny"], vocab_size=97, qk_norm=request.param))
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
    return model


def flat(documents: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    lengths = [len(d) for d in documents]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return torch.cat(documents), torch.cat([torch.arange(n) for n in lengths]), cu_seqlens, max(lengths)


def documents(lengths: list[int] = LENGTHS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 97, (n,), generator=generator) for n in lengths]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("minimind2", 104_030_976),
        ("minimind2-small", 25_829_888),
        ("minimind3", 63_912_192),
        ("smollm2-135m", 134_515_008),
        ("qwen3-0.6b", 596_049_920),
        ("gpt2-124m-like", 123_551_232),
    ],
)
def test_presets_have_the_published_number_of_parameters(name: str, count: int) -> None:
    with torch.device("meta"):
        model = Model(MODEL_SHAPES[name])
    assert sum(p.numel() for p in model.parameters()) == count == MODEL_SHAPES[name].num_params


def test_parameter_names_are_those_of_llama_checkpoints(model: Model) -> None:
    names = set(model.state_dict())
    assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.1.mlp.down_proj.weight"} <= names
    assert "model.layers.0.self_attn.q_proj.weight" in names
    assert ("model.layers.0.self_attn.k_norm.weight" in names) == model.config.qk_norm


def test_packed_documents_equal_each_alone(model: Model) -> None:
    packed = model(*flat(documents()))
    alone = torch.cat([model(*flat([d])) for d in documents()])
    assert (packed - alone).abs().max() < 1e-5


def test_a_token_reaches_neither_the_past_nor_another_document(model: Model) -> None:
    docs = documents([5, 9, 5])
    before = model(*flat(docs))
    docs[1][4] += 1 if docs[1][4] == 0 else -1
    is_changed = (model(*flat(docs)) - before).abs().sum(-1) > 0
    assert is_changed.tolist() == [False] * 9 + [True] * 5 + [False] * 5


def test_rotary_turns_each_pair_by_position_times_frequency() -> None:
    x = torch.randn(3, 1, 8, dtype=torch.float64)
    cos, sin = rotary_table(torch.tensor([0, 3, 7]), 8, 100.0)
    turned = rotate(x, cos.double(), sin.double())
    for t, position in enumerate((0, 3, 7)):
        for i in range(4):
            z = torch.complex(x[t, 0, i], x[t, 0, i + 4]) * torch.polar(
                torch.tensor(1.0, dtype=torch.float64), torch.tensor(position * 100.0 ** (-i / 4), dtype=torch.float64)
            )
            assert abs(turned[t, 0, i] - z.real) < 1e-6 and abs(turned[t, 0, i + 4] - z.imag) < 1e-6


def test_rotary_tables_are_made_once_grow_and_have_the_very_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    config = MODEL_SHAPES["minimind2"]
    made: list[int] = []

    def counted(position_ids: torch.Tensor, *frequencies: Any) -> tuple[torch.Tensor, torch.Tensor]:
        made.append(len(position_ids))
        return rotary_table(position_ids, *frequencies)

    monkeypatch.setattr("mmtrain.model.model.rotary_table", counted)
    rotary = Rotary(config)
    for end in (7, 3, 14, 15, 28, 1000, 1, 2000):
        position_ids = torch.cat([torch.arange(end), torch.arange(end // 2), torch.tensor([end - 1])])
        expected = rotary_table(position_ids, config.head_size, config.rope_theta)
        assert all(torch.equal(*pair) for pair in zip(rotary(position_ids, end), expected, strict=True))
    assert made == [7, 14, 28, 1000, 2000]


def test_tables_made_for_an_answer_serve_training_and_are_no_part_of_the_weights(model: Model) -> None:
    names = set(model.state_dict())
    with torch.inference_mode():
        model(*flat(documents()))
    model(*flat(documents())).sum().backward()
    assert set(model.state_dict()) == names and not list(model.buffers())
    assert model.model.embed_tokens.weight.grad is not None


def test_the_layout_groups_equal_lengths_and_can_be_undone() -> None:
    _, _, cu_seqlens, longest = flat(documents())
    layout = make_layout(cu_seqlens, longest, torch.device("cpu"))
    assert layout.groups == [(2, 1), (1, 3), (2, 7), (2, 12), (1, 20)]
    assert layout.order is not None and layout.restore is not None
    assert torch.equal(layout.order[layout.restore], torch.arange(sum(LENGTHS)))


def test_a_new_model_starts_near_the_loss_of_guessing() -> None:
    torch.manual_seed(0)
    model = Model(ModelConfig(500, 64, 2, 4, 2, 176))
    hidden = model(*flat(documents()))
    logps = (hidden @ model.head_weight.T).log_softmax(-1)
    assert abs(-logps.mean() - torch.tensor(500.0).log()) < 0.2


def test_a_model_that_spares_memory_keeps_less_and_has_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> tuple[int, list[torch.Tensor]]:
        torch.manual_seed(0)
        model, kept = Model(ModelConfig(97, 64, 2, 4, 2, 176)), {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden = model(*flat(documents()))
        hidden.square().sum().backward()
        return sum(kept.values()), [p.grad for p in model.parameters() if p.grad is not None]

    plain, gradient = run()
    monkeypatch.setattr("mmtrain.model.model.spares", lambda x: True)
    lean, same = run()
    gone = 2 * 4 * sum(LENGTHS) * 2 * 176  # of both blocks silu(gate) and its product with up
    assert plain - lean >= gone
    assert len(same) == len(gradient) and all(torch.equal(a, b) for a, b in zip(gradient, same, strict=True))


def test_rms_norm_and_its_gradients_equal_torchs() -> None:
    norm = RMSNorm(16, 1e-5)
    torch.nn.init.normal_(norm.weight)
    x, upstream = torch.randn(3, 5, 16, requires_grad=True), torch.randn(3, 5, 16)
    expected = F.rms_norm(x, (16,), norm.weight, 1e-5)
    found = norm(x)
    assert (found - expected).abs().max() < 1e-5
    inputs = (x, norm.weight)
    pairs = zip(
        torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    )
    assert all((a - b).abs().max() < 1e-5 for a, b in pairs)
