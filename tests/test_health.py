"""What is logged of a run's health, at no extra forward."""

import math
import warnings

import pytest
import torch
from transformers import TrainerControl, TrainerState

from tests.conftest import pairs
from tests.test_methods import assert_equal, logged, moved, trained, trainer_of, weights
from tests.tiny import tiny_stable_diffusion
from trl_diffusion import (
    DiffusionDPOConfig,
    DiffusionKTOConfig,
    DiffusionRPOConfig,
    DiffusionSFTConfig,
    ErrorGrowthCallback,
)
from trl_diffusion.losses import dpo_loss, kto_loss, rejected_gradient_scale
from trl_diffusion.trainer.metrics import gradient_factor, log_ratios_by_noise


def test_gradient_factor_of_a_sigmoid():
    """Known answers: DPO's slope is 2 sigmoid(-x) of its start, KTO's 4 sigmoid(x) sigmoid(-x)."""
    r = torch.tensor([0.0, 0.01, -0.01, 0.5])
    factor, exists = gradient_factor(lambda x: dpo_loss(x, torch.zeros_like(x), beta=200.0), r)
    torch.testing.assert_close(factor, 2 * torch.sigmoid(-100 * r))
    labels = torch.tensor([True, False, True, False])
    factor, _ = gradient_factor(lambda x: kto_loss(x, labels, beta=100.0, reference_point=0.0), r)
    torch.testing.assert_close(factor, 4 * torch.sigmoid(100 * r) * torch.sigmoid(-100 * r))
    assert exists.all()


def test_gradient_factor_of_an_image_without_weight_does_not_exist():
    labels = torch.tensor([True, False])
    _, exists = gradient_factor(
        lambda x: kto_loss(x, labels, beta=1.0, reference_point=0.0, undesirable_weight=0.0), torch.zeros(2)
    )
    assert exists.tolist() == [True, False]


def test_quarters_of_the_noise_range():
    log_ratios = torch.arange(4.0)
    metrics = log_ratios_by_noise(
        log_ratios, torch.tensor([0.0, 0.3, 0.99, 1.0]), torch.tensor([True, True, True, False])
    )
    found = {name: values[mask].tolist() for name, (values, mask) in metrics.items() if mask.any()}
    assert found == {
        "log_ratios/q1/chosen": [0.0],
        "log_ratios/q2/chosen": [1.0],
        "log_ratios/q4/chosen": [2.0],
        "log_ratios/q4/rejected": [3.0],
    }


@pytest.mark.parametrize("method", ["kto", "rpo", "dpo"])
def test_health_is_logged(tmp_path, method):
    trainer = trained(method, tmp_path, learning_rate=1e-2, optim="sgd", per_device_train_batch_size=8)
    assert logged(trainer, "health/gradient_factor")[0] == pytest.approx(1.0)
    assert logged(trainer, "health/negative_margins")[0] == 0.0
    assert all(0 <= value <= 1 for value in logged(trainer, "health/negative_margins"))
    for name in ("chosen", "rejected"):
        errors, ref_errors = logged(trainer, f"errors/{name}"), logged(trainer, f"ref_errors/{name}")
        growth = [error / ref for error, ref in zip(errors, ref_errors, strict=True)]
        assert logged(trainer, f"health/error_growth/{name}") == pytest.approx(growth)
        assert growth[0] == 1.0
    last = trainer.state.log_history[-2]
    quarters = [value for key, value in last.items() if key.startswith("log_ratios/")]
    assert any(value != 0 for value in quarters)
    # The means of the quarters, and the mean of all: each lies between the least and the largest.
    assert min(quarters) * 100 <= last["rewards/chosen"] <= max(quarters) * 100


@pytest.mark.parametrize("method", ["rpo", "dpo", "kto"])
def test_the_share_of_negative_margins_and_the_accuracy_leave_ties_only(tmp_path, method):
    trainer = trained(method, tmp_path, learning_rate=1e-2, optim="sgd")
    for right, wrong in zip(
        logged(trainer, "rewards/accuracies")[1:], logged(trainer, "health/negative_margins")[1:], strict=True
    ):
        assert right + wrong == pytest.approx(1.0)


# ---- The guards over the winners' error ----------------------------------------------------------------------------


