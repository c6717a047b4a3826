"""Randomness as a function: what is random about an example depends on (seed, example, visit), on nothing else.

Timestep, noise, posterior sample, crop, flip and prompt dropout of an example come from generators keyed by these
numbers. Hence a batch may be split over ranks, workers and micro-batches in any way without a change in the numbers,
and a resumed run draws what the uninterrupted run would have drawn.
"""

import hashlib
import struct
from dataclasses import dataclass
from typing import NamedTuple

import torch


# The number of the visit, and of the epoch, of evaluation draws: they stay the same during the whole training.
EVALUATION = -1


class ExampleKey(NamedTuple):
    """
    Names one visit to one example.

    `visit` numbers the visits of the row from 0 on over the whole training, however many of them an epoch has. `epoch`
    and `window` say when it is: `window` numbers the windows of the epoch, the rows over which a method takes its
    statistics.
    """

    row: int
    visit: int = EVALUATION
    epoch: int = EVALUATION
    window: int = 0


@dataclass(frozen=True)
class Draws:
    """
    The random numbers of one visit to one example. Epoch and window have no part in them but through
    [`Draws.of_window`].

    Each purpose has a stream of its own: switching random flips on, say, leaves the timesteps and the noise as they
    were.

    Args:
        seed (`int`): Seed of the run.
        key ([`ExampleKey`]): The visit.
    """

    seed: int
    key: ExampleKey

    def generator(self, purpose: str) -> torch.Generator:
        """A CPU generator for one purpose. CPU, so that the numbers are the same on every device."""
        return self._generator(purpose, self.key.visit, self.key.row, 0)

    def _generator(self, purpose: str, *numbers: int) -> torch.Generator:
        packed = struct.pack("<qqqq", self.seed, *numbers)
        digest = hashlib.blake2b(packed + purpose.encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

    def of_window(self) -> "Draws":
        """What all examples of the window share."""
        return _WindowDraws(self.seed, self.key)

    def uniform(self, purpose: str) -> float:
        """A number in [0, 1)."""
        return torch.rand((), generator=self.generator(purpose), dtype=torch.float64).item()

    def normal(self, purpose: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Independent standard normal numbers, float32."""
        return torch.randn(shape, generator=self.generator(purpose))


class _WindowDraws(Draws):
    def generator(self, purpose: str) -> torch.Generator:
        return self._generator(purpose, self.key.epoch, self.key.window, -1)
