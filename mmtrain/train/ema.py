"""A running average of the trained weights: one more fp32 copy of them, moved towards the model after every step.

With --ema the average is what a run offers: it is what is validated, saved as the checkpoint's weights, chatted with,
exported and begun from. The weights that are trained stand in the checkpoint too, for going on.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """average <- average + (1 - decay) (weights - average), over all parameters that are trained.

    Early on the decay is (1 + step) / (10 + step) where that is smaller, as TensorFlow's moving average has it: the first
    weights would else stay in the average for 1 / (1 - decay) steps.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._average = {name: p.detach().clone() for name, p in self._trained.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after 0-based `step`; where it was skipped the weights are those of before."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, parameter in self._trained.items():
            self._average[name].lerp_(parameter.detach(), share)

    @contextmanager
    def in_place(self) -> Iterator[dict[str, Tensor]]:
        """While open the model holds the average; gives the weights in training by parameter name, which then come back."""
        self._swap()
        try:
            yield self._average
        finally:
            self._swap()

    @torch.no_grad()
    def resume(self, weights: Mapping[str, Tensor]) -> None:
        """Begin from a checkpoint: the model holds the average that was saved, `weights` are those in training."""
        assert set(weights) == set(self._trained), set(weights) ^ set(self._trained)
        for name, parameter in self._trained.items():
            self._average[name].copy_(parameter)
            parameter.copy_(weights[name])

    @torch.no_grad()
    def _swap(self) -> None:
        """Exchange what stands in the model and in the average; parameters keep their place in memory."""
        for name, parameter in self._trained.items():
            held = parameter.clone()
            parameter.copy_(self._average[name])
            self._average[name].copy_(held)
