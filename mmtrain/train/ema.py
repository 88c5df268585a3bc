"""Exponential moving average (EMA) of the trained weights: a second fp32 copy, updated after every step. With --ema,
validation uses it, and checkpoints save it as the model's weights; for resuming they also have the weights that the
optimizer updates."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """The moving average of a model's trainable parameters: after each step average += (1 - decay) (weights - average).
    It starts as a copy. In the first steps the decay is (1 + step) / (10 + step) if that is smaller, as in TensorFlow;
    else the initial weights would dominate for about 1 / (1 - decay) steps. decay: 0 to below 1."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._average = {name: p.detach().clone() for name, p in self._trained.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the average with the weights after optimizer step `step`, counted from 0."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, parameter in self._trained.items():
            self._average[name].lerp_(parameter.detach(), share)

    @contextmanager
    def in_place(self) -> Iterator[dict[str, Tensor]]:
        """Context manager inside which the model's parameters have the values of the average. Yields the values that
        the optimizer updates, by parameter name; they are put back on leaving, also after an exception."""
        self._swap()
        try:
            yield self._average
        finally:
            self._swap()

    @torch.no_grad()
    def resume(self, weights: Mapping[str, Tensor]) -> None:
        """Continue from a checkpoint whose weights (the average) the model has just loaded: copy them to the average,
        then copy `weights` to the parameters. weights: the values that the optimizer updates, by parameter name."""
        assert set(weights) == set(self._trained), set(weights) ^ set(self._trained)
        for name, parameter in self._trained.items():
            self._average[name].copy_(parameter)
            parameter.copy_(weights[name])

    @torch.no_grad()
    def _swap(self) -> None:
        """Exchange the values of the parameters and of the average; the parameters' memory addresses do not change."""
        for name, parameter in self._trained.items():
            held = parameter.clone()
            parameter.copy_(self._average[name])
            self._average[name].copy_(held)
