"""Reference errors computed beforehand: the training is the one with a live reference, to the last bit."""

import numpy as np
import pytest
from datasets import Dataset

from tests.conftest import pairs, unpaired
from tests.test_features import calls, in_two_buckets
from tests.test_methods import LORA, assert_equal, logged, losses, trained, trainer_of, weights
from tests.test_processes import launch, result


def liked(share: float, rows: int = 20) -> Dataset:
    """Single images of which so many are liked, the liked ones first."""
    data = unpaired(rows).remove_columns("label")
    return data.add_column("label", [i < share * rows for i in range(rows)])


def single(dataset: Dataset) -> Dataset:
    """The chosen images of pairs, half of them liked."""
    data = dataset.remove_columns("rejected").rename_column("chosen", "image")
    return data.add_column("label", [i % 2 == 0 for i in range(len(data))])


BUCKETS = {"resolution": ["16x24", "24x16"]}
EPOCHS = {"max_steps": -1}
CASES = {
    **{
        f"kto, {share:.0%} liked, {epochs} epochs": (
            "kto",
            lambda share=share: liked(share),
            {"num_train_epochs": epochs},
        )
        for share in (0.1, 0.26, 0.5)
        for epochs in (1, 3)
    },
    "kto, rows as they come": ("kto", lambda: unpaired(10), {"desirable_ratio": None, "num_train_epochs": 2}),
    "kto, by steps": ("kto", lambda: liked(0.1), {"max_steps": 7, "peft_config": LORA}),
    "kto, drop_last": ("kto", lambda: liked(0.26, 18), {"num_train_epochs": 2.4, "dataloader_drop_last": True}),
    "kto, buckets": ("kto", lambda: single(in_two_buckets(18)), {"num_train_epochs": 2} | BUCKETS),
    "kto, a whole step": (
        "kto",
        lambda: liked(0.26),
        {"num_train_epochs": 2, "window": "step", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    ),
    "dpo, ragged": ("dpo", lambda: pairs(10), {"num_train_epochs": 2}),
    "dpo, ragged lora": ("dpo", lambda: pairs(10), {"num_train_epochs": 2, "peft_config": LORA}),
    "dpo, part of an epoch": ("dpo", lambda: pairs(10), {"num_train_epochs": 1.5}),
    "dpo, fewer steps than an epoch": ("dpo", lambda: pairs(10), {"max_steps": 1}),
    "dpo, fewer rows than a step": ("dpo", lambda: pairs(3), {"max_steps": 4}),
    "dpo, workers": ("dpo", lambda: pairs(10), {"max_steps": 4, "dataloader_num_workers": 1}),
    "dpo, sequential": (
        "dpo",
        lambda: pairs(10),
        {"num_train_epochs": 2, "train_sampling_strategy": "sequential"},
    ),
    "dpo, buckets": ("dpo", lambda: in_two_buckets(17), {"num_train_epochs": 2} | BUCKETS),
    "dpo, buckets and drop_last": (
        "dpo",
        lambda: in_two_buckets(17),
        {"num_train_epochs": 3, "dataloader_drop_last": True, "cache_features": True} | BUCKETS,
    ),
    "rpo, ragged": ("rpo", lambda: pairs(10), {"num_train_epochs": 2}),
    "rpo, drop_last": ("rpo", lambda: pairs(11), {"num_train_epochs": 3, "dataloader_drop_last": True}),
    "rpo, a timestep per window": ("rpo", lambda: pairs(10), {"num_train_epochs": 3, "timestep_sharing": "window"}),
    "rpo, a timestep per step": (
        "rpo",
        lambda: pairs(10),
        {
            "num_train_epochs": 2,
            "timestep_sharing": "window",
            "window": "step",
            "gradient_accumulation_steps": 2,
            "per_device_train_batch_size": 2,
        },
    ),
}


def both(folder, method: str, data, **options):
    """The training with a live reference, and the one with errors computed beforehand."""
    options = {"learning_rate": 1e-3, "save_strategy": "no"} | ({} if "max_steps" in options else EPOCHS) | options
    return [
        trained(method, folder / str(computed), data(), precompute_ref_log_probs=computed, **options)
        for computed in (False, True)
    ]


@pytest.mark.parametrize("case", CASES)
def test_the_training_is_the_live_one(tmp_path, case):
    method, data, options = CASES[case]
    live, computed = both(tmp_path, method, data, **options)
    assert computed.reference is None
    assert len(losses(live)) == live.state.max_steps
    assert losses(computed) == losses(live)
    assert_equal(weights(computed), weights(live))
    # What is visited is computed, and no more; no visit repeats a draw.
    sampler = computed._get_train_sampler()
    counts = sampler.visits(computed.state.max_steps).counts
    assert [len(errors) for errors in computed.train_dataset["ref_errors"]] == counts.tolist()
    drawn = [tuple(draw) for errors in computed.train_dataset["ref_errors"] for draw in errors]
    assert len(set(drawn)) == len(drawn) == counts.sum()


def test_another_micro_batch_takes_no_errors_of_the_first(tmp_path):
    """A step that is split in another way has the same visits; but errors differ in the last digits."""
    options = {"num_train_epochs": 1, "window": "step"}
    for batch in (4, 1):
        split = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 4 // batch}
        live, computed = both(tmp_path / str(batch), "kto", lambda: liked(0.4), learning_rate=1e-4, **split, **options)
        assert losses(computed) == losses(live)
        assert logged(computed, "ref_errors/chosen") == logged(live, "ref_errors/chosen")
        assert_equal(weights(computed), weights(live))


@pytest.mark.parametrize("case", ["rpo, a timestep per window", "dpo, buckets"])
def test_evaluation_is_the_live_one_too(tmp_path, case):
    method, data, options = CASES[case]
    held_out = {"rpo": pairs, "dpo": in_two_buckets}[method](8)
    live, computed = both(tmp_path, method, data, eval_dataset=held_out, **options)
    one, two = live.evaluate(), computed.evaluate()
    for name in ("eval_loss", "eval_ref_errors/chosen"):
        assert two[name] == pytest.approx(one[name], abs=1e-6)


@pytest.mark.parametrize("case", ["kto, 10% liked, 3 epochs", "dpo, buckets", "rpo, ragged"])
def test_after_a_resume_in_the_midst_of_an_epoch(tmp_path, case):
    method, data, options = CASES[case]
    options = options | {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 2}
    live, computed = both(tmp_path, method, data, **options)
    steps_per_epoch = computed._get_train_sampler().steps_per_epoch
    step = next(
        step for step in range(2, live.state.max_steps, 2) if step > steps_per_epoch and step % steps_per_epoch
    )
    options = EPOCHS | {"learning_rate": 1e-3} | options | {"save_strategy": "no"}
    checkpoint = str(tmp_path / "False" / f"checkpoint-{step}")  # of the live run
    again = trained(method, tmp_path / "2", data(), resume=checkpoint, precompute_ref_log_probs=True, **options)
    assert losses(again) == losses(computed) == losses(live)
    assert_equal(weights(again), weights(live))


# Two ranks with a batch of 2 each, and what is told to `scripts/train.py`.
ON_TWO_RANKS = {
    "kto": {"liked": 0.1, "rows": 20, "num_train_epochs": 2},
    "kto, a whole step": {"liked": 0.26, "rows": 21, "num_train_epochs": 1, "window": "step"},
    "dpo": {"method": "dpo", "rows": 10, "num_train_epochs": 2, "cache_features": True},
    "dpo, resumed": {"method": "dpo", "rows": 10, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 4},
    "rpo": {"method": "rpo", "rows": 10, "num_train_epochs": 2, "timestep_sharing": "window"},
    "dpo, buckets": {"method": "dpo", "buckets": True, "resolution": ["16", "16x24"], "num_train_epochs": 2},
    "buckets, drop_last": {"buckets": True, "resolution": ["16", "16x24"], "dataloader_drop_last": True},
}


@pytest.mark.slow
def test_on_two_ranks(tmp_path):
    runs = []
    for case, options in ON_TWO_RANKS.items():
        common = {"learning_rate": 1e-3, "per_device_train_batch_size": 2} | EPOCHS | options
        if "step" in case:
            common |= {"gradient_accumulation_steps": 2}
        for computed in (False, True):
            folder = str(tmp_path / f"{case}-{computed}")
            runs.append({"output_dir": folder, "precompute_ref_log_probs": computed} | common)
        if "resumed" in case:
            runs[-1] |= {"resume": str(tmp_path / f"{case}-False" / "checkpoint-4")}
    done = launch(2, runs, tmp_path / "cache")
    assert done.returncode == 0, done.stderr[-4000:]
    for case in ON_TWO_RANKS:
        (live, live_weights), (computed, computed_weights) = (
            result(tmp_path / f"{case}-{computed}") for computed in (False, True)
        )
        numbers = ("loss", "grad_norm", "errors/chosen", "ref_errors/chosen")
        expected = [[entry.get(name) for name in numbers] for entry in live["train"]]
        assert len({loss for loss, *_ in expected}) > 1, case
        assert [[entry.get(name) for name in numbers] for entry in computed["train"]] == expected, case
        assert_equal(live_weights, computed_weights)


@pytest.mark.parametrize(("method", "draws"), [("kto", 1), ("kto", 3), ("dpo", 2)])
def test_fewer_draws_than_visits(tmp_path, method, draws):
    """Live and computed take the same ones, one after the other, and the log says how often each is seen."""
    data = {"kto": lambda: liked(0.1), "dpo": lambda: pairs(10)}[method]
    with pytest.warns(
        UserWarning, match=rf"With num_ref_draws={draws} the training sees each draw .* times"
    ) as record:
        live, computed = both(tmp_path, method, data, num_train_epochs=4, num_ref_draws=draws)
    assert losses(computed) == losses(live)
    assert_equal(weights(computed), weights(live))
    visits = computed._get_train_sampler().visits(computed.state.max_steps).counts
    assert [len(errors) for errors in computed.train_dataset["ref_errors"]] == np.minimum(visits, draws).tolist()
    seen = visits[visits > 0] / np.minimum(visits[visits > 0], draws)
    (message,) = {str(warning.message) for warning in record if "num_ref_draws" in str(warning.message)}
    assert f"{seen.mean():.3g} times on average, and up to {seen.max():.3g} times" in message
    assert f"visited {visits.max()} times" in message


def test_draws_that_are_seen_once_are_no_matter(tmp_path, recwarn):
    trainer_of("dpo", tmp_path, pairs(12), num_ref_draws=5, max_steps=8)
    assert not [warning for warning in recwarn if "num_ref_draws" in str(warning.message)]


def test_a_liked_image_never_sees_a_draw_twice(tmp_path):
    """One liked image in ten, eight draws in ten of a liked one: one epoch visits it some eight times."""
    trainer = trainer_of("kto", tmp_path, liked(0.1), num_train_epochs=1, precompute_ref_log_probs=True, **EPOCHS)
    errors = trainer.train_dataset["ref_errors"]
    assert min(len(errors[row]) for row in (0, 1)) >= 7
    assert max(len(errors[row]) for row in range(2, 20)) <= 1


def test_another_length_computes_only_what_it_visits(tmp_path):
    with calls() as count:
        trainer_of("dpo", tmp_path, pairs(40), precompute_ref_log_probs=True, max_steps=2)
    assert count["unet"] == 2


def test_a_training_longer_than_planned_is_refused(tmp_path):
    trainer = trainer_of("dpo", tmp_path, pairs(10), precompute_ref_log_probs=True, max_steps=2)
    trainer.args.max_steps = 1
    trainer.train()
    trainer.args.max_steps = 5
    with pytest.raises(ValueError, match=r"Found a training of 5 steps of 4 rows, .* computed for 2 steps of 4 rows"):
        trainer.train()
