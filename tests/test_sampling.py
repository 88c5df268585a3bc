"""Drawing: the settings mean what transformers' mean, the same seed draws the same, and nonsense is refused."""

import pytest
import torch

from mmdata.errors import UsageError
from mmtrain.inference.sampling import FEW, biased, candidates, highest, penalize, pick, top_logps
from mmtrain.inference.settings import Sampling


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"temperature": 0.0}, {2}),
        ({"temperature": 1.0, "top_k": 1}, {2}),
        ({"temperature": 1.0, "top_p": 0.0001}, {2}),
        ({"temperature": 1.0, "top_k": 2}, {2, 0}),
        ({"temperature": 1.0, "top_p": 0.7}, {2, 0}),  # 0.64 alone does not reach 0.7
        ({"temperature": 1.0, "min_p": 0.3}, {2, 0}),  # 0.23 is more than 0.3 x 0.64
        ({"temperature": 1.0, "min_p": 1.0}, {2}),
        ({"temperature": 1.0}, {0, 1, 2, 3}),
    ],
)
def test_only_tokens_that_the_settings_keep_are_drawn(options: dict, allowed: set[int]) -> None:
    logits = torch.tensor([0.23, 0.09, 0.64, 0.04]).log()
    generator = torch.Generator().manual_seed(0)
    drawn = {pick(logits, Sampling(**options), generator) for _ in range(300)}
    assert drawn == allowed


def test_penalties_and_bias_are_subtracted_and_added() -> None:
    logits = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert torch.equal(biased(logits, Sampling(), [1, 1, 3]), logits)
    options = Sampling(frequency_penalty=0.5, presence_penalty=2.0, logit_bias=((0, 100.0), (3, -1.5)))
    assert biased(logits, options, [1, 1, 3]).tolist() == [101.0, 2 - 1 - 2, 3.0, 4 - 0.5 - 2 - 1.5]
    assert biased(logits, options, []).tolist() == [101.0, 2.0, 3.0, 2.5]
    generator = torch.Generator().manual_seed(0)
    assert pick(logits, Sampling(temperature=1.0, logit_bias=((0, 100.0),)), generator) == 0
    assert pick(logits, Sampling(presence_penalty=1.5), generator, [3], [3]) == 2  # not what stands in the prompt
    assert pick(logits, Sampling(presence_penalty=1.5), generator, [3], []) == 3


def test_tokens_are_drawn_as_often_as_they_are_probable() -> None:
    logits = torch.tensor([0.23, 0.09, 0.64, 0.04]).log()
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(4)
    for _ in range(1600):
        counts[pick(logits, Sampling(temperature=1.0), generator)] += 1
    torch.testing.assert_close(counts / 1600, logits.exp(), atol=0.03, rtol=0)


def test_the_settings_mean_what_they_mean_in_transformers() -> None:
    """Probabilities of every token, on random logits and settings, as transformers' processors leave them."""
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    generator = torch.Generator().manual_seed(1)
    for trial in range(60):
        logits = torch.randn(600, generator=generator) * (3, 1, 0.1)[trial % 3]
        seen = torch.randint(0, 600, (20,), generator=generator)
        draw = torch.rand(4, generator=generator).tolist()
        options = Sampling(
            temperature=0.3 + draw[0],
            top_k=(0, 50, 300)[trial % 4 % 3],
            top_p=0.5 + draw[1] / 2,
            min_p=draw[2] / 10,
            repetition_penalty=1 + draw[3],
        )
        steps = [
            RepetitionPenaltyLogitsProcessor(options.repetition_penalty),
            TemperatureLogitsWarper(options.temperature),
        ]
        steps += [TopKLogitsWarper(options.top_k)] if options.top_k else []
        steps += [TopPLogitsWarper(options.top_p), MinPLogitsWarper(options.min_p)]
        expected = LogitsProcessorList(steps)(seen[None], logits[None].clone())[0].softmax(-1)  # type: ignore[arg-type]
        probs, ids = candidates(penalize(logits, seen.tolist(), options.repetition_penalty), options)
        found = torch.zeros(600).index_put((ids,), probs.float())
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_the_highest_of_a_large_vocabulary_are_the_beginning_of_a_stable_sort() -> None:
    generator = torch.Generator().manual_seed(3)
    for count in (1, 7, FEW, 999, 1000, 2000):
        logits = torch.randint(0, 40, (1000,), generator=generator).float()  # many equal ones
        logits[:5] = -torch.inf
        values, ids = logits.sort(descending=True, stable=True)
        found = highest(logits, count)
        assert torch.equal(found[0], values[:count]) and torch.equal(found[1], ids[:count])
    with_nan = torch.tensor([0.0, torch.nan, 1.0])
    assert highest(with_nan, 2)[1].tolist() == with_nan.sort(descending=True, stable=True).indices[:2].tolist()


def test_the_log_probabilities_are_those_of_the_logits() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(2))
    logp, top = top_logps(logits, 7, 4)
    logps = logits.log_softmax(-1)
    assert logp == pytest.approx(float(logps[7]), abs=1e-6)
    assert [id for id, _ in top] == logps.topk(4).indices.tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"seed": 2**63},
        {"max_new_tokens": 0},
        {"stop": ("",)},
        {"logprobs": -1},
    ],
)
def test_nonsense_is_refused_by_name(options: dict) -> None:
    with pytest.raises(UsageError, match=next(iter(options)).replace("_", ".").split(".")[0]):
        Sampling(**options)
