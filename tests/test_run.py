"""A run has an identity: who writes into its folder, what a resume may change; killed runs end as undisturbed ones."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback

from tests.conftest import picture, unpaired
from tests.methods import METHODS, make_trainer
from tests.tiny import tiny_stable_diffusion
from trl_diffusion import DiffusionKTOConfig, DiffusionKTOTrainer, engines, files, hub
from trl_diffusion.cli import training
from trl_diffusion.cli.launch import Launch
from trl_diffusion.trainer import run


# A denoiser of one block: most of a test's time is for saving it.
SMALL = {
    "block_out_channels": (8,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "mid_block_type": None,
}
OPTIONS = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "learning_rate": 1e-2}
LORA = LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_k"])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of two pipelines that differ in their weights only."""
    folder = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        tiny_stable_diffusion(seed=seed, **SMALL).save_pretrained(folder / f"model-{seed}")
    return folder


def build(models: Path, folder: Path, method: str = "kto", model: int = 0, **changes):
    return make_trainer(method, str(models / f"model-{model}"), folder, **OPTIONS | changes)


def train(models: Path, folder: Path, resume=None, **changes):
    """What the training commands do."""
    trainer = build(models, folder, **changes)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    trainer.create_model_card()
    return trainer


class StopAt(TrainerCallback):
    """Ends the training as an error does."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise InterruptedError


def snapshot(folder: Path) -> dict[str, str]:
    """Hashes of all files."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def result(folder: Path) -> dict[str, str]:
    """Of a finished run: the names of all files, and the contents of those with weights."""

    def digest(file: Path) -> str:
        tensors = sorted(load_file(file).items())
        return hashlib.sha256(b"".join(name.encode() + w.numpy().tobytes() for name, w in tensors)).hexdigest()

    return {name: digest(folder / name) if name.endswith(".safetensors") else "" for name in snapshot(folder)}


# ---- What is in the folder x what is started ------------------------------------------------------------------------

FOREIGN = {"kto.yaml": "beta: 1", "runs/events": "log", "samples/mine.txt": "mine", "checkpoint-notes/a.txt": "mine"}


@pytest.fixture(scope="module")
def contents(models, tmp_path_factory):
    """Makes folders with what runs leave, each kind once."""

    @functools.cache
    def made(kind: str) -> Path:
        folder = tmp_path_factory.mktemp("contents") / "out"
        folder.mkdir()
        if kind == "unfinished":
            with pytest.raises(InterruptedError):
                build(models, folder, callbacks=[StopAt(2)]).train()
        elif kind == "without a checkpoint":
            with pytest.raises(InterruptedError):
                build(models, folder, callbacks=[StopAt(0)]).train()
        elif kind != "nothing":
            train(
                models,
                folder,
                **{
                    "finished": {},
                    "method": {"method": "dpo"},
                    "base": {"model": 1},
                    "options": {"beta": 50.0},
                    "data": {"dataset": unpaired(16)},
                    "lora": {"peft_config": LORA},
                    "weights only": {"save_strategy": "no"},
                }[kind],
            )
        for name, text in FOREIGN.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
        return folder

    return made


@pytest.fixture(scope="module")
def fresh(contents):
    """What an undisturbed run leaves, beside foreign files."""
    return {"full": result(contents("finished")), "lora": result(contents("lora"))}


REFUSED = r"Found {} of a {} run in .*, expected a folder without another run: go on with it by `resume_from_.*True`, "
HERE = (
    r": resume with the recorded value.*another `output_dir`, or start again here with `overwrite_output_dir=True`\.$"
)
# By what is in the folder and what is started, how: an error, or what comes out.
MATRIX = {
    ("nothing", "full"): {"resume": r"Found no checkpoint in .*, expected one to resume from", None: "trained"},
    ("without a checkpoint", "full"): {"resume": r"Found no checkpoint in .*expected one", None: "trained"},
    ("unfinished", "full"): {"resume": "trained", None: REFUSED.format("checkpoint-2", "Diffusion-KTO")},
    ("finished", "full"): {"resume": "as it was", None: REFUSED.format("checkpoint-3", "Diffusion-KTO")},
    ("weights only", "full"): {
        "resume": r"Found no checkpoint in .*, but the weights of a Diffusion-KTO run, expected .* with `overwrite_",
        None: r"Found the weights of a Diffusion-KTO run in .*, expected a folder without another run: replace",
    },
    ("method", "full"): {
        "resume": r"has method 'Diffusion-DPO', found 'Diffusion-KTO'" + HERE,
        None: REFUSED.format("checkpoint-3", "Diffusion-DPO"),
    },
    ("base", "full"): {
        "resume": r"has base model 'model-1 \(\w{12}\)', found 'model-0 \(\w{12}\)'" + HERE,
        None: REFUSED.format("checkpoint-3", "Diffusion-KTO"),
    },
    ("options", "full"): {
        "resume": r"has `beta` 50\.0, found 100\.0" + HERE,
        None: REFUSED.format("checkpoint-3", "Diffusion-KTO"),
    },
    ("data", "full"): {
        "resume": r"has training rows 16, found 12; training data '\w{12}', found '\w{12}'" + HERE,
        None: REFUSED.format("checkpoint-3", "Diffusion-KTO"),
    },
    ("lora", "full"): {
        "resume": r"has training 'adapter', found 'full fine-tuning'" + HERE,
        None: REFUSED.format("checkpoint-3", "Diffusion-KTO"),
    },
    ("finished", "lora"): {
        "resume": r"has training 'full fine-tuning', found 'adapter'" + HERE,
        None: REFUSED.format("checkpoint-3", "Diffusion-KTO"),
    },
}