def told(callback: ErrorGrowthCallback, growth: list[float | None]) -> tuple[list[int], int | None]:
    """At which logs the callback warns, and at which it first stops the training."""
    state, control, warned, stopped = TrainerState(), TrainerControl(), [], None
    state.is_world_process_zero = True
    for step, value in enumerate(growth):
        logs = {"loss": 1.0} if value is None else {callback.METRIC: value}
        state.log_history.append(logs)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            callback.on_log(None, state, control, logs=logs)
        warned += [step] * len(caught)
        if stopped is None and control.should_training_stop:
            stopped = step
    return warned, stopped


@pytest.mark.parametrize(
    ("growth", "warned"),
    [
        ([1.0, 1.2, 1.2, 1.2, 1.2], [2]),  # once for an excursion
        ([1.2, 1.0, 1.2, 1.0, 1.2], []),
        ([1.2, None, 1.2], [2]),  # an evaluation's log in between
        ([1.2, 1.2, 1.0, 1.2, 1.2], [1, 4]),
        ([1.1, 1.1, 1.1], []),  # at the limit, not beyond it
    ],
)
def test_guard_counts_logs_in_a_row(growth, warned):
    assert told(ErrorGrowthCallback(0.1, patience=2), growth) == (warned, None)
    assert told(ErrorGrowthCallback(0.1, patience=2, action="stop"), growth) == (warned, warned[0] if warned else None)


@pytest.mark.parametrize("method", ["kto", "rpo", "dpo"])
def test_guard_stops_a_run_that_falls_apart(tmp_path, method):
    """Policy and reference are unlike from the start: the policy answers three times too much."""
    pipeline = tiny_stable_diffusion()
    with torch.no_grad():
        pipeline.unet.conv_out.weight.mul_(3)
    options = {"ref_model": tiny_stable_diffusion().unet, "learning_rate": 0.0, "error_growth_limit": 0.1}
    with pytest.warns(
        UserWarning, match=r"more than 10% over the reference's in the last 2 logs .* the training stops"
    ):
        trainer = trained(
            method, tmp_path, pipeline=pipeline, error_growth_patience=2, error_growth_action="stop", **options
        )
    assert trainer.state.global_step == 2
    assert min(logged(trainer, ErrorGrowthCallback.METRIC)) > 1.1


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        (DiffusionDPOConfig, {"error_growth_limit": -0.1}, r"at least 0 and finite, found -0.1"),
        (DiffusionDPOConfig, {"error_growth_limit": math.nan}, r"at least 0 and finite, found nan"),
        (DiffusionKTOConfig, {"error_growth_action": "stop"}, r"belongs to `error_growth_limit`, found None"),
        (DiffusionRPOConfig, {"error_growth_limit": 0.1, "error_growth_action": "pray"}, r"must be one of.*'pray'"),
        (DiffusionRPOConfig, {"error_growth_limit": 0.1, "error_growth_patience": 0}, r"at least 1, found 0"),
        (DiffusionSFTConfig, {"error_growth_limit": 0.1}, r"does not have: leave it at None"),
        (DiffusionDPOConfig, {"winner_guard": 1.5}, r"must be in \[0, 1\], found 1.5"),
        (DiffusionDPOConfig, {"winner_guard": 0.9, "loss_type": "ipo"}, r"found loss_type='ipo': use"),
        (DiffusionDPOConfig, {"winner_guard": 0.9, "label_smoothing": 0.1}, r"found label_smoothing=0.1: use"),
    ],
)
def test_guards_refuse(tmp_path, config, options, words):
    with pytest.raises(ValueError, match=words):
        config(str(tmp_path), use_cpu=True, **options)


@pytest.mark.parametrize("config", [DiffusionKTOConfig, DiffusionRPOConfig, DiffusionSFTConfig])
def test_winner_guard_is_of_dpo(tmp_path, config):
    """Its formula compares an image's gradient with that of its own loser, which these do not have."""
    with pytest.raises(TypeError, match="unexpected keyword argument 'winner_guard'"):
        config(str(tmp_path), use_cpu=True, winner_guard=0.9)


