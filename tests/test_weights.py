"""The column `weight`: a factor on the row's loss, a row with 0 is not there, and what is no weight is refused."""

import math

import datasets
import numpy as np
import pytest
import torch

from tests.conftest import pairs, unpaired
from tests.methods import METHODS
from tests.test_methods import ALL, assert_equal, losses, trained, trainer_of, weights
from trl_diffusion.data.examples import StreamingExamples
from trl_diffusion.data.formats import EMBEDDING_COLUMNS


DATA = {"kto": unpaired, "rpo": pairs, "dpo": pairs, "sft": pairs}


def weighted(method: str, values: list[float]) -> datasets.Dataset:
    data = DATA[method](len(values))
    return data.add_column("weight", np.array(values, np.float32))


@ALL
@pytest.mark.parametrize("where", ["training", "evaluation"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, -math.inf])
def test_what_is_no_weight_is_refused_with_its_row(tmp_path, method, where, value):
    bad = weighted(method, [1.0, 0.0, value, 1.0])
    data = {"dataset": bad} if where == "training" else {"eval_dataset": bad}
    with pytest.raises(ValueError, match=rf"`weight` in row 2 of the .* is {value:g}, expected a finite number that"):
        trainer_of(method, tmp_path, **data)


def test_the_row_is_that_of_the_pairs(tmp_path):
    """KTO makes two rows of each, and supervised fine-tuning leaves out the disliked ones."""
    with pytest.raises(ValueError, match="`weight` in row 2 of the paired data set is -1"):
        trainer_of("kto", tmp_path, weighted("dpo", [1.0, 1.0, -1.0, 1.0]))
    with pytest.raises(ValueError, match="`weight` in row 4 of the labelled data set is nan"):
        trainer_of("sft", tmp_path, weighted("kto", [1.0, 1.0, 1.0, 1.0, math.nan]))


@ALL
def test_all_rows_left_out(tmp_path, method):
    with pytest.raises(ValueError, match=r"All 4 weights of the .* are 0, which leaves every row out"):
        trainer_of(method, tmp_path, weighted(method, [0.0] * 4))


@pytest.mark.parametrize("method", ["kto", "sft"])
def test_a_stream_without_a_row_to_read(tmp_path, method):
    """Its length is not known before: a training would end after no step, and without a word."""
    none = weighted(method, [0.0] * 4).to_iterable_dataset()
    options = {"desirable_ratio": None} if method == "kto" else {}
    with pytest.raises(ValueError, match=r"Found no row in the stream, or none with a `weight` above 0: expected at"):
        trainer_of(method, tmp_path, none, **options).train()
    with pytest.raises(ValueError, match=r"Found no row in the stream"):
        trainer_of(method, tmp_path, eval_dataset=none).evaluate()


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_streams_are_checked_row_by_row(tmp_path, value):
    data = weighted("kto", [1.0, 0.0, 0.0, 1.0, value, 1.0])
    trainer = trainer_of("kto", tmp_path, data.to_iterable_dataset(), desirable_ratio=None)
    with pytest.raises(ValueError, match=f"`weight` in row 4 of the stream is {value:g}"):
        trainer.train()


@pytest.mark.parametrize(
    ("method", "kind"), [*((method, "rows") for method in METHODS), ("kto", "stream"), ("rpo", "stream")]
)
def test_a_row_of_weight_0_is_not_there(tmp_path, method, kind):
    """Nothing of it is left, in training and in evaluation: not in KTO's reference point, not among RPO's losers."""
    values = [1.0, 0.0, 2.0, 0.5, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0]
    there = [i for i, value in enumerate(values) if value]
    with_them, without = weighted(method, values), weighted(method, values).select(there)
    if method == "rpo":  # given, so that a stream has them too
        vectors = np.random.default_rng(0).normal(size=(2, len(values), 4)).astype(np.float32)
        for name, column in zip(EMBEDDING_COLUMNS, vectors, strict=True):
            with_them = with_them.add_column(name, list(column))
            without = without.add_column(name, list(column[there]))
    options = {"max_steps": 3} | ({"desirable_ratio": None} if method == "kto" else {})
    runs = []
    for name, data in (("with", with_them), ("without", without)):
        data = data if kind == "rows" else data.to_iterable_dataset()
        runs.append(trained(method, tmp_path / name, data, eval_dataset=data, **options))
    one, two = runs
    assert losses(one) == losses(two)
    assert one.state.log_history[0] == two.state.log_history[0]
    assert_equal(weights(one), weights(two))
    evaluated = [
        {name: value for name, value in run.evaluate().items() if "second" not in name and "runtime" not in name}
        for run in runs
    ]
    assert evaluated[0] == evaluated[1]


@pytest.mark.parametrize("method", ["kto", "dpo", "sft"])
def test_a_weight_is_a_factor_on_the_loss_alone(tmp_path, method):
    options = {"max_steps": 1, "per_device_train_batch_size": 4, "train_sampling_strategy": "sequential"}
    options |= {"desirable_ratio": None} if method == "kto" else {}
    one = trained(method, tmp_path / "1", weighted(method, [1.0] * 4), **options)
    two = trained(method, tmp_path / "2", weighted(method, [2.0] * 4), **options)
    assert losses(two) == pytest.approx([2 * loss for loss in losses(one)])
    drop = {"loss", "grad_norm"}
    logs = [{k: v for k, v in run.state.log_history[0].items() if k not in drop} for run in (one, two)]
    assert logs[0] == logs[1]