@pytest.mark.parametrize("how", ["resume", "overwrite", None])
@pytest.mark.parametrize(("found", "started"), MATRIX, ids=map(" then ".join, MATRIX))
def test_folder_and_start(models, contents, fresh, tmp_path, capsys, found, started, how):
    folder = tmp_path / "out"
    shutil.copytree(contents(found), folder)
    before, peft = snapshot(folder), {"peft_config": LORA} if started == "lora" else {}
    start = functools.partial(
        train,
        models,
        folder,
        resume=True if how == "resume" else None,
        overwrite_output_dir=how == "overwrite",
        **peft,
    )
    expected = MATRIX[found, started].get(how, "trained")
    if expected in ("trained", "as it was"):
        trainer = start()
        assert result(folder) == fresh[started]
        assert {name: (folder / name).read_text() for name in FOREIGN} == FOREIGN
        assert trainer.state.global_step == 3
        hub.load_trained(str(folder))
    else:
        with pytest.raises(ValueError, match=expected):
            start()
        assert snapshot(folder) == before
    if expected == "as it was":
        assert "is finished: its last checkpoint is of step 3 of 3" in capsys.readouterr().out
        names = {name for name in before if "checkpoint" in name or "safetensors" in name or name == "run.json"}
        assert {name: digest for name, digest in snapshot(folder).items() if name in names} == {
            name: before[name] for name in names
        }
    assert not list(folder.glob("_*"))


def test_a_run_never_takes_anothers_checkpoint(models, contents, tmp_path):
    """A copied one is named; `save_total_limit` meets none."""
    folder = tmp_path / "out"
    shutil.copytree(contents("unfinished"), folder)
    shutil.copytree(contents("options") / "checkpoint-3", folder / "checkpoint-3")
    with pytest.raises(
        ValueError, match=r"Found .*/checkpoint-3, which is not of the run to which the folder belongs:"
    ):
        train(models, folder, resume=True)
    with pytest.raises(
        ValueError, match=r"Found .*/checkpoint-3, which is not of the run to which the folder belongs:"
    ):
        train(models, folder, resume=str(folder / "checkpoint-2"))
    assert (folder / "checkpoint-3" / "unet").is_dir()


def test_resume_into_another_folder(models, contents, fresh, tmp_path):
    """A checkpoint may lie elsewhere; the new folder becomes a folder of the same run."""
    checkpoint = contents("unfinished") / "checkpoint-2"
    train(models, tmp_path / "new", resume=str(checkpoint))
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert result(tmp_path / "new")[weights] == fresh["full"][weights]
    assert run.read_record(tmp_path / "new")["id"] == run.read_record(checkpoint)["id"]
    shutil.copytree(contents("options"), tmp_path / "other" / "out")
    with pytest.raises(ValueError, match=r"Found .*out/checkpoint-2, which is not of the run that wrote"):
        train(models, tmp_path / "other" / "out", resume=str(checkpoint))
    with pytest.raises(ValueError, match=r"Found no checkpoint but an output folder in .*: use .*checkpoint-2\."):
        train(models, tmp_path / "third", resume=str(contents("unfinished")))
    with pytest.raises(ValueError, match=r"Found no folder .*/nowhere, expected a checkpoint to resume from"):
        train(models, tmp_path / "third", resume=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("resume", [True, "latest"])
def test_overwrite_and_resume_contradict(models, contents, resume):
    before = snapshot(contents("unfinished"))
    with pytest.raises(ValueError, match=r"Found both `resume_from_checkpoint` and `overwrite_output_dir=True`"):
        train(models, contents("unfinished"), resume=resume, overwrite_output_dir=True)
    path = str(contents("unfinished") / "checkpoint-2")
    with pytest.raises(ValueError, match=r"which deletes .*checkpoint-2, from which to resume"):
        train(models, contents("unfinished"), resume=path, overwrite_output_dir=True)
    assert snapshot(contents("unfinished")) == before


def test_the_base_model_is_never_overwritten(models, tmp_path):
    """Neither as a pipeline that others wrote nor as the result of an earlier run."""
    shutil.copytree(models / "model-0", tmp_path / "model-0")
    before = snapshot(tmp_path / "model-0")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"Found model_index.json in .*, which no training of this library wrote"):
            build(tmp_path, tmp_path / "model-0", overwrite_output_dir=overwrite).train()
    (tmp_path / "model-0" / "training_args.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"Found the base model in .*, which `overwrite_output_dir=True` would delete"
    ):
        build(tmp_path, tmp_path / "model-0", overwrite_output_dir=True).train()
    (tmp_path / "model-0" / "training_args.json").unlink()
    assert snapshot(tmp_path / "model-0") == before


