"""An exponential moving average of the trained weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import TrainerCallback

from . import engines


class EMACallback(TrainerCallback):
    """
    Keeps an exponential moving average of the trained weights: `average = d * average + (1 - d) * weights` after each
    optimizer step, with `d = min(decay, (1 + n) / (10 + n))` after `n` earlier ones, 0 after the first step, as
    diffusers' `EMAModel`: without this warm-up the average would be mostly the start for `1 / (1 - decay)` steps. Each
    rank averages what it holds of the weights.

    Args:
        trainer ([`DiffusionTrainer`]): The trainer.
        decay (`float`): Largest weight of the average so far, in (0, 1).
    """

    def __init__(self, trainer, decay: float):
        self.trainer, self.decay = trainer, decay
        self.average: list[torch.Tensor] = []

    def _parts(self) -> list[torch.Tensor]:
        policy = engines.at_rest(self.trainer.model_wrapped, self.trainer.accelerator)
        return engines.local_parts(policy, trained=True)

    @torch.no_grad()
    def on_train_begin(self, args, state, control, **kwargs):
        if not self.average:
            self.average = [part.clone() for part in self._parts()]

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        before = state.global_step - 1
        decay = min(self.decay, (1 + before) / (10 + before)) if before else 0.0
        for average, part in zip(self.average, self._parts(), strict=True):
            average.lerp_(part, 1 - decay)

    @contextmanager
    def in_place_of_the_weights(self) -> Iterator[None]:
        """The policy holds the average inside the block, on all ranks, and its weights again after it."""
        if not self.average:  # before the first step they are equal
            yield
            return
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for average, part in zip(self.average, self._parts(), strict=True):
            weights = part.clone()
            part.copy_(average)
            average.copy_(weights)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Takes up the average that a checkpoint holds in the files of the weights themselves."""
        # The policy is loaded with it for a moment, and gets its own weights back by the exchange.
        self.average = [part.clone() for part in self._parts()]
        self.trainer._load_from_checkpoint(str(folder))
        self._exchange()
