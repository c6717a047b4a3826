"""`window="step"`: however a step is split, its statistics, its loss and its gradient are those of one large batch."""

import numpy as np
import pytest
import torch

from tests.conftest import pairs, unpaired
from tests.test_methods import BOTH, assert_close, assert_equal, logged, losses, trained, trainer_of, weights


SPLITS = [(8, 1), (4, 2), (2, 4), (1, 8)]
METHODS = pytest.mark.parametrize(
    ("method", "options"),
    [
        ("kto", {"desirable_ratio": None}),
        ("rpo", {}),
        ("rpo", {"timestep_sharing": "window", "diagonal": "exclude", "weight_placement": "inside"}),
    ],
    ids=["kto", "rpo", "rpo with other options"],
)
DATA = {"kto": unpaired, "rpo": pairs}


@METHODS
@BOTH
def test_a_step_may_be_split_in_any_way(tmp_path, method, options, peft_config):
    """Plain gradient descent, so that a gradient that is off by a factor shows; a batch of one is a split too."""
    common = {"window": "step", "optim": "sgd", "learning_rate": 1e-2, **options}
    runs = [
        trained(
            method,
            tmp_path / str(accumulation),
            dataset=DATA[method](16),
            peft_config=peft_config,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            **common,
        )
        for batch, accumulation in SPLITS
    ]
    start = weights(trainer_of(method, tmp_path, peft_config=peft_config))
    assert any(not torch.equal(p, start[name]) for name, p in weights(runs[0]).items())
    for run in runs[1:]:
        np.testing.assert_allclose(losses(run), losses(runs[0]), rtol=0, atol=1e-5)
        assert_close(weights(runs[0]), weights(run))
        for name in ("kl", "rewards/accuracies", "contrast/effective_losers", "errors/chosen"):
            np.testing.assert_allclose(logged(run, name), logged(runs[0], name), rtol=0, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("method", ["kto", "rpo"])
def test_the_window_of_a_batch_is_another_statistic(tmp_path, method):
    """Else the test above would prove nothing."""
    options = {"desirable_ratio": None} if method == "kto" else {}
    common = {"dataset": DATA[method](16), "optim": "sgd", "learning_rate": 1e-2, "beta": 1000.0, **options}
    whole = trained(method, tmp_path / "whole", per_device_train_batch_size=8, **common)
    parts = trained(method, tmp_path / "parts", per_device_train_batch_size=2, gradient_accumulation_steps=4, **common)
    assert not np.allclose(losses(parts), losses(whole), rtol=0, atol=1e-4)


def test_the_mismatched_reference_point_spans_the_step_too(tmp_path):
    """Its neighbours are those of the micro-batch, so that only the number of micro-batches is free."""
    options = {"reference_point": "mismatched", "window": "step", "desirable_ratio": None, "beta": 1000.0}
    whole = trained("kto", tmp_path / "whole", per_device_train_batch_size=4, gradient_accumulation_steps=2, **options)
    assert any(value > 0 for value in logged(whole, "kl"))
    batch = trained(
        "kto",
        tmp_path / "batch",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        **(options | {"window": "batch"}),
    )
    assert losses(batch) != losses(whole)


@pytest.mark.parametrize(("window", "policy"), [("batch", 4), ("step", 8)])
def test_scoring_costs_one_more_forward_of_the_policy_and_none_of_the_reference(tmp_path, window, policy):
    trainer = trainer_of(
        "rpo",
        tmp_path,
        window=window,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        max_steps=1,
        gradient_checkpointing=False,
    )
    forwards = []
    trainer.model.register_forward_pre_hook(lambda *_: forwards.append("policy"))
    trainer.reference.model.register_forward_pre_hook(lambda *_: forwards.append("reference"))
    trainer.train()
    assert forwards.count("policy") == policy
    assert forwards.count("reference") == 4


@pytest.mark.parametrize("method", ["kto", "rpo"])
@BOTH
def test_resume_is_bit_for_bit(tmp_path, method, peft_config):
    options = {"window": "step", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    options |= {"peft_config": peft_config, "save_strategy": "steps", "save_steps": 2}
    whole = trained(method, tmp_path / "whole", **options)
    resumed = trained(method, tmp_path / "resumed", resume=str(tmp_path / "whole" / "checkpoint-2"), **options)
    assert losses(resumed) == losses(whole)
    assert_equal(weights(resumed), weights(whole))


@pytest.mark.parametrize("method", ["kto", "rpo"])
def test_dropout_is_refused(tmp_path, method):
    with pytest.raises(ValueError, match=r"scores each micro-batch before it trains on it.*`disable_dropout` at True"):
        trainer_of(method, tmp_path, window="step", disable_dropout=False)


@pytest.mark.parametrize("method", ["kto", "rpo"])
def test_a_step_is_scored_in_the_mode_that_it_is_trained_in(tmp_path, method):
    """After an evaluation, and with a model that was loaded for inference: some models answer otherwise then."""
    trainer = trainer_of(method, tmp_path, window="step", max_steps=2, gradient_accumulation_steps=2)
    trainer.model.eval()
    modes, denoise = [], trainer.denoise
    trainer.denoise = lambda model, noised: (modes.append(trainer.model.training), denoise(model, noised))[1]
    trainer.train()
    assert modes
    assert all(modes)