@pytest.mark.parametrize(("there", "saved"), [("lora", "full"), ("finished", "lora")])
def test_kinds_of_weights_are_never_mixed(models, contents, tmp_path, there, saved):
    """`generate` would take the adapter, `from_pretrained` the pipeline."""
    folder = tmp_path / "out"
    shutil.copytree(contents(there), folder)
    before = snapshot(folder)
    trainer = build(models, tmp_path / "own", **({"peft_config": LORA} if saved == "lora" else {}))
    with pytest.raises(
        ValueError, match=r"Found (adapter_model.safetensors|model_index.json) in .*, expected a folder "
    ):
        trainer.save_model(str(folder))
    assert snapshot(folder) == before
    # As an earlier version, or a copy, may have left it.
    other = contents("lora") / "adapter_config.json" if saved == "lora" else contents("finished") / "model_index.json"
    shutil.copy(other, folder)
    with pytest.raises(
        ValueError, match=r"Found both adapter_config.json and model_index.json in .*: move away those"
    ):
        hub.load_trained(str(folder))


def test_a_trainer_may_save_then_train(models, tmp_path):
    trainer = build(models, tmp_path, save_strategy="no")
    trainer.save_model()
    trainer.train()
    trainer.save_model()
    assert run.read_record(tmp_path)["finished"] == {"step": 3, "max_steps": 3}
    other = build(models, tmp_path, save_strategy="no")
    for call in (other.train, other.save_model):
        with pytest.raises(ValueError, match=r"Found (the weights of a|another run)"):
            call()


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_trainer_may_train_again(models, tmp_path, interrupted):
    """In a notebook, from the weights of the first time, whose checkpoints are not taken for those of the second."""
    trainer = build(models, tmp_path, callbacks=[StopAt(2 if interrupted else 9)], save_total_limit=None)
    with pytest.raises(InterruptedError) if interrupted else contextlib.nullcontext():
        trainer.train()
    first = {path.name: run.read_record(path)["id"] for path in run.checkpoints(tmp_path)}
    trainer.pop_callback(StopAt)
    trainer.add_callback(StopAt(1))
    with pytest.raises(InterruptedError):
        trainer.train()
    with pytest.raises(ValueError, match=r"Found .*/checkpoint-2, which is not of the run to which the folder bel"):
        build(models, tmp_path).train(resume_from_checkpoint=True)
    assert "checkpoint-2" in first
    trainer.pop_callback(StopAt)
    assert trainer.train().global_step == 3
    trainer.save_model()
    ids = {run.read_record(path)["id"] for path in run.checkpoints(tmp_path)}
    assert ids == {trainer.run.id}
    assert not ids & set(first.values())
    assert build(models, tmp_path, max_steps=4).train(resume_from_checkpoint=True).global_step == 4


def test_advice_leads_somewhere(models, contents, tmp_path):
    """Without a checkpoint there is nothing to resume; a trainer that only was built has not started."""
    with pytest.raises(ValueError, match=r"without another run: replace it by `overwrite_output_dir=True`, or choose"):
        build(models, contents("weights only")).train()
    with pytest.raises(ValueError, match=r"Found another run in [^,]*: save to another folder"):
        build(models, contents("finished")).save_model()
    with pytest.raises(ValueError, match=r"Found an empty `output_dir`"):
        build(models, "")


def test_a_run_that_ended_early_stays_finished(models, tmp_path):
    """A callback ended it; a resume must not go on where it stopped."""

    class EndAt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    train(models, tmp_path, callbacks=[EndAt()])
    before = result(tmp_path)
    trainer = train(models, tmp_path, resume=True)
    assert trainer.state.global_step == 2
    assert result(tmp_path) == before
    assert train(models, tmp_path, resume=True, max_steps=4).state.global_step == 4


def test_the_best_model_of_a_finished_run(models, tmp_path):
    options = {
        "eval_dataset": unpaired(6),
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_rewards/margins",
        "save_total_limit": 1,
        "max_steps": 4,
    }
    first = train(models, tmp_path, **options, greater_is_better=False)
    before = result(tmp_path)
    again = train(models, tmp_path, resume=True, **options, greater_is_better=False)
    assert again.state.best_model_checkpoint == first.state.best_model_checkpoint
    assert result(tmp_path) == before


# ---- What a resume may change ---------------------------------------------------------------------------------------


def check(models, checkpoint: Path, **changes) -> None:
    build(models, checkpoint.parent.parent / "new", **changes).run.check_checkpoint(checkpoint)


def relabeled() -> Dataset:
    labels = list(unpaired()["label"])
    labels[5] = not labels[5]
    return unpaired().remove_columns("label").add_column("label", labels)


