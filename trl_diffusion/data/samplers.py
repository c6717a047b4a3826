"""
The order of an epoch, as a function of (seed, epoch): the same on every rank, and the same after a resume. So are the
numbers of the visits to each row, which go on over the epochs.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from .draws import ExampleKey


class Visits(NamedTuple):
    """The visits of a training to the rows of its data set, which are numbered from 0 on for each row."""

    counts: np.ndarray
    """How many there are, shape `(rows,)`."""
    windows: np.ndarray | None = None
    """
    Epoch and window of each, shape `(visits, 2)`: all of the first row, then all of the second one, and so on. For
    draws that depend on them.
    """


class KeyedSampler(Sampler[ExampleKey]):
    """
    Yields the [`ExampleKey`]s of an epoch, a whole number of optimizer steps long.

    Whole steps make the loss independent of how a step is split: a last, smaller step would be divided unequally over
    ranks and micro-batches. The last step of an epoch is filled with rows of a second shuffled pass, whose visits have
    numbers, and so noise, of their own, or left out with `drop_last`.

    With buckets, all rows of an optimizer step are of one bucket, and both rules hold for each bucket by itself; the
    steps come in random order, or bucket after bucket where nothing is shuffled.

    Args:
        num_examples (`int`):
            Number of rows.
        examples_per_step (`int`):
            Rows of one optimizer step: ranks x micro-batch x accumulation.
        seed (`int`):
            Seed of the order.
        shuffle (`bool`, *optional*, defaults to `True`):
            Whether to shuffle, anew in each epoch.
        drop_last (`bool`, *optional*, defaults to `False`):
            Whether to leave out the rows that fill no whole step (other rows in each epoch, if shuffled).
        rows_per_window (`int`, *optional*, defaults to `1`):
            How many consecutive rows share a window.
        buckets (`np.ndarray` of shape `(num_examples,)`, *optional*):
            The number of each row's bucket.
    """

    def __init__(
        self,
        num_examples: int,
        examples_per_step: int,
        seed: int,
        shuffle: bool = True,
        drop_last: bool = False,
        rows_per_window: int = 1,
        buckets: np.ndarray | None = None,
    ):
        buckets = np.zeros(num_examples, np.int64) if buckets is None else buckets
        self.members = {int(bucket): np.flatnonzero(buckets == bucket) for bucket in np.unique(buckets)}
        self.steps = {
            bucket: len(rows) // examples_per_step if drop_last else -(-len(rows) // examples_per_step)
            for bucket, rows in self.members.items()
        }
        if not any(self.steps.values()):
            raise ValueError(
                f"Found {num_examples} training rows, fewer than the {examples_per_step} of one optimizer step, and "
                "`dataloader_drop_last=True`: set it to False or make the step smaller."
            )
        self.examples_per_step, self.length = examples_per_step, sum(self.steps.values()) * examples_per_step
        self.seed, self.shuffle, self.rows_per_window, self.epoch = seed, shuffle, rows_per_window, 0
        # How often each row is visited in the epochs before this one.
        self._counted = 0, np.zeros(num_examples, np.int64)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    @property
    def steps_per_epoch(self) -> int:
        return self.length // self.examples_per_step

    def _rng(self, epoch: int, stream: int, bucket: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, epoch, stream, *([bucket] if bucket else [])])

    def _passes(
        self, rows: np.ndarray, count: int, epoch: int, stream: int, bucket: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """`count` rows in shuffled passes, each row once before any comes again; and the number of each one's pass."""
        repeats = np.arange(count) // len(rows)
        if not self.shuffle or count == 0:
            return np.resize(rows, count), repeats
        rng = self._rng(epoch, stream, bucket)
        passes = [rng.permutation(rows) for _ in range(-(-count // len(rows)))]
        return np.concatenate(passes)[:count], repeats

    def _draw(self, bucket: int, count: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """`count` rows of a bucket, and their repeats."""
        return self._passes(self.members[bucket], count, epoch, 0, bucket)

    def order(self) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers of the current epoch and the numbers of their visits, each of shape `(len(self),)`."""
        counted, before = self._counted
        if counted > self.epoch:
            counted, before = 0, np.zeros_like(before)
        for epoch in range(counted, self.epoch):
            before = before + np.bincount(self._order(epoch)[0], minlength=len(before))
        self._counted = self.epoch, before
        rows, repeats = self._order(self.epoch)
        return rows, before[rows] + repeats

    def visits(self, steps: int, with_windows: bool = False) -> Visits:
        """
        The visits of the first so many optimizer steps of a training.

        Args:
            steps (`int`): Optimizer steps.
            with_windows (`bool`, *optional*, defaults to `False`): Whether `windows` is needed, which takes memory.
        """
        left = steps * self.examples_per_step
        counts, parts = np.zeros_like(self._counted[1]), []
        for epoch in range(-(-left // len(self))):
            rows = self._order(epoch)[0][:left]
            left -= len(rows)
            counts += np.bincount(rows, minlength=len(counts))
            if with_windows:
                windows = np.arange(len(rows)) // self.rows_per_window
                parts.append(np.stack([rows, np.full_like(rows, epoch), windows], axis=1))
        if not with_windows:
            return Visits(counts)
        # A stable sort: of one row, the earlier visit stays first.
        every = np.concatenate(parts)
        return Visits(counts, every[np.argsort(every[:, 0], kind="stable"), 1:])

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers of an epoch, and how often each has come before in it."""
        steps = np.repeat(list(self.steps), list(self.steps.values()))
        if self.shuffle and len(self.steps) > 1:
            steps = self._rng(epoch, 4, 0).permutation(steps)
        order = np.empty((2, len(steps), self.examples_per_step), np.int64)
        for bucket, count in self.steps.items():
            rows_and_repeats = np.stack(self._draw(bucket, count * self.examples_per_step, epoch))
            order[:, steps == bucket] = rows_and_repeats.reshape(2, count, self.examples_per_step)
        rows, repeats = order.reshape(2, -1)
        return rows, repeats

    def __iter__(self) -> Iterator[ExampleKey]:
        for place, (row, visit) in enumerate(zip(*self.order(), strict=True)):
            yield ExampleKey(int(row), int(visit), self.epoch, place // self.rows_per_window)


class DesirableRatioSampler(KeyedSampler):
    """
    Diffusion-KTO's gamma: each draw is a liked image with probability `desirable_ratio`, else a disliked one.

    Inside each of the two sets the draws run in shuffled passes: every image has the same chance, and none comes a
    second time before all others of its set have come.

    Args:
        labels (`np.ndarray` of shape `(num_examples,)`): True for liked rows. Both kinds must occur.
        desirable_ratio (`float`): Probability of a liked image, in (0, 1].
        examples_per_step (`int`): Rows of one optimizer step.
        seed (`int`): Seed of the order.
        drop_last (`bool`, *optional*, defaults to `False`): See [`KeyedSampler`].
        buckets (`np.ndarray` of shape `(num_examples,)`, *optional*): See [`KeyedSampler`]. Each needs both kinds.

    Source: [Diffusion-KTO](https://huggingface.co/papers/2404.04465), section on data sampling.
    """

    def __init__(
        self,
        labels: np.ndarray,
        desirable_ratio: float,
        examples_per_step: int,
        seed: int,
        drop_last: bool = False,
        buckets: np.ndarray | None = None,
    ):
        super().__init__(len(labels), examples_per_step, seed, drop_last=drop_last, buckets=buckets)
        self.labels, self.desirable_ratio = labels, desirable_ratio
        for rows in self.members.values():
            if labels[rows].all() or not labels[rows].any():
                raise ValueError(
                    f"All {len(rows)} labels in the bucket of row {rows[0]} are {bool(labels[rows[0]])}, expected "
                    "liked and disliked images in each: set `desirable_ratio=None`, or drop that size of `resolution`."
                )

    def _draw(self, bucket: int, count: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        members = self.members[bucket]
        coins = self._rng(epoch, 1, bucket).random(count) < self.desirable_ratio
        rows, repeats = np.empty(count, np.int64), np.empty(count, np.int64)
        for stream, where in enumerate([coins, ~coins], start=2):
            kind = members[self.labels[members] == (stream == 2)]
            rows[where], repeats[where] = self._passes(kind, int(where.sum()), epoch, stream, bucket)
        return rows, repeats
