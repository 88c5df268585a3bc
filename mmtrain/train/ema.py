"""Exponential moving average of the trained weights: a second fp32 copy, updated after every step.

With --ema the average is validated and saved as the checkpoint's weights, which chat, export and later runs use. The weights
in training are saved in the checkpoint too, to resume from.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """average <- average + (1 - decay) (weights - average), for all trainable parameters.

    In the first steps the decay is (1 + step) / (10 + step) if that is smaller, as in TensorFlow's moving average; otherwise
    the initial weights would dominate for 1 / (1 - decay) steps.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._average = {name: p.detach().clone() for name, p in self._trained.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update with the weights after 0-based `step`."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, parameter in self._trained.items():
            self._average[name].lerp_(parameter.detach(), share)

    @contextmanager
    def in_place(self) -> Iterator[dict[str, Tensor]]:
        """Within the context the model holds the average; yields the weights in training by name, which are then restored."""
        self._swap()
        try:
            yield self._average
        finally:
            self._swap()

    @torch.no_grad()
    def resume(self, weights: Mapping[str, Tensor]) -> None:
        """Resume from a checkpoint: the model holds the saved average, `weights` are those in training."""
        assert set(weights) == set(self._trained), set(weights) ^ set(self._trained)
        for name, parameter in self._trained.items():
            self._average[name].copy_(parameter)
            parameter.copy_(weights[name])

    @torch.no_grad()
    def _swap(self) -> None:
        """Exchange the values of the model and of the average; parameters keep their place in memory."""
        for name, parameter in self._trained.items():
            held = parameter.clone()
            parameter.copy_(self._average[name])
            self._average[name].copy_(held)