def repainted() -> Dataset:
    table = {name: list(unpaired()[name]) for name in ("prompt", "label")}
    table["image"] = [picture(i) for i in range(11)] + [picture(99)]
    return Dataset.from_dict(table, features=unpaired().features)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 1e-3}, r"`learning_rate` 0\.01, found 0\.001"),
        ({"seed": 7}, r"`seed` 42, found 7; `data_seed` 42, found 7: resume with the recorded values"),
        ({"data_seed": 7}, r"`data_seed` 42, found 7"),
        ({"random_flip": True}, r"`random_flip` False, found True"),
        ({"proportion_empty_prompts": 0.1}, r"`proportion_empty_prompts` 0\.2, found 0\.1"),
        ({"per_device_train_batch_size": 2}, r"rows of a step \(batch x accumulation x processes\) 4, found 2"),
        ({"gradient_accumulation_steps": 2}, r"rows of a step \(batch x accumulation x processes\) 4, found 8"),
        (
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
            r"has rows of a window 4, found 2: resume",
        ),
        ({"resolution": 8}, r"image sizes \['16'\], found \['8'\]"),
        (
            {"weighting": "epsilon", "timestep_sampling": "mode"},
            r"`timestep_sampling` 'uniform', found 'mode'; `weight",
        ),
        ({"ema_decay": 0.5}, r"`ema_decay` None, found 0\.5"),
        (
            {"lr_scheduler_type": "cosine", "warmup_steps": 1},
            r"lr_scheduler_type.*found 'cosine'; `warmup_steps` 0, f",
        ),
        ({"optim": "sgd"}, r"`optim` 'adamw_torch_fused', found 'sgd'"),
        ({"max_grad_norm": 0.0}, r"`max_grad_norm` 1\.0, found 0\.0"),
        ({"desirable_ratio": None, "beta": 1.0, "seed": 1, "weight_decay": 0.1}, r"\(2 more\): resume with the"),
        ({"dataset": relabeled()}, r"has training data '\w{12}', found '\w{12}': resume"),
        ({"dataset": repainted()}, r"has training data '\w{12}', found '\w{12}': resume"),
        ({"dataset": unpaired().select(range(11, -1, -1))}, r"has training data '\w{12}', found '\w{12}': resume"),
        ({"dataset": unpaired().to_iterable_dataset(), "desirable_ratio": None}, r"training rows 12, found None"),
        ({"ref_model": tiny_stable_diffusion(seed=3, **SMALL).unet}, r"reference model None, found '\w{12}'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_changes_the_meaning_is_refused(models, contents, changes, message):
    with pytest.raises(ValueError, match=message):
        check(models, contents("unfinished") / "checkpoint-2", **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_steps": 8, "logging_steps": 5, "save_steps": 7, "save_total_limit": None, "report_to": "none"},
        {"num_train_epochs": 5, "max_steps": -1, "eval_strategy": "steps", "eval_dataset": unpaired(6)},
        {"gradient_checkpointing": False, "dataloader_num_workers": 1, "cache_features": True},
        {"precompute_ref_log_probs": True},
        {"validation_prompts": ["a"], "error_growth_limit": 0.1, "hub_model_id": "a/b"},
        {"seed": 42, "data_seed": 42, "resolution": 16, "timestep_sampling": "uniform"},
        {"dataset": unpaired(16).select(range(12)), "ignore_data_skip": True},
        {"dataset": unpaired().add_column("mine", list(range(12)))},
    ],
    ids="-".join,
)
def test_what_may_change(models, contents, changes):
    check(models, contents("unfinished") / "checkpoint-2", **changes)