# ---- Evaluation that is not finite ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_an_evaluation_that_is_not_finite_stops(tmp_path, method):
    trainer = trainer_of(method, tmp_path, eval_dataset=DATA[method](5), eval_strategy="steps", eval_steps=1)
    corrupt = trainer.corrupt

    def broken(inputs):
        noised = corrupt(inputs)
        if not trainer.model.training:
            noised.target[-1] = torch.nan
        return noised

    trainer.corrupt = broken
    words = (
        r"evaluation loss at step 1 is nan, with errors that are not finite in 1 of 5 rows, row 4 the first of them"
    )
    with pytest.raises(FloatingPointError, match=words):
        trainer.train()


# ---- Streams end in whole steps -------------------------------------------------------------------------------------


@pytest.mark.parametrize("diagonal", ["exclude", 0.5])
@pytest.mark.parametrize(
    "options",
    [
        {"per_device_train_batch_size": 4},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "window": "step"},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "window": "device"},
    ],
    ids=["batch", "step", "device"],
)
def test_a_stream_of_pairs_ends_in_a_whole_window(tmp_path, diagonal, options):
    """Five pairs, steps of four: the last window of the epoch would have one pair, and no other loser."""
    rows = pairs(5)
    for name in EMBEDDING_COLUMNS:
        rows = rows.add_column(name, list(np.random.default_rng(1).normal(size=(5, 3)).astype(np.float32)))
    trainer = trained("rpo", tmp_path, rows.to_iterable_dataset(), diagonal=diagonal, max_steps=4, **options)
    assert trainer.state.global_step == 4
    assert np.isfinite(losses(trainer)).all()


def test_a_stream_is_filled_up_with_its_first_rows_and_other_noise(tmp_path):
    trainer = trainer_of("sft", tmp_path, unpaired(5).remove_columns("label"))
    stream = unpaired(5).remove_columns("label").to_iterable_dataset()
    builder = trainer.example_builders[0]
    examples = list(StreamingExamples(stream, builder, True, multiple_of=4))
    assert [example["prompt"] for example in examples if example["prompt"]] == [
        f"picture {i % 5}" for i, example in enumerate(examples) if example["prompt"]
    ]
    assert len(examples) == 8
    assert torch.equal(examples[0]["pixel_values"], examples[5]["pixel_values"])
    assert not torch.equal(examples[0]["noise"], examples[5]["noise"])
    assert len(list(StreamingExamples(stream, builder, True))) == 5
    assert len(list(StreamingExamples(stream.take(3), builder, True, multiple_of=8))) == 8
    with pytest.raises(ValueError, match="Found no row in the stream"):
        list(StreamingExamples(stream.take(0), builder, True, multiple_of=8))


@pytest.mark.parametrize("batch", [1, 2])
def test_drop_last_leaves_no_window_of_one_pair(tmp_path, batch):
    """Trainer leaves nothing out of a stream: five pairs ended in a step, and a window, of one."""
    rows = pairs(5)
    for name in EMBEDDING_COLUMNS:
        rows = rows.add_column(name, list(np.eye(5, 3, dtype=np.float32) + 1))
    options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 4 // batch, "window": "step"}
    stream, options = rows.to_iterable_dataset(), options | {"dataloader_drop_last": True, "diagonal": "exclude"}
    trainer = trained("rpo", tmp_path, stream, max_steps=3, **options)
    assert np.isfinite(losses(trainer)).all()
    trainer = trainer_of("rpo", tmp_path, rows.take(3).to_iterable_dataset(), **options)
    with pytest.raises(
        ValueError, match=r"Found 3 training rows in the stream, fewer than the 4 of one optimizer step"
    ):
        trainer.train()


# ---- What costs nothing, and what a device lacks --------------------------------------------------------------------


@pytest.mark.parametrize(("reference_point", "scored"), [("none", 0), ("matched", 2)])
def test_no_reference_point_no_scoring(tmp_path, reference_point, scored):
    options = {"reference_point": reference_point, "window": "step", "gradient_accumulation_steps": 2, "max_steps": 1}
    trainer = trainer_of("kto", tmp_path, per_device_train_batch_size=4, gradient_checkpointing=False, **options)
    forwards = []
    trainer.model.register_forward_pre_hook(lambda *_: forwards.append("policy"))
    trainer.train()
    assert len(forwards) == 2 + scored


@pytest.mark.parametrize("method", METHODS)
def test_a_device_without_float64_gets_none(tmp_path, method, monkeypatch):
    """The batch has none before accelerate moves it; the draws keep their digits where there is float64."""
    from trl_diffusion.trainer import base_trainer

    trainer = trainer_of(method, tmp_path)
    (batch,) = [next(iter(trainer.get_train_dataloader()))]
    assert batch["timestep"].dtype == torch.float64
    dtypes = set()
    to = torch.Tensor.to

    def watched(tensor, *args, **kwargs):
        if (args and isinstance(args[0], torch.device)) or "device" in kwargs:
            dtypes.add(tensor.dtype)
        return to(tensor, *args, **kwargs)

    monkeypatch.setattr(base_trainer, "widest_float", lambda device: torch.float32)
    single = next(iter(trainer.get_train_dataloader()))
    torch.testing.assert_close(single["timestep"], batch["timestep"].float(), rtol=0, atol=0)
    monkeypatch.setattr(torch.Tensor, "to", watched)
    trainer.train()
    assert torch.float32 in dtypes
    assert torch.float64 not in dtypes


def test_devices():
    from trl_diffusion.trainer.base_trainer import as_device_has, widest_float

    exact = torch.tensor([0.1], dtype=torch.float64)
    for device, dtype in (("mps", torch.float32), ("cpu", torch.float64), ("cuda", torch.float64)):
        assert widest_float(torch.device(device)) is dtype
        assert as_device_has(exact, torch.device(device)).dtype is dtype
    assert as_device_has(torch.tensor([True]), torch.device("mps")).dtype is torch.bool