@pytest.mark.parametrize(
    ("square", "product", "mu", "expected"),
    [
        (4.0, 8.0, 0.0, 0.5),
        (4.0, 8.0, 0.9, 0.05),
        (4.0, 1.0, 0.0, 1.0),  # nothing to hold back
        (4.0, -8.0, 0.9, 1.0),
        (0.0, 0.0, 0.9, 1.0),
        (4.0, 8.0, 1.0, 0.0),
    ],
)
def test_scale_of_the_rejected_gradient(square, product, mu, expected):
    scale = rejected_gradient_scale(torch.tensor(square), torch.tensor(product), mu=mu)
    assert scale.item() == pytest.approx(expected)


def test_scale_refuses():
    with pytest.raises(ValueError, match=r"`mu` must be in \[0, 1\], found -1"):
        rejected_gradient_scale(torch.ones(()), torch.ones(()), mu=-1)


@pytest.mark.parametrize("weighting", ["native", "min_snr"])
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge"])
def test_winner_guard_is_its_formula(tmp_path, weighting, loss_type):
    """The gradient of one step, put together from the gradients of single images' errors."""
    beta, mu = 10.0, 0.6
    trainer = trainer_of(
        "dpo",
        tmp_path,
        dataset=pairs(3),
        pipeline=moved("v_prediction"),
        ref_model=tiny_stable_diffusion("v_prediction").unet,
        per_device_train_batch_size=3,
        beta=beta,
        weighting=weighting,
        loss_type=loss_type,
        winner_guard=mu,
    )
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.compute_loss(trainer.model, inputs).backward()
    found = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    scale = trainer._metric_sums.pop_means(trainer.accelerator)["health/rejected_gradient_scale"]

    noised = trainer.corrupt(inputs)
    conditioning = noised.conditioning["encoder_hidden_states"]
    answer = trainer.model(noised.x_t, noised.t, conditioning).sample
    with torch.no_grad():
        ref_answer = trainer.reference.model(noised.x_t, noised.t, conditioning).sample
    errors = [noised.weight[i] * (answer[i] - noised.target[i]).square().mean() for i in range(6)]
    ref_errors = [noised.weight[i] * (ref_answer[i] - noised.target[i]).square().mean() for i in range(6)]
    by_output = [2 * noised.weight[i] * (answer[i] - noised.target[i]).detach() / answer[i].numel() for i in range(6)]
    inner = sum((by_output[i] * by_output[i + 3]).sum() for i in range(3))
    square = sum(by_output[i].square().sum() for i in range(3))
    expected_scale = min(1.0, (1 - mu) * (square / inner).item()) if inner > 0 else 1.0
    assert 0.05 < expected_scale < 0.95
    assert scale == pytest.approx(expected_scale, rel=1e-5)

    expected = {name: torch.zeros_like(p) for name, p in trainer.model.named_parameters()}
    for i in range(3):
        margin = ((ref_errors[i] - errors[i]) - (ref_errors[i + 3] - errors[i + 3])).item()
        slope = beta / 2 / (1 + math.exp(beta / 2 * margin)) if loss_type == "sigmoid" else beta * (beta * margin < 1)
        for image, factor in ((i, slope / 3), (i + 3, -slope / 3 * expected_scale)):
            grads = torch.autograd.grad(errors[image], list(trainer.model.parameters()), retain_graph=True)
            for name, grad in zip(expected, grads, strict=True):
                expected[name] += factor * grad
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-6, msg=name)


def test_winner_guard_changes_the_gradient_and_not_the_loss(tmp_path):
    plain = trained("dpo", tmp_path / "plain", max_steps=1)
    guarded = trained("dpo", tmp_path / "guarded", max_steps=1, winner_guard=0.9)
    assert logged(plain, "loss") == logged(guarded, "loss")
    (scale,) = logged(guarded, "health/rejected_gradient_scale")
    assert 0 < scale < 1
    assert not logged(plain, "health/rejected_gradient_scale")
    assert any(not torch.equal(p, weights(plain)[name]) for name, p in weights(guarded).items())


def test_winner_guard_of_two_micro_batches_resumes(tmp_path):
    options = {"winner_guard": 0.6, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    whole = trained("dpo", tmp_path / "whole", save_strategy="steps", save_steps=2, **options)
    resumed = trained("dpo", tmp_path / "resumed", resume=str(tmp_path / "whole" / "checkpoint-2"), **options)
    assert_equal(weights(whole), weights(resumed))
