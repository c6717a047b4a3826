"""Randomness as a function of (seed, epoch, example), and the order of an epoch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_diffusion.data.draws import Draws, ExampleKey
from trl_diffusion.data.samplers import DesirableRatioSampler, KeyedSampler


keys = st.builds(ExampleKey, st.integers(0, 10**9), st.integers(-1, 1000))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32), key=keys)
def test_draws_are_a_function_of_seed_and_key(seed, key):
    one, two = Draws(seed, key), Draws(seed, key)
    torch.randn(3)  # the global generator plays no part
    assert torch.equal(one.normal("noise", (2, 3)), two.normal("noise", (2, 3)))
    assert one.uniform("timestep") == two.uniform("timestep")
    assert 0 <= one.uniform("timestep") < 1


@settings(max_examples=50, deadline=None)
@given(key=keys)
def test_another_seed_key_or_purpose_is_another_draw(key):
    base = Draws(0, key).uniform("timestep")
    others = [
        Draws(1, key),
        *(Draws(0, key._replace(**{name: getattr(key, name) + 1})) for name in ("row", "visit")),
    ]
    assert all(other.uniform("timestep") != base for other in others)
    assert Draws(0, key).uniform("flip") != base


def test_draws_are_standard_and_independent_over_examples():
    timesteps = torch.tensor([Draws(0, ExampleKey(i, 0)).uniform("timestep") for i in range(4000)])
    noise = torch.stack([Draws(0, ExampleKey(i, 0)).normal("noise", (4,)) for i in range(4000)])
    # Bounds of 4.5 standard errors.
    assert abs(timesteps.mean() - 0.5) < 4.5 * (1 / 12 / 4000) ** 0.5
    assert noise.mean(0).abs().max() < 4.5 / 4000**0.5
    assert (noise.T @ noise / 4000 - torch.eye(4)).abs().max() < 0.11
    assert abs(torch.corrcoef(torch.stack([timesteps[:-1], timesteps[1:]]))[0, 1]) < 4.5 / 4000**0.5


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(1, 60), per_step=st.integers(1, 16), epoch=st.integers(0, 5))
def test_an_epoch_is_whole_steps_and_visits_every_row(rows, per_step, epoch):
    sampler = KeyedSampler(rows, per_step, seed=3)
    sampler.set_epoch(epoch)
    found = list(sampler)
    assert len(found) == len(sampler)
    assert len(found) % per_step == 0
    assert 0 <= len(found) - rows < per_step
    assert len({(key.row, key.visit) for key in found}) == len(found), "a row that comes again is another visit"
    assert {key.row for key in found} == set(range(rows))
    assert {key.epoch for key in found} == {epoch}
    assert min(key.visit for key in found) >= epoch
    assert found == list(sampler)


def test_epochs_differ_and_seeds_differ():
    def order(seed: int, epoch: int) -> list[int]:
        sampler = KeyedSampler(32, 8, seed)
        sampler.set_epoch(epoch)
        return [key.row for key in sampler]

    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


def test_sequential_order_and_drop_last():
    assert [key.row for key in KeyedSampler(5, 2, seed=0, shuffle=False)] == [0, 1, 2, 3, 4, 0]
    assert [key.row for key in KeyedSampler(5, 2, seed=0, shuffle=False, drop_last=True)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="fewer than the 8 of one optimizer step"):
        KeyedSampler(5, 8, seed=0, drop_last=True)


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.8, 1.0])
def test_desirable_ratio_is_the_share_of_liked_draws(ratio):
    labels = np.random.default_rng(0).random(4000) < 0.1
    rows = np.array([key.row for key in DesirableRatioSampler(labels, ratio, 8, seed=0)])
    share = labels[rows].mean()
    assert abs(share - ratio) <= 4.5 * (ratio * (1 - ratio) / 4000) ** 0.5
    # Uniform inside each set: counts of any two members differ by at most one.
    for members in (np.flatnonzero(labels), np.flatnonzero(~labels)):
        counts = np.bincount(rows, minlength=4000)[members]
        assert counts.max() - counts.min() <= 1


def test_desirable_ratio_keys_are_distinct_and_repeatable():
    labels = np.array([True] + [False] * 9)
    sampler = DesirableRatioSampler(labels, 0.8, 5, seed=0)
    first = list(sampler)
    assert len(set(first)) == len(first) == 10
    assert first == list(sampler)
    sampler.set_epoch(1)
    assert [key.row for key in first] != [key.row for key in sampler]


def samplers(seed: int) -> dict[str, KeyedSampler]:
    rng = np.random.default_rng(seed)
    labels, buckets = np.arange(23) % 10 == 0, rng.permutation(np.arange(23) % 2)
    common = {"examples_per_step": 4, "seed": seed}
    return {
        "ragged": KeyedSampler(23, **common, rows_per_window=2),
        "whole": KeyedSampler(24, **common),
        "sequential": KeyedSampler(23, **common, shuffle=False),
        "drop_last": KeyedSampler(23, **common, drop_last=True),
        "buckets": KeyedSampler(23, **common, buckets=buckets),
        "buckets and drop_last": KeyedSampler(23, **common, buckets=buckets, drop_last=True, rows_per_window=4),
        "desirable ratio": DesirableRatioSampler(labels, 0.8, **common),
        "desirable ratio and drop_last": DesirableRatioSampler(labels, 0.5, **common, drop_last=True),
        "desirable ratio in buckets": DesirableRatioSampler(np.arange(23) % 4 == 0, 0.8, **common, buckets=buckets),
    }


@pytest.mark.parametrize("name", samplers(0))
@pytest.mark.parametrize("steps", [1, 6, 17])
def test_visits_are_numbered_over_the_whole_training(name, steps):
    """One after the other for each row, whatever epoch they are in; and counted beforehand as they come."""
    sampler = samplers(3)[name]
    keys = []
    for epoch in range(-(-steps // sampler.steps_per_epoch)):
        sampler.set_epoch(epoch)
        keys += list(sampler)
    keys = keys[: steps * 4]
    seen = np.zeros(len(sampler.visits(1).counts), int)
    for key in keys:
        assert key.visit == seen[key.row]
        seen[key.row] += 1
    visits = sampler.visits(steps, with_windows=True)
    assert visits.counts.tolist() == seen.tolist()
    assert visits.windows.tolist() == [[key.epoch, key.window] for key in sorted(keys)]
    # A sampler that starts in a later epoch, or goes back to an earlier one, gives the same.
    again = samplers(3)[name]
    for epoch in (2, 0, 1):
        sampler.set_epoch(epoch)
        again.set_epoch(epoch)
        assert list(again) == list(sampler)