def test_another_split_of_a_step(models, tmp_path):
    """Where the window is the whole step: to the last digits the same training."""
    whole = {"window": "step", "max_steps": 3}
    train(models, tmp_path / "whole", **whole)
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    train(models, tmp_path / "split", resume=str(tmp_path / "whole" / "checkpoint-2"), **whole, **split)
    one, two = (load_file(tmp_path / name / "unet/diffusion_pytorch_model.safetensors") for name in ("whole", "split"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-4)


def test_a_moved_model_and_moved_data(models, contents, tmp_path):
    shutil.copytree(models / "model-0", tmp_path / "moved" / "model-0")
    for i in range(12):
        picture(i).save(tmp_path / f"{i}.png")
    table = {name: list(unpaired()[name]) for name in ("prompt", "label")}
    table["image"] = [str(tmp_path / f"{i}.png") for i in range(12)]
    dataset = Dataset.from_dict(table).cast_column("image", datasets.Image())
    trained = tmp_path / "a"
    with pytest.raises(InterruptedError):
        build(models, trained, dataset=dataset, callbacks=[StopAt(1)]).train()
    (tmp_path / "b").mkdir()
    for i in range(12):
        shutil.move(tmp_path / f"{i}.png", tmp_path / "b" / f"{i}.png")
    table["image"] = [str(tmp_path / "b" / f"{i}.png") for i in range(12)]
    dataset = Dataset.from_dict(table).cast_column("image", datasets.Image())
    check(tmp_path / "moved", trained / "checkpoint-1", dataset=dataset)
    picture(50).save(tmp_path / "b" / "3.png")
    with pytest.raises(ValueError, match="has training data"):
        check(tmp_path / "moved", trained / "checkpoint-1", dataset=dataset)


def test_an_option_that_nobody_classified(models, contents):
    """One that a later version, or an own trainer, adds: it changes the meaning, and had its default before."""

    @dataclasses.dataclass
    class OwnConfig(DiffusionKTOConfig):
        surprise: int = 3

    checkpoint = contents("unfinished") / "checkpoint-2"
    for value, message in ((3, None), (4, r"`surprise` 3, found 4: resume with the recorded value,")):
        trainer = build(models, checkpoint.parent.parent / "new")
        trainer.args.__class__ = OwnConfig
        trainer.args.surprise = value
        own = run.Run(trainer, "0", None, "0")
        own.settings = trainer.run.settings | {"surprise": own.settings["surprise"]}
        if message is None:
            own.check_checkpoint(checkpoint)
        else:
            with pytest.raises(ValueError, match=message):
                own.check_checkpoint(checkpoint)


def test_a_field_that_a_later_peft_adds(models, contents, tmp_path):
    """It had its default before."""
    checkpoint = shutil.copytree(contents("lora") / "checkpoint-3", tmp_path / "checkpoint-3")
    record = run.read_record(checkpoint)
    for name in ("lora_dropout", "use_rslora", "rank_pattern"):
        del record["settings"][f"adapter.{name}"]
    (checkpoint / run.RECORD).write_text(json.dumps(record))
    build(models, tmp_path / "a", peft_config=LORA).run.check_checkpoint(checkpoint)
    other = dataclasses.replace(LORA, use_rslora=True)
    with pytest.raises(ValueError, match=r"has `adapter.use_rslora` False, found True: resume"):
        build(models, tmp_path / "b", peft_config=other).run.check_checkpoint(checkpoint)


def test_every_option_that_may_change_exists():
    """A name that transformers drops must not linger; but for those of other versions."""
    options = {field.name for method in METHODS.values() for field in dataclasses.fields(method.config)}
    assert run.MAY_CHANGE - options <= {"logging_dir"}


def test_records_hold_no_path_and_no_token(models, tmp_path):
    secret = {"hub_token": "hf_SECRET", "model_init_kwargs": {"token": "hf_SECRET"}, "run_name": str(tmp_path)}
    with pytest.raises(InterruptedError):
        build(models, tmp_path / "out", callbacks=[StopAt(1)], **secret).train()
    for record in (tmp_path / "out").rglob(run.RECORD):
        text = record.read_text()
        assert "hf_SECRET" not in text
        assert str(tmp_path) not in text
        assert str(models) not in text
        assert socket.gethostname() not in text


def test_fingerprint_of_the_weights_sees_each_tensor():
    family = make_trainer("sft", tiny_stable_diffusion(), "unused", save_strategy="no").family
    before = run.weights_fingerprint(family)
    assert before == run.weights_fingerprint(family)
    for part in ("unet", "vae", "text_encoder"):
        for _, weight in list(getattr(family.pipeline, part).named_parameters())[::7]:
            with torch.no_grad():
                weight.mul_(1.001).add_(1e-6)
            assert run.weights_fingerprint(family) != before
            before = run.weights_fingerprint(family)
    family.pipeline.scheduler.register_to_config(beta_end=0.013)
    assert run.weights_fingerprint(family) != before
    shutil.rmtree("unused")


# ---- Checkpoints that are not whole ---------------------------------------------------------------------------------

NEEDED = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "unet/config.json", "run.json"]
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("name", [*NEEDED, WEIGHTS])
def test_a_missing_file_is_named(models, contents, tmp_path, name):
    shutil.copytree(contents("unfinished") / "checkpoint-2", tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / name).unlink()
    with pytest.raises(
        ValueError, match=rf"Found no {name} in .*checkpoint-2, .*: resume from an earlier checkpoint, o"
    ):
        train(models, tmp_path / "new", resume=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("damage", ["empty", "half", "garbage"])
@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", WEIGHTS, "run.json"]
)
def test_a_damaged_file_is_named(models, contents, tmp_path, name, damage):
    folder = tmp_path / "out"
    shutil.copytree(contents("unfinished"), folder)
    file = folder / "checkpoint-2" / name
    size = file.stat().st_size
    file.write_bytes({"empty": b"", "half": file.read_bytes()[: size // 2], "garbage": b"\xff" * size}[damage])
    fix = r"delete .*checkpoint-2, and resume from the checkpoint before\.$"
    with pytest.raises(ValueError, match=rf"checkpoint-2/{name}.*{fix}"):
        build(models, folder).train(resume_from_checkpoint=True)
    if name == "trainer_state.json":
        file.write_text("{}")
        with pytest.raises(ValueError, match=rf"Found no `global_step` in .*checkpoint-2/{name}.*{fix}"):
            build(models, folder).train(resume_from_checkpoint=True)
    if damage == "half":
        shutil.rmtree(folder / "checkpoint-2")
        assert train(models, folder, resume=True).state.global_step == 3


def test_damage_within_a_file_is_told(models, contents, tmp_path, monkeypatch):
    """What only reading all of it shows: the checkpoint is named, with the error of who read it."""
    shutil.copytree(contents("unfinished"), tmp_path / "out")
    file = tmp_path / "out" / "checkpoint-2" / "optimizer.pt"
    content = file.read_bytes()
    place = content.index(b"optimizer/data.pkl") + 200
    file.write_bytes(content[:place] + b"\xff" * 64 + content[place + 64 :])
    with pytest.raises(
        ValueError, match=r"Found .*checkpoint-2 unreadable \(.*\): delete .*checkpoint-2, and resume f"
    ):
        build(models, tmp_path / "out").train(resume_from_checkpoint=True)


def test_a_checkpoint_without_the_optimizer_is_refused(models, tmp_path):
    with pytest.raises(InterruptedError):
        build(models, tmp_path, save_only_model=True, callbacks=[StopAt(1)]).train()
    with pytest.raises(
        ValueError, match=r"Found a checkpoint with `save_only_model=True` in .*: start a new run from "
    ):
        build(models, tmp_path).train(resume_from_checkpoint=True)


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(models, tmp_path, monkeypatch):
    """A power loss must not leave a checkpoint of empty files."""
    synced, at_rename = set(), {}
    fsync, replace = os.fsync, os.replace

    def spy_fsync(descriptor):
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def spy_replace(source, target):
        if Path(target).name.startswith("checkpoint-"):
            inside = {str(path) for path in (Path(source), *Path(source).rglob("*"))}
            at_rename[Path(target).name] = inside - synced
        replace(source, target)
        synced.discard(str(Path(target).parent))

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    trainer = build(models, tmp_path, max_steps=2)
    trainer.train()
    assert at_rename == {"checkpoint-1": set(), "checkpoint-2": set()}
    assert str(tmp_path) in synced
    synced.clear()
    trainer.save_model()
    assert {Path(path).name for path in synced} >= {"diffusion_pytorch_model.safetensors", "model_index.json", "unet"}


# ---- Who writes -----------------------------------------------------------------------------------------------------


def in_child(function) -> int:
    """The pid of a fork of this process, which has imported everything, that runs `function` and nothing else."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        signal.alarm(120)
        function()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait_for(path: Path) -> None:
    for _ in range(600):
        if path.exists():
            return
        time.sleep(0.1)
    raise TimeoutError(path)


class Linger(TrainerCallback):
    def __init__(self, sign: Path):
        self.sign = sign

    def on_step_begin(self, args, state, control, **kwargs):
        self.sign.touch()
        time.sleep(60)


@pytest.mark.parametrize("how", ["neither", "resume", "overwrite", "save", "command"])
def test_a_second_process_is_told_who_writes(models, tmp_path, how):
    folder = tmp_path / "out"
    child = in_child(lambda: build(models, folder, callbacks=[Linger(tmp_path / "sign")]).train())
    try:
        wait_for(tmp_path / "sign")
        before = snapshot(folder)
        trainer = build(models, folder, overwrite_output_dir=how == "overwrite")
        call = {
            "save": trainer.save_model,
            "resume": lambda: trainer.train(resume_from_checkpoint=True),
            "command": lambda: training.train(DiffusionKTOTrainer, None, trainer.args, None),
        }.get(how, trainer.train)
        who = rf"process {child} on {socket.gethostname()}, which trains since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d"
        with pytest.raises(ValueError, match=rf"Found .*out in use by {who}: wait until it has ended, or choose ano"):
            call()
        assert snapshot(folder) == before
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    # Nothing has to be cleaned by hand.
    assert train(models, folder, overwrite_output_dir=how == "overwrite").state.global_step == 3
    assert not list(folder.glob("_*"))


def test_locks_that_were_left_are_taken_over(models, tmp_path):
    dead = in_child(lambda: None)
    os.waitpid(dead, 0)
    (tmp_path / run.LOCK).touch()
    holder = {"host": socket.gethostname(), "pid": dead, "started": "2026-01-01 00:00:00"}
    (tmp_path / run.HOLDER).write_text(json.dumps(holder))
    train(models, tmp_path)
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    (tmp_path / run.HOLDER).write_text(json.dumps(holder | {"host": "another-machine"}))
    with pytest.warns(
        UserWarning, match=r"Found the lock of process \d+ on another-machine in .*, which is free: make"
    ):
        train(models, tmp_path)


def test_a_folder_that_another_run_took_is_left_alone(models, tmp_path):
    """Where the file system shares no locks between machines, the next save finds out."""

    class Steal(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                (tmp_path / run.HOLDER).write_text(json.dumps({"host": "b", "pid": 1, "started": ""}))

    with pytest.raises(
        ValueError, match=r"Found another run in .*, of process 1 on b, which was started since: two run"
    ):
        build(models, tmp_path, callbacks=[Steal()]).train()
    assert [path.name for path in run.checkpoints(tmp_path)] == ["checkpoint-1"]


def test_ranks_with_other_data_are_refused(models, tmp_path, monkeypatch):
    """Of equal length, which was all that was compared."""
    settings = []
    monkeypatch.setattr(engines, "check_ranks_agree", settings.append)
    for dataset in (unpaired(), relabeled(), repainted(), unpaired().to_iterable_dataset()):
        for evaluation in (None, unpaired(6)):
            build(models, tmp_path, dataset=dataset, eval_dataset=evaluation, desirable_ratio=None)
    monkeypatch.undo()
    settings = [{name: value for name, value in found.items() if name.startswith("the ")} for found in settings]
    monkeypatch.setattr(engines, "PartialState", lambda: type("Two", (), {"num_processes": 2}))
    for other in (2, 4, 6):
        monkeypatch.setattr(engines, "gather_object", lambda found, other=other: [settings[0], settings[other]])
        with pytest.raises(ValueError, match=r"The ranks disagree on the (rows of|number of) t.* on rank 1"):
            engines.check_ranks_agree({})
    build_eval = [dict(settings[1]), dict(settings[1])]
    build_eval[1]["the rows of the evaluation data"] = {"": "0"}
    monkeypatch.setattr(engines, "gather_object", lambda found: build_eval)
    with pytest.raises(ValueError, match="disagree on the rows of the evaluation data"):
        engines.check_ranks_agree({})


# ---- What cannot be written, and what must not ----------------------------------------------------------------------


@pytest.mark.parametrize("save_strategy", ["no", "steps"])
def test_a_folder_that_cannot_be_written_is_found_first(models, tmp_path, monkeypatch, save_strategy):
    monkeypatch.setattr("trl_diffusion.trainer.base_trainer.resolve_model", lambda *args: pytest.fail("it was loaded"))
    (tmp_path / "file").touch()
    with pytest.raises(
        OSError, match=r"Found no way to write to `output_dir` .*file/out: .*; choose another folder, o"
    ):
        build(models, tmp_path / "file" / "out", save_strategy=save_strategy)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        OSError, match=r"`output_dir` .*full: .*No space left on device; choose another folder, or mak"
    ):
        build(models, tmp_path / "full", save_strategy=save_strategy)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # Gradients overflow, the loss does not; clipping turns them into nothing.
        ({"beta": 1e38}, r"The loss or its gradient stopped being finite at step 1: lower"),
        ({"beta": 1e38, "max_grad_norm": 0.0, "logging_steps": 100}, r"at step 1: lower"),
        # The last step's weights meet no further loss.
        ({"learning_rate": 1e39, "max_steps": 1}, r"The weights are not finite after step 1: lower `learning_rate`"),
        ({"learning_rate": 1e39, "max_steps": 1, "save_strategy": "no"}, r"The weights are not finite after step 1"),
    ],
    ids=["gradient", "unclipped", "checkpoint", "end"],
)
def test_numbers_that_are_not_finite_end_the_run(models, tmp_path, changes, message):
    with pytest.raises(FloatingPointError, match=message):
        build(models, tmp_path, **changes).train()
    assert not run.checkpoints(tmp_path)


@pytest.mark.parametrize("folder", [None, "elsewhere"])
def test_weights_that_are_not_finite_are_not_saved(models, tmp_path, folder):
    trainer = build(models, tmp_path / "out", peft_config=LORA)
    next(p for p in trainer.model.parameters() if p.requires_grad).data[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match=r"The weights are not finite after step 0"):
        trainer.save_model(folder and str(tmp_path / folder))
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lr_scheduler_kwargs", "{'min_lr': 0}", r"Found no JSON in `lr_scheduler_kwargs` \(Expecting property"),
        ("lr_scheduler_kwargs", "min_lr=0", r"Found no JSON in `lr_scheduler_kwargs` \(Expecting value"),
        (
            "activation_checkpointing_kwargs",
            "[1]",
            r"Found a list in `activation_checkpointing_kwargs`, expected a ma",
        ),
        ("model_init_kwargs", ["a"], r"Found a list in `model_init_kwargs`, expected a mapping"),
        (
            "model_init_kwargs",
            '{"token": "hf_secret"',
            r"Found no JSON in `model_init_kwargs` \([^_]*\): write it",
        ),
        ("deepspeed", '{"a": ', r"Found no JSON in .*/ds.json \(`deepspeed`\)"),
        ("fsdp_config", "[1]", r"Found a list in .*/ds.json \(`fsdp_config`\)"),
        ("accelerator_config", '{"a"', r"Found no JSON in `accelerator_config`"),
    ],
)
def test_mappings_that_are_none(tmp_path, name, value, message):
    if "ds.json" in message:
        (tmp_path / "ds.json").write_text(value)
        value = str(tmp_path / "ds.json")
    with pytest.raises(ValueError, match=message):
        DiffusionKTOConfig(str(tmp_path), use_cpu=True, **{name: value})


def test_mappings_that_are_fine(tmp_path):
    (tmp_path / "a.json").write_text('{"even_batches": false}')
    options = {"accelerator_config": str(tmp_path / "a.json"), "lr_scheduler_kwargs": '{"min_lr": 0.1}'}
    args = DiffusionKTOConfig(str(tmp_path), use_cpu=True, model_init_kwargs={"variant": "fp16"}, **options)
    assert args.accelerator_config.even_batches is False
    assert args.lr_scheduler_kwargs == {"min_lr": 0.1}


COUNTS = (
    "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps save_total_limit "
    "eval_accumulation_steps dataloader_prefetch_factor num_ref_draws validation_steps num_validation_images "
    "validation_inference_steps torch_empty_cache_steps ddp_bucket_cap_mb ddp_timeout error_growth_patience"
).split()
NOT_NEGATIVE = (
    "learning_rate weight_decay max_grad_norm adam_epsilon warmup_steps eval_delay validation_guidance_scale "
    "error_growth_limit"
).split()
INTERVALS = "logging_steps save_steps eval_steps num_train_epochs".split()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(name, value) for name in COUNTS for value in (0, -1, 1.5, math.nan)],
        *[(name, value) for name in NOT_NEGATIVE for value in (-1e-9, math.nan, math.inf, "much")],
        *[(name, value) for name in INTERVALS for value in (0, -1, math.nan, math.inf)],
        *[("max_steps", value) for value in (0, -2, 1.5)],
        *[(name, value) for name in ("adam_beta1", "adam_beta2") for value in (-0.1, 1.0, math.nan)],
        *[(name, value) for name in ("seed", "data_seed") for value in (-1, 2**70, 1.5)],
        ("seed", 2**32),
        ("dataloader_num_workers", -1),
    ],
)
def test_odd_numbers_are_refused(tmp_path, name, value):
    """By the configuration, before an engine or a library stumbles over them."""
    with pytest.raises(ValueError, match=rf"^`{name}` must be .*found {str(value)!r}?".replace("'", "'?")) as error:
        DiffusionKTOConfig(str(tmp_path), use_cpu=True, report_to="none", **{name: value})
    assert str(error.value).count(".") <= 3


@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate": "1e-7"},
        {"learning_rate": 0.0, "weight_decay": 0, "max_grad_norm": 0.0},
        {"max_steps": -1},
        {"warmup_steps": 0.1, "save_steps": 0.5, "logging_steps": 0.1},
        {"seed": 2**32 - 1, "data_seed": 2**63 - 1},
        {"num_train_epochs": 0.5},
    ],
    ids=str,
)
def test_numbers_that_are_fine(tmp_path, options):
    DiffusionKTOConfig(str(tmp_path), use_cpu=True, report_to="none", **options)


def test_the_command_looks_at_the_folder_before_it_loads_anything(models, contents, monkeypatch):
    args = DiffusionKTOConfig(str(contents("finished")), use_cpu=True, report_to="none")
    monkeypatch.setattr(training, "make_trainer", lambda *args: pytest.fail("it was loaded"))
    with pytest.raises(ValueError, match=r"Found checkpoint-3 of a Diffusion-KTO run"):
        training.train(DiffusionKTOTrainer, None, args, None)


def test_the_command_looks_at_the_folder_before_it_starts_processes(models, contents, refused, monkeypatch, tmp_path):
    unpaired().to_parquet(str(tmp_path / "train.parquet"))
    monkeypatch.setattr(Launch, "start", lambda *args: pytest.fail("processes were started"))
    words = ["--model_name_or_path", models / "model-0", "--dataset_name", tmp_path, "--use_cpu"]
    line = refused("kto", *words, "--num_processes", 2, "--output_dir", contents("finished"))
    assert "Found checkpoint-3 of a Diffusion-KTO run" in line


# ---- Kill -9 --------------------------------------------------------------------------------------------------------

MOMENTS = 30
CALLS = [
    *[(os, name) for name in ("replace", "fsync", "mkdir", "unlink", "rmdir")],
    *[
        (shutil, "rmtree"),
        (torch, "save"),
        (hub, "save_file"),
        (hub, "save_torch_state_dict"),
        (files, "clear_staging"),
    ],
    *[(run, "write_record"), (run.Run, "rotate"), (torch.optim.AdamW, "step")],
    *[(DiffusionKTOTrainer, name) for name in ("training_step", "create_model_card", "_save_beside_weights")],
    (run.Run, "record_checkpoint"),
]
KILLED = {"max_steps": 4, "save_steps": 2, "cache_features": True, "ema_decay": 0.5, "save_total_limit": 1}


def counted(models: Path, folder: Path, cache: Path, die_at: int | None, log: Path | None = None, resume=None):
    """A training whose process kills itself before the so-manieth of all these calls."""
    datasets.config.HF_DATASETS_CACHE = cache
    seen: list[str] = []
    for owner, name in CALLS:
        original = getattr(owner, name)

        def counting(*args, original=original, name=name, **kwargs):
            if len(seen) == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            seen.append(name)
            return original(*args, **kwargs)

        setattr(owner, name, counting)
    trainer = train(models, folder, resume=resume, **KILLED)
    assert trainer.state.global_step == 4
    if log is not None:
        log.write_text(json.dumps(seen))


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture(scope="module")
def undisturbed(models, tmp_path_factory):
    """Its folder, and the calls that it made."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert ended(in_child(lambda: counted(models, folder / "out", folder / "cache", None, folder / "log"))) == 0
    return folder / "out", json.loads((folder / "log").read_text())


@pytest.mark.parametrize(
    "moment",
    [moment if moment % 6 == 0 else pytest.param(moment, marks=pytest.mark.slow) for moment in range(MOMENTS)],
)
def test_killed_and_resumed(models, undisturbed, tmp_path, moment):
    """Spread over the whole run: caching, training, checkpoints, their rotation, the last save and the card."""
    whole, calls = undisturbed
    folder, cache = tmp_path / "out", tmp_path / "cache"
    place = moment * (len(calls) - 1) // (MOMENTS - 1)
    assert ended(in_child(lambda: counted(models, folder, cache, place))) == -signal.SIGKILL
    resume = True if run.checkpoints(folder) else None
    assert ended(in_child(lambda: counted(models, folder, cache, None, resume=resume))) == 0, calls[place]
    assert result(folder) == result(whole), calls[place]
    states = [json.loads((root / "checkpoint-4" / "trainer_state.json").read_text()) for root in (folder, whole)]
    assert [state["global_step"] for state in states] == [4, 4]
    losses = [[entry["loss"] for entry in state["log_history"] if "loss" in entry] for state in states]
    assert losses[0] == losses[1]
    assert np.isfinite(losses[0]).all()


def test_killed_moments_are_spread_over_everything(undisturbed):
    calls = undisturbed[1]
    places = [moment * (len(calls) - 1) // (MOMENTS - 1) for moment in range(MOMENTS)]
    last_step = max(i for i, name in enumerate(calls) if name == "training_step")
    last_rotation = max(i for i, name in enumerate(calls) if name == "rotate")
    assert sum(place > last_rotation for place in places) >= 5  # the final save and the card
    assert sum(last_step < place <= last_rotation for place in places) >= 5
    assert sum(place < calls.index("training_step") for place in places) >= 1
