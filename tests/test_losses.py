"""Losses: known answers, an independent formula, finite differences, and the properties that the papers rely on."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_diffusion.losses import apo_zero_unpaired_loss, kto_loss, kto_reference_point


UTILITIES = ("kahneman_tversky", "loss_averse", "risk_seeking")
ratios = st.lists(st.floats(-2e-3, 2e-3), min_size=1, max_size=8)


def independent(r: float, liked: bool, z: float, beta: float, utility: str) -> float:
    """`1 - U(x)` in plain Python, from the definitions of the utilities."""
    x = beta * (r - z) if liked else beta * (z - r)
    sigmoid = 1 / (1 + math.exp(-x))
    value = {"kahneman_tversky": sigmoid, "loss_averse": math.log(sigmoid), "risk_seeking": -math.log(1 - sigmoid)}
    return 1 - value[utility]


@pytest.mark.parametrize(
    ("r", "liked", "z", "expected"),
    [
        (0.0, True, 0.0, 0.5),
        (0.0, False, 0.0, 0.5),
        (math.log(3), True, 0.0, 0.25),  # sigmoid(log 3) = 3/4
        (math.log(3), False, 0.0, 0.75),
        (math.log(3), True, math.log(3), 0.5),
    ],
)
def test_known_answers(r, liked, z, expected):
    loss = kto_loss(torch.tensor([r]), torch.tensor([liked]), beta=1.0, reference_point=z)
    torch.testing.assert_close(loss, torch.tensor([expected]))


@pytest.mark.parametrize("utility", UTILITIES)
@settings(max_examples=30, deadline=None)
@given(values=ratios, beta=st.floats(1, 5000), z=st.floats(0, 1e-3), data=st.data())
def test_equals_an_independent_formula(utility, values, beta, z, data):
    labels = data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    found = kto_loss(
        torch.tensor(values, dtype=torch.float64),
        torch.tensor(labels),
        beta=beta,
        reference_point=z,
        utility=utility,
        desirable_weight=1.5,
        undesirable_weight=0.5,
    )
    expected = [
        (1.5 if liked else 0.5) * independent(r, liked, z, beta, utility)
        for r, liked in zip(values, labels, strict=True)
    ]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("utility", UTILITIES)
def test_gradient_against_finite_differences(utility):
    torch.manual_seed(0)
    log_ratios = (torch.randn(6, dtype=torch.float64) * 1e-3).requires_grad_()
    labels = torch.tensor([True, False] * 3)
    torch.autograd.gradcheck(
        lambda r: kto_loss(r, labels, beta=1000.0, reference_point=2e-4, utility=utility), log_ratios, eps=1e-8
    )
    torch.autograd.gradcheck(lambda r: apo_zero_unpaired_loss(r, labels, beta=1000.0), log_ratios, eps=1e-8)


@settings(max_examples=30, deadline=None)
@given(values=ratios)
def test_apo_zero_is_kto_without_reference_point(values):
    r = torch.tensor(values)
    labels = torch.arange(len(values)) % 2 == 0
    expected = torch.where(labels, 1 - torch.sigmoid(5000 * r), torch.sigmoid(5000 * r))
    torch.testing.assert_close(apo_zero_unpaired_loss(r, labels, beta=5000.0), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("utility", UTILITIES)
def test_loss_falls_for_liked_and_rises_for_disliked_images(utility):
    r = torch.linspace(-1e-3, 1e-3, 21)
    liked = kto_loss(r, torch.ones(21, dtype=torch.bool), beta=2000.0, reference_point=0.0, utility=utility)
    disliked = kto_loss(r, torch.zeros(21, dtype=torch.bool), beta=2000.0, reference_point=0.0, utility=utility)
    assert (liked.diff() < 0).all()
    assert (disliked.diff() > 0).all()
    torch.testing.assert_close(disliked, liked.flip(0))


def test_utilities_curve_as_their_names_say():
    """Risk aversion is a concave utility, risk seeking a convex one, Kahneman and Tversky's S turns at 0."""
    x = torch.linspace(-4, 4, 81, dtype=torch.float64)
    labels = torch.ones(81, dtype=torch.bool)
    value = {u: 1 - kto_loss(x, labels, beta=1.0, reference_point=0.0, utility=u) for u in UTILITIES}
    curvature = {u: v.diff(n=2) for u, v in value.items()}
    assert (curvature["loss_averse"] < 0).all()
    assert (curvature["risk_seeking"] > 0).all()
    assert (curvature["kahneman_tversky"][:39] > 0).all()
    assert (curvature["kahneman_tversky"][40:] < 0).all()


def test_reference_point_is_a_clamped_detached_mean():
    total = torch.tensor(0.3, requires_grad=True)
    z = kto_reference_point(total, 3)
    assert z.item() == pytest.approx(0.1)
    assert not z.requires_grad
    assert kto_reference_point(torch.tensor(-0.3), 3).item() == 0


def test_no_gradient_flows_through_the_reference_point():
    r = torch.tensor([1e-3, 2e-3], requires_grad=True)
    labels = torch.tensor([True, True])
    (with_tensor,) = torch.autograd.grad(kto_loss(r, labels, beta=100.0, reference_point=r.mean()).sum(), r)
    (with_number,) = torch.autograd.grad(kto_loss(r, labels, beta=100.0, reference_point=r.mean().item()).sum(), r)
    torch.testing.assert_close(with_tensor, with_number)


@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan")])
def test_beta_must_be_positive(beta):
    with pytest.raises(ValueError, match="`beta` must be positive, found"):
        kto_loss(torch.zeros(1), torch.tensor([True]), beta=beta, reference_point=0.0)


def test_labels_must_be_booleans_of_the_same_shape():
    for labels in (torch.ones(2), torch.ones(3, dtype=torch.bool)):
        with pytest.raises(ValueError, match="bool tensor of shape"):
            kto_loss(torch.zeros(2), labels, beta=1.0, reference_point=0.0)


def test_unknown_utility_is_refused():
    with pytest.raises(ValueError, match="Unknown utility 'log'"):
        kto_loss(torch.zeros(1), torch.tensor([True]), beta=1.0, reference_point=0.0, utility="log")
