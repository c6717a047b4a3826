"""What training leaves behind: folders that diffusers loads, whole checkpoints, pushes, the model card, no token."""

import copy
import functools
import itertools
import json
import math
import platform
import re
import shlex
import shutil
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
import transformers
import trl
import yaml
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import LocalEntryNotFoundError, filter_repo_objects
from peft import IA3Config, LoHaConfig, LoraConfig, OFTConfig, VeraConfig
from PIL import Image as PILImage
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import TrainerCallback

from tests.conftest import unpaired
from trl_diffusion import DiffusionKTOConfig, DiffusionKTOTrainer, hub
from trl_diffusion import card as card_module
from trl_diffusion.cli import main


TOKEN = "hf_SECRETTOKEN"

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
PEFT = {
    "full": None,
    # alpha != rank: without metadata, diffusers would take them for equal.
    "lora": LoraConfig(r=2, lora_alpha=8, target_modules=TARGETS),
    "family's targets": LoraConfig(r=2, lora_alpha=8),
    "rank pattern": LoraConfig(
        r=2, lora_alpha=8, target_modules=TARGETS, rank_pattern={"to_q": 3}, alpha_pattern={"to_v": 1}
    ),
    "convolutions": LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "conv1", "conv_in"]),
    "rslora": LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, use_rslora=True),
    "dora": LoraConfig(r=2, lora_alpha=8, target_modules=TARGETS, use_dora=True),
    "modules to save": LoraConfig(r=2, lora_alpha=8, target_modules=TARGETS, modules_to_save=["conv_out"]),
    "loha": LoHaConfig(r=2, alpha=8, target_modules=TARGETS),
    "ia3": IA3Config(target_modules=["to_k", "to_v"], feedforward_modules=[]),
    "oft": OFTConfig(target_modules=["to_q", "to_v"], oft_block_size=4),
    "vera": VeraConfig(r=4, target_modules=["to_q"]),
}
# Those that diffusers' own LoRA file can hold.
DIFFUSERS_LORA = ["lora", "family's targets", "rank pattern", "convolutions", "rslora", "dora"]


def make_trainer(model, folder, peft="full", callbacks=None, **changes) -> DiffusionKTOTrainer:
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3 if peft == "full" else 3e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
    }
    eval_dataset = unpaired(6) if changes.get("eval_strategy", "no") != "no" else None
    return DiffusionKTOTrainer(
        model=model,
        args=DiffusionKTOConfig(**settings | changes),
        train_dataset=unpaired(),
        eval_dataset=eval_dataset,
        peft_config=copy.deepcopy(PEFT[peft]),
        callbacks=callbacks,
    )


@pytest.fixture(scope="module")
def trained(sd_folder, tmp_path_factory):
    """Trainers after two steps and `save_model`, one of each kind."""

    @functools.cache
    def trained(peft: str) -> DiffusionKTOTrainer:
        trainer = make_trainer(sd_folder, tmp_path_factory.mktemp("out") / "tiny-kto", peft)
        trainer.train()
        trainer.save_model()
        return trainer

    return trained


def pictures(pipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    return pipeline(["a cat", "a dog"], generator=generators, num_inference_steps=2, output_type="np").images


def answer(denoiser) -> torch.Tensor:
    """The denoiser's output, unrounded and unclipped."""
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 3, 16, generator=generator)
    with torch.no_grad():
        return denoiser(x, torch.tensor([10, 700]), text, return_dict=False)[0]


def files(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


def weights_of(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def assert_same(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


# ---- The saved folder is the trained policy -------------------------------------------------------------------------


def test_full_output_is_a_pipeline(trained, sd_folder):
    trainer = trained("full")
    loaded = DiffusionPipeline.from_pretrained(trainer.args.output_dir)
    expected = pictures(trainer.pipeline)
    np.testing.assert_array_equal(pictures(loaded), expected)
    assert torch.equal(answer(loaded.unet), answer(trainer.pipeline.unet))
    base = DiffusionPipeline.from_pretrained(sd_folder)
    assert np.abs(pictures(base) - expected).max() > 0.01
    assert type(loaded.scheduler) is type(base.scheduler)
    assert loaded.scheduler.config == base.scheduler.config
    for part in ("vae", "text_encoder"):
        assert_same(getattr(loaded, part).state_dict(), getattr(base, part).state_dict())


def test_full_output_holds_a_pipeline_and_nothing_else(trained, sd_folder):
    """The folder has the files of the base pipeline; what `save_pretrained` writes there, we write."""
    ours = {name for name in files(trained("full").args.output_dir) if not name.startswith("checkpoint-")}
    assert ours == files(sd_folder) | {"README.md", "assets/curves.png", "run.json", "training_args.json"}


@pytest.mark.parametrize("peft", DIFFUSERS_LORA)
def test_lora_output_loads_in_diffusers(trained, sd_folder, peft):
    trainer = trained(peft)
    loaded = DiffusionPipeline.from_pretrained(sd_folder)
    base, base_pictures = answer(loaded.unet), pictures(loaded)
    loaded.load_lora_weights(trainer.args.output_dir)
    expected = answer(trainer.pipeline.unet)
    assert (base - expected).abs().max() > 0.01
    torch.testing.assert_close(answer(loaded.unet), expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(pictures(loaded), pictures(trainer.pipeline), atol=1e-5)
    assert np.abs(base_pictures - pictures(loaded)).max() > 0.01


@pytest.mark.parametrize("peft", PEFT)
def test_load_trained(trained, sd_folder, peft):
    trainer = trained(peft)
    loaded = hub.load_trained(trainer.args.output_dir)
    expected = answer(trainer.pipeline.unet)
    torch.testing.assert_close(answer(loaded.unet), expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(pictures(loaded), pictures(trainer.pipeline), atol=1e-5)
    base = DiffusionPipeline.from_pretrained(sd_folder)
    assert (answer(base.unet) - expected).abs().max() > 1e-3


def test_load_trained_of_a_base(sd_folder):
    base = DiffusionPipeline.from_pretrained(sd_folder)
    assert torch.equal(answer(hub.load_trained(sd_folder).unet), answer(base.unet))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_adapter_that_splits_the_base_weights(sd_folder, tmp_path, init):
    """Such a start moves a part of the base weights into the adapter: it is refused, or comes back as it was."""
    PEFT[init] = LoraConfig(r=2, lora_alpha=8, target_modules=TARGETS, init_lora_weights=init)
    try:
        trainer = make_trainer(sd_folder, tmp_path, init, save_strategy="no")
    except ValueError as error:
        assert "init_lora_weights" in str(error)  # noqa: PT017
        return
    finally:
        del PEFT[init]
    trainer.train()
    trainer.save_model()
    loaded = DiffusionPipeline.from_pretrained(sd_folder)
    loaded.load_lora_weights(tmp_path)
    torch.testing.assert_close(answer(loaded.unet), answer(trainer.pipeline.unet), rtol=0, atol=1e-5)


@pytest.mark.parametrize("peft", ["full", "lora"])
def test_save_model_elsewhere(trained, sd_folder, tmp_path, peft):
    trainer = trained(peft)
    trainer.save_model(str(tmp_path / "new" / "place"))
    loaded = hub.load_trained(str(tmp_path / "new" / "place"))
    torch.testing.assert_close(answer(loaded.unet), answer(trainer.pipeline.unet), rtol=0, atol=1e-6)
    assert not list(tmp_path.rglob("_incomplete*"))


@pytest.mark.parametrize("peft", ["full", "lora"])
def test_saving_again_replaces(sd_folder, tmp_path, peft):
    """A second save leaves the newest weights, no rest of the first one, and what others put there."""
    trainer = make_trainer(sd_folder, tmp_path, peft, save_strategy="no")
    trainer.save_model()
    (tmp_path / "notes.txt").write_text("mine")
    before = files(tmp_path)
    trainer.train()
    trainer.save_model()
    assert files(tmp_path) == before
    assert (tmp_path / "notes.txt").read_text() == "mine"
    loaded = hub.load_trained(str(tmp_path))
    torch.testing.assert_close(answer(loaded.unet), answer(trainer.pipeline.unet), rtol=0, atol=1e-6)


def test_weights_in_several_files(sd_folder, tmp_path, monkeypatch):
    """Weights above the size of one file get an index that diffusers finds, and that training resumes from."""
    save = functools.partial(hub.save_torch_state_dict, max_shard_size="100KB")
    monkeypatch.setattr(hub, "save_torch_state_dict", save)
    trainer = make_trainer(sd_folder, tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model()
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    expected = answer(trainer.pipeline.unet)
    assert torch.equal(answer(DiffusionPipeline.from_pretrained(tmp_path).unet), expected)
    again = make_trainer(sd_folder, tmp_path / "again")
    hub.load_policy(again.model, again.family, tmp_path / "checkpoint-1")
    assert torch.equal(answer(again.pipeline.unet), expected)


# ---- What a checkpoint holds ----------------------------------------------------------------------------------------

RESUME = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "run.json", "trainer_state.json", "training_args.json"}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize(
    ("peft", "expected"),
    [
        ("full", {"unet/config.json", "unet/diffusion_pytorch_model.safetensors"}),
        ("lora", ADAPTER | {"pytorch_lora_weights.safetensors"}),
        ("dora", ADAPTER | {"pytorch_lora_weights.safetensors"}),
        ("modules to save", ADAPTER),
        ("loha", ADAPTER),
    ],
)
def test_checkpoint_holds_what_resume_needs_and_nothing_frozen(trained, peft, expected):
    trainer = trained(peft)
    folder = Path(trainer.args.output_dir)
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    for checkpoint in folder.glob("checkpoint-*"):
        assert files(checkpoint) == RESUME | expected
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    name = "unet/diffusion_pytorch_model.safetensors" if peft == "full" else "adapter_model.safetensors"
    assert sum(tensor.numel() for tensor in load_file(folder / "checkpoint-2" / name).values()) == trainable
    moments = torch.load(folder / "checkpoint-2" / "optimizer.pt", weights_only=True)["state"].values()
    assert sum(state["exp_avg"].numel() for state in moments) == trainable


@pytest.mark.parametrize("peft", PEFT)
def test_weights_are_safetensors_only(trained, peft):
    """No pickle but the three of a checkpoint that hold optimizer, schedule and random state."""
    folder = trained(peft).args.output_dir
    pickles = {Path(name).name for name in files(folder) if name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt"))}
    assert pickles == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert not [name for name in files(folder) if "training_args" in name and not name.endswith(".json")]
    assert not list(Path(folder).rglob("_incomplete*"))


def test_lora_file_carries_rank_and_alpha(trained):
    path = Path(trained("lora").args.output_dir) / "pytorch_lora_weights.safetensors"
    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (metadata["unet.r"], metadata["unet.lora_alpha"]) == (2, 8)


def test_adapter_config_names_the_base(trained, sd_folder):
    config = json.loads((Path(trained("loha").args.output_dir) / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == sd_folder
    assert config["inference_mode"] is True


def test_training_args_are_a_record(trained):
    record = json.loads((Path(trained("full").args.output_dir) / "training_args.json").read_text())
    assert (record["beta"], record["max_steps"], record["learning_rate"]) == (5000.0, 2, 1e-3)


def test_save_only_model(sd_folder, tmp_path):
    make_trainer(sd_folder, tmp_path, "lora", save_only_model=True, max_steps=1).train()
    written = files(tmp_path / "checkpoint-1")
    records = {"run.json", "trainer_state.json", "training_args.json"}
    assert written == ADAPTER | records | {"pytorch_lora_weights.safetensors"}


@pytest.mark.parametrize(
    ("peft", "other", "message"),
    [
        ("full", "lora", "has training 'adapter', found 'full fine-tuning': resume with the recorded value"),
        ("lora", "full", "has training 'full fine-tuning', found 'adapter'"),
        ("lora", "loha", r"`adapter.peft_type` 'LOHA', found 'LORA'"),
    ],
)
def test_checkpoint_of_another_kind_is_refused(trained, sd_folder, tmp_path, peft, other, message):
    checkpoint = Path(trained(other).args.output_dir) / "checkpoint-1"
    trainer = make_trainer(sd_folder, tmp_path, peft)
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_checkpoint_of_fewer_adapted_modules_is_refused(trained, sd_folder, tmp_path):
    """Weights missing from a checkpoint would silently start at random."""
    trainer = make_trainer(sd_folder, tmp_path / "few", "family's targets", max_steps=2)
    shutil.copytree(Path(trained("lora").args.output_dir) / "checkpoint-1", tmp_path / "checkpoint-1")
    path = tmp_path / "checkpoint-1" / "adapter_model.safetensors"
    weights = load_file(path)
    kept = {name: tensor for name, tensor in weights.items() if "to_q" not in name}
    assert 0 < len(kept) < len(weights)
    hub.save_file(kept, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"(?s)missing.*to_q|to_q.*missing"):
        hub.load_policy(trainer.model, trainer.family, tmp_path / "checkpoint-1")


# ---- Whole or not at all --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three_steps(sd_folder, tmp_path_factory):
    """Undisturbed runs of three steps, one of each kind."""

    @functools.cache
    def three_steps(peft: str) -> DiffusionKTOTrainer:
        trainer = make_trainer(sd_folder, tmp_path_factory.mktemp("whole"), peft, max_steps=3)
        trainer.train()
        return trainer

    return three_steps


def fail_at_call(number: int, function):
    """`function`, which does its work and then fails as a full disk would, at its `number`-th call."""
    calls = []

    @functools.wraps(function)
    def failing(*args, **kwargs):
        calls.append(1)
        result = function(*args, **kwargs)
        if len(calls) == number:
            raise OSError("No space left on device")
        return result

    return failing


@pytest.mark.parametrize(
    ("peft", "owner", "name"),
    [
        ("full", "hub", "save_torch_state_dict"),
        ("lora", "hub", "save_file"),
        ("lora", "hub", "save_training_args"),
        ("full", "trainer", "_save_rng_state"),
        ("lora", "trainer", "_save_optimizer_and_scheduler"),
    ],
)
def test_checkpoint_that_fails_half_way_leaves_nothing(
    sd_folder, three_steps, tmp_path, monkeypatch, peft, owner, name
):
    whole = three_steps(peft)
    whole_folder = Path(whole.args.output_dir)

    owner = hub if owner == "hub" else DiffusionKTOTrainer
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail_at_call(2, getattr(owner, name)))
        broken = make_trainer(sd_folder, tmp_path / "broken", peft, max_steps=3)
        with pytest.raises(OSError, match="No space left"):
            broken.train()
    assert sorted(path.name for path in (tmp_path / "broken").iterdir()) == [
        "README.md",
        "assets",
        "checkpoint-1",
        "run.json",
    ]
    assert files(tmp_path / "broken" / "checkpoint-1") == files(whole_folder / "checkpoint-1")

    again = make_trainer(sd_folder, tmp_path / "broken", peft, max_steps=3)
    again.train(resume_from_checkpoint=True)
    assert_same(weights_of(again), weights_of(whole))
    assert files(tmp_path / "broken") == files(whole_folder)


def test_save_model_that_fails_keeps_the_old_one(sd_folder, tmp_path, monkeypatch):
    trainer = make_trainer(sd_folder, tmp_path, save_strategy="no")
    trainer.save_model()
    trainer.train()
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    monkeypatch.setattr(hub, "save_frozen_parts", fail_at_call(1, hub.save_frozen_parts))
    with pytest.raises(OSError, match="No space left"):
        trainer.save_model()
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before
    assert sorted(path.name for path in tmp_path.rglob("_*")) == []


@pytest.mark.parametrize("save_strategy", ["steps", "no"])
def test_rest_of_a_killed_run_is_cleaned(sd_folder, tmp_path, save_strategy):
    """A kill leaves a half-written checkpoint, or a folder that was moved aside; neither is taken for a checkpoint."""
    for rest in ("_incomplete/checkpoint-7/unet/half", "_incomplete/_old-vae/config.json"):
        (tmp_path / rest).parent.mkdir(parents=True)
        (tmp_path / rest).write_text("rest")
    trainer = make_trainer(sd_folder, tmp_path, max_steps=1, save_strategy=save_strategy)
    trainer.train()
    trainer.save_model()
    assert sorted(path.name for path in tmp_path.glob("_*")) == []
    assert not [name for name in files(tmp_path) if "half" in name or "checkpoint-7" in name]


def test_half_a_checkpoint_is_never_resumed_from(sd_folder, tmp_path):
    first = make_trainer(sd_folder, tmp_path, max_steps=1)
    first.train()
    (tmp_path / "_incomplete" / "checkpoint-2").mkdir(parents=True)
    again = make_trainer(sd_folder, tmp_path, max_steps=2)
    again.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in again.state.log_history if "loss" in entry] == [1, 2]
    assert sorted(path.name for path in tmp_path.glob("*point*")) == ["checkpoint-1", "checkpoint-2"]


# ---- Which checkpoints stay, and the best one -----------------------------------------------------------------------


def test_save_total_limit(sd_folder, tmp_path):
    make_trainer(sd_folder, tmp_path, "lora", max_steps=4, save_total_limit=2).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


class CopyCheckpoints(TrainerCallback):
    """Keeps a copy of each checkpoint, beyond `save_total_limit`."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def on_save(self, args, state, control, **kwargs):
        name = f"checkpoint-{state.global_step}"
        shutil.copytree(Path(args.output_dir) / name, self.folder / name)


@pytest.mark.parametrize(
    ("peft", "greater_is_better", "limit"),
    [("full", True, 1), ("full", False, None), ("lora", True, None), ("lora", False, 1)],
)
def test_best_model_is_loaded_and_kept(sd_folder, tmp_path, peft, greater_is_better, limit):
    trainer = make_trainer(
        sd_folder,
        tmp_path / "out",
        peft,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_rewards/margins",
        greater_is_better=greater_is_better,
        save_total_limit=limit,
        callbacks=[CopyCheckpoints(tmp_path / "copies")],
    )
    trainer.train()
    state, out = trainer.state, tmp_path / "out"
    values = {e["step"]: e["eval_rewards/margins"] for e in state.log_history if "eval_loss" in e}
    best = (max if greater_is_better else min)(values, key=values.get)
    assert len(set(values.values())) == 3
    assert state.best_global_step == best
    assert state.best_model_checkpoint == str(out / f"checkpoint-{best}")
    steps = {best} if limit == 1 else {1, 2, 3}
    assert {path.name for path in out.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in steps}
    for checkpoint in out.glob("checkpoint-*"):
        recorded = json.loads((checkpoint / "trainer_state.json").read_text())["best_model_checkpoint"]
        assert "_incomplete" not in recorded
        assert Path(recorded).parent == out

    # The model in memory and the one saved from it are the best checkpoint's, and no other's.
    trainer.save_model()
    saved = hub.load_trained(str(out))
    for step in values:
        other = make_trainer(sd_folder, tmp_path / "other", peft)
        hub.load_policy(other.model, other.family, tmp_path / "copies" / f"checkpoint-{step}")
        equal = all(torch.equal(weights_of(other)[name], w) for name, w in weights_of(trainer).items())
        assert equal == (step == best)
        assert torch.allclose(answer(saved.unet), answer(other.pipeline.unet), atol=1e-6) == (step == best)


@pytest.mark.slow
def test_best_checkpoint_survives_a_resume(sd_folder, tmp_path):
    changes = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_rewards/margins",
        "save_total_limit": 1,
    }
    whole = make_trainer(sd_folder, tmp_path / "whole", "lora", max_steps=4, **changes)
    whole.train()
    make_trainer(sd_folder, tmp_path / "parts", "lora", max_steps=2, **changes).train()
    again = make_trainer(sd_folder, tmp_path / "parts", "lora", max_steps=4, **changes)
    again.train(resume_from_checkpoint=True)
    assert Path(again.state.best_model_checkpoint).name == Path(whole.state.best_model_checkpoint).name
    assert Path(again.state.best_model_checkpoint).is_dir()
    assert_same(weights_of(again), weights_of(whole))


# ---- The Hub --------------------------------------------------------------------------------------------------------


class FakeHub:
    """Stands for `HfApi`: each commit is a copy of what would be uploaded."""

    def __init__(self, folder: Path):
        self.folder, self.commits, self.waiting, self.finish_at_once = folder, [], [], True

    def create_repo(self, repo_id, token=None, private=None, exist_ok=False):
        assert token == TOKEN
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"someone/{repo_id}")

    def upload_folder(
        self,
        *,
        repo_id,
        folder_path,
        commit_message,
        token,
        path_in_repo=None,
        revision=None,
        ignore_patterns=None,
        run_as_future=False,
    ):
        assert token == TOKEN
        assert repo_id == "someone/tiny-kto"
        commit = self.folder / f"{len(self.commits):02d}"
        for name in filter_repo_objects(sorted(files(folder_path)), ignore_patterns=ignore_patterns):
            target = commit / (path_in_repo or "") / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(Path(folder_path) / name, target)
        self.commits.append(SimpleNamespace(folder=commit, message=commit_message, path=path_in_repo))
        result = Future()
        self.waiting.append(result)
        if self.finish_at_once:
            self.finish()
        return result if run_as_future else commit_message

    def finish(self):
        for future in self.waiting:
            if not future.done():
                future.set_result("done")


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: fake)
    monkeypatch.setattr("trl_diffusion.trainer.saving.hf_api", lambda: fake)
    return fake


def pushing_trainer(sd_folder, tmp_path, peft, strategy, **changes):
    return make_trainer(
        sd_folder,
        tmp_path / "tiny-kto",
        peft,
        push_to_hub=True,
        hub_token=TOKEN,
        hub_strategy=strategy,
        **changes,
    )


def assert_no_token_in(folder) -> None:
    for name in files(folder):
        assert TOKEN.encode() not in (Path(folder) / name).read_bytes(), name


@pytest.mark.parametrize(
    ("peft", "strategy"),
    [
        *itertools.product(["full", "lora"], ["every_save", "checkpoint", "all_checkpoints", "end"]),
        ("loha", "every_save"),
    ],
)
def test_pushes(sd_folder, tmp_path, fake_hub, peft, strategy):
    trainer = pushing_trainer(sd_folder, tmp_path, peft, strategy)
    trainer.train()
    during = [(commit.message, commit.path) for commit in fake_hub.commits]
    message = "Training in progress, step {}"
    expected = {
        "every_save": [(message.format(step), None) for step in (1, 2)],
        "checkpoint": [
            pair
            for step in (1, 2)
            for pair in [(message.format(step), None), (message.format(step) + ", checkpoint", "last-checkpoint")]
        ],
        "all_checkpoints": [
            pair
            for step in (1, 2)
            for pair in [(message.format(step), None), (message.format(step) + ", checkpoint", f"checkpoint-{step}")]
        ],
        "end": [],
    }
    assert during == expected[strategy]
    trainer.push_to_hub()
    assert fake_hub.commits[-1].message == "End of training"

    # Each push carries the weights of its step, in files that diffusers (or PEFT) loads.
    step = 0
    for commit in fake_hub.commits:
        if commit.path is not None:
            written = {name.removeprefix(f"{commit.path}/") for name in files(commit.folder)}
            assert written == files(tmp_path / "tiny-kto" / f"checkpoint-{step}")
            continue
        step = 2 if commit.message == "End of training" else step + 1
        expected = make_trainer(sd_folder, tmp_path / "other", peft)
        hub.load_policy(expected.model, expected.family, tmp_path / "tiny-kto" / f"checkpoint-{step}")
        loaded = hub.load_trained(str(commit.folder), None if peft == "full" else sd_folder)
        torch.testing.assert_close(answer(loaded.unet), answer(expected.pipeline.unet), rtol=0, atol=1e-6)
        names = {name.split("/")[0] for name in files(commit.folder)}
        assert "README.md" in names
        assert not [name for name in names if name.startswith((".", "checkpoint-", "optimizer", "rng_state"))]
        assert ModelCard.load(commit.folder / "README.md").data.pipeline_tag == "text-to-image"

    assert_no_token_in(tmp_path)
    assert not list(tmp_path.rglob("training_args.bin"))

    # The base's path is known here, and nowhere else.
    if peft != "full":
        for folder in (tmp_path / "tiny-kto", tmp_path / "tiny-kto" / "checkpoint-2"):
            assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == sd_folder
    for commit in fake_hub.commits:
        for name in files(commit.folder):
            assert sd_folder.encode() not in (commit.folder / name).read_bytes(), name
    assert not list((tmp_path / "tiny-kto").glob("_*"))


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_pushed_checkpoint_can_be_resumed_from(sd_folder, tmp_path, fake_hub, strategy):
    whole = pushing_trainer(sd_folder, tmp_path, "lora", strategy)
    whole.train()
    first = next(commit for commit in fake_hub.commits if commit.path)
    again = make_trainer(sd_folder, tmp_path / "again", "lora")
    again.train(resume_from_checkpoint=str(first.folder / first.path))
    assert_same(weights_of(again), weights_of(whole))


def test_save_model_pushes(sd_folder, tmp_path, fake_hub):
    trainer = pushing_trainer(sd_folder, tmp_path, "full", "end", max_steps=1)
    trainer.train()
    trainer.save_model()
    assert [commit.message for commit in fake_hub.commits] == ["Model save"]
    loaded = DiffusionPipeline.from_pretrained(fake_hub.commits[0].folder)
    assert torch.equal(answer(loaded.unet), answer(trainer.pipeline.unet))
    assert_no_token_in(tmp_path)


class FinishAtLastSave(TrainerCallback):
    def __init__(self, fake):
        self.fake = fake

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps:
            self.fake.finish()


@pytest.mark.parametrize(("always", "steps"), [(False, [1]), (True, [1, 2, 3])])
def test_push_while_another_is_running(sd_folder, tmp_path, fake_hub, always, steps):
    fake_hub.finish_at_once = False
    trainer = pushing_trainer(
        sd_folder,
        tmp_path,
        "lora",
        "every_save",
        max_steps=3,
        hub_always_push=always,
        callbacks=[FinishAtLastSave(fake_hub)],
    )
    trainer.train()
    assert [commit.message for commit in fake_hub.commits] == [f"Training in progress, step {step}" for step in steps]


def test_rest_of_a_killed_run_is_not_pushed(sd_folder, tmp_path, fake_hub):
    trainer = pushing_trainer(sd_folder, tmp_path, "lora", "end", save_strategy="no", max_steps=1)
    trainer.train()
    for name in ("_incomplete/checkpoint-7", "_incomplete/unet"):
        (tmp_path / "tiny-kto" / name).mkdir(parents=True)
        (tmp_path / "tiny-kto" / name / "half.safetensors").write_text("rest")
    trainer.push_to_hub()
    assert not [name for name in files(fake_hub.commits[-1].folder) if "half" in name]


@pytest.mark.parametrize("report_to", ["none", "tensorboard"])
def test_token_of_the_download_is_in_no_file(sd_folder, tmp_path, fake_hub, report_to):
    """A token can also come in `model_init_kwargs`; tensorboard's files lie in the output folder and are pushed."""
    trainer = pushing_trainer(
        sd_folder, tmp_path, "lora", "every_save", model_init_kwargs={"token": TOKEN}, report_to=report_to
    )
    trainer.train()
    trainer.push_to_hub()
    assert_no_token_in(tmp_path)


# ---- The model card -------------------------------------------------------------------------------------------------


def loading_code(card: ModelCard) -> str:
    return re.search(r"## How to load\s+```python\n(.*?)```", card.text, re.DOTALL).group(1)


SAMPLES = {
    "validation_prompts": ["a cat | a dog", "a: 'dog'"],
    "validation_steps": 1,
    "num_validation_images": 1,
    "validation_inference_steps": 1,
}


@pytest.fixture(scope="module")
def card_trainer(sd_folder, tmp_path_factory):
    trainer = make_trainer(
        sd_folder,
        tmp_path_factory.mktemp("cards") / "my-model",
        "lora",
        beta=2345.0,
        eval_strategy="steps",
        eval_steps=1,
        seed=77,
        hub_token=TOKEN,
        model_init_kwargs={"token": TOKEN},
        **SAMPLES,
    )
    trainer.train()
    trainer.save_model()
    trainer.log({"eval_win_rate/pickscore": 0.75, "eval_rewards/margins": math.nan})
    trainer.create_model_card()
    return trainer


@pytest.fixture
def card(card_trainer):
    return ModelCard.load(Path(card_trainer.args.output_dir) / "README.md")


def test_card_metadata(card):
    data = card.data
    assert data.library_name == "diffusers"
    assert data.pipeline_tag == "text-to-image"
    assert {"trl", "trl-diffusion", "diffusion-kto", "lora"} <= set(data.tags)
    assert data.model_name == "my-model"
    # A local path means nothing on the Hub; its data are given as they are, and its base has no card.
    assert not {"base_model", "base_model_relation", "datasets", "license"} & set(data.to_dict())
    assert "look it up before you share" in card.text


def test_card_metrics(card, card_trainer):
    """What is logged last counts, and numbers only: the Hub takes no nan."""
    last = [entry for entry in card_trainer.state.log_history if "eval_loss" in entry][-1]
    name, results = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert name == "my-model"
    values = {result.metric_type: result.metric_value for result in results}
    assert {"loss", "win_rate/pickscore", "rewards/chosen", "rewards/rejected", "rewards/accuracies"} == set(values)
    for name in ("loss", "rewards/accuracies"):
        assert values[name] == pytest.approx(last[f"eval_{name}"])
        assert f"| eval_{name} | {last[f'eval_{name}']:.6g} |" in card.text
    assert {result.dataset_type for result in results if "win_rate" in result.metric_type} == {"prompts"}
    assert "| eval_errors/chosen |" in card.text
    assert "nan" not in card.text


def test_card_text(card, card_trainer, sd_folder):
    rows = dict(re.findall(r"^\| ([^|]+?) \| (.+?) \|$", card.text, re.MULTILINE))
    assert rows["base model"] == "tiny-sd"
    assert "Diffusion-KTO" in rows["method"]
    assert rows["beta"].startswith("2345 ")
    assert re.search(r"mean squared error.*factor 1/2", rows["beta"])
    assert (rows["steps"], rows["training rows"], rows["seed"], rows["data seed"]) == ("2", "12", "77", "77")
    assert rows["data fingerprint"] == f"`{unpaired()._fingerprint}`"
    assert rows["training"].startswith("adapter (LORA; r 2; target_modules to_k, to_out.0, to_q, to_v; lora_alpha 8")
    for name, version in {
        "Python": platform.python_version(),
        "trl": trl.__version__,
        "transformers": transformers.__version__,
        "diffusers": diffusers.__version__,
        "torch": torch.__version__.split("+")[0],
    }.items():
        assert f"{name} {version}" in rows["versions"]
    assert "2404.04465" in card.text
    assert re.search(
        r"```bibtex\n@inproceedings\{li2024aligning,.*Optimizing Human Utility.*```", card.text, re.DOTALL
    )


def test_card_lists_every_changed_option(card, card_trainer):
    options = yaml.safe_load(re.search(r"```yaml\n(.*?)```", card.text, re.DOTALL).group(1))
    assert {k: v for k, v in options.items() if k in SAMPLES} == SAMPLES
    expected = {"beta": 2345.0, "max_steps": 2, "learning_rate": 3e-2, "seed": 77, "lr_scheduler_type": "constant"}
    assert {name: options[name] for name in expected} == expected
    assert not {"weight_decay", "output_dir", "hub_token", "model_init_kwargs", "report_to"} & set(options)
    assert DiffusionKTOConfig("elsewhere", use_cpu=True, **options).beta == 2345.0


def test_card_tells_nothing_of_the_machine(card, card_trainer, sd_folder):
    """Neither a token nor a path; the adapter's own file needs the base's."""
    folder = Path(card_trainer.args.output_dir)
    assert_no_token_in(folder)
    for text in (card.content, (folder / "training_args.json").read_text()):
        assert str(folder.parent) not in text
        assert str(Path(sd_folder).parent) not in text


def test_card_shows_before_and_after(card, card_trainer):
    folder = Path(card_trainer.args.output_dir)
    prompts = SAMPLES["validation_prompts"]
    shown = [
        (entry["text"].removesuffix(" (before the training)"), entry["output"]["url"]) for entry in card.data.widget
    ]
    assert shown == [
        (prompt, f"assets/{when}-{i}.png") for i, prompt in enumerate(prompts) for when in ("after", "before")
    ]
    pixels = {url: np.asarray(PILImage.open(folder / url)) for _, url in shown}
    assert len({picture.tobytes() for picture in pixels.values()}) == 4
    for step, when in ((0, "before"), (2, "after")):  # the first of each row of the grids
        grid = np.asarray(PILImage.open(folder / "samples" / f"step-{step:06d}.png"))
        np.testing.assert_array_equal(grid[-20:-4, 4:20], pixels[f"assets/{when}-1.png"])
    pictures = re.findall(r"!\[.*?\]\((.+?)\)", card.text)
    assert pictures == ["assets/before_after.png", "assets/curves.png"]
    assert all((folder / name).is_file() for name in pictures)


def test_pictures_of_the_card_are_pushed(sd_folder, tmp_path, fake_hub):
    trainer = pushing_trainer(sd_folder, tmp_path, "lora", "every_save", **SAMPLES)
    trainer.train()
    trainer.push_to_hub()
    for commit in fake_hub.commits:
        card = ModelCard.load(commit.folder / "README.md")
        pictures = [entry["output"]["url"] for entry in card.data.widget]
        pictures += re.findall(r"!\[.*?\]\((.+?)\)", card.text)
        assert len(pictures) >= 5
        assert all((commit.folder / name).is_file() for name in pictures)
    assert_no_token_in(tmp_path)


def test_resumed_run_keeps_the_pictures_of_the_start(sd_folder, tmp_path):
    make_trainer(sd_folder, tmp_path, "lora", max_steps=1, **SAMPLES).train()
    before, after = ((tmp_path / "assets" / f"{when}-0.png").read_bytes() for when in ("before", "after"))
    changes = SAMPLES | {"validation_prompts": [SAMPLES["validation_prompts"][0], "a bird"]}
    again = make_trainer(sd_folder, tmp_path, "lora", max_steps=2, **changes)
    again.train(resume_from_checkpoint=True)
    assert (tmp_path / "assets" / "before-0.png").read_bytes() == before
    assert (tmp_path / "assets" / "after-0.png").read_bytes() != after
    # No start was drawn of the new prompt.
    urls = [entry["output"]["url"] for entry in ModelCard.load(tmp_path / "README.md").data.widget]
    assert urls == ["assets/after-0.png", "assets/before-0.png", "assets/after-1.png"]
    # Without samples there is no gallery, and a picture of an earlier run is not shown.
    make_trainer(sd_folder, tmp_path, "lora").create_model_card()
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.get("widget") is None
    assert "<Gallery />" not in card.text
    assert "![" not in card.text


@pytest.mark.parametrize("peft", ["full", "lora", "dora", "loha", "modules to save"])
def test_card_tells_how_to_load(trained, sd_folder, tmp_path, monkeypatch, peft):
    """The code of the card, run where model and base lie, draws what the policy draws; so does ComfyUI's file."""
    trainer = trained(peft)
    trainer.create_model_card()
    for folder in (trainer.args.output_dir, sd_folder):
        (tmp_path / Path(folder).name).symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    card, names = ModelCard.load(tmp_path / "tiny-kto" / "README.md"), {}
    exec(loading_code(card), names)
    assert names["image"].size == (16, 16)
    np.testing.assert_allclose(pictures(names["pipeline"]), pictures(trainer.pipeline), atol=1e-5)
    command = re.search(r"^trl-diffusion (export .*)$", card.text, re.MULTILINE)
    assert (command is not None) == ("ComfyUI" in card.text) == (peft in ("full", "lora"))
    if command:
        main(shlex.split(command.group(1)))
        exported = hub.load_trained("tiny-kto.safetensors")
        torch.testing.assert_close(answer(exported.unet), answer(trainer.pipeline.unet), rtol=0, atol=1e-5)


def test_card_of_a_base_from_the_hub(sd, tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: open\nlicense_link: LICENSE.md\n---\n")
    asked = []
    monkeypatch.setattr(
        card_module, "hf_hub_download", lambda *args, **kwargs: asked.append((args, kwargs)) or tmp_path / "README.md"
    )
    sd.register_to_config(_name_or_path="some-org/tiny-sd")
    trainer = make_trainer(sd, tmp_path / "out", "lora")
    for _ in range(2):  # asked for once
        trainer.create_model_card(model_name="Tiny", dataset_name="some-org/likes", tags="emoji")
    assert asked == [(("some-org/tiny-sd", "README.md"), {"revision": None})]
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.base_model, card.data.get("base_model_relation")) == ("some-org/tiny-sd", "adapter")
    assert card.data.datasets in ("some-org/likes", ["some-org/likes"])
    assert card.data.model_name == "Tiny"
    assert "emoji" in card.data.tags
    assert 'from_pretrained("some-org/tiny-sd")' in loading_code(card)
    assert "# Tiny\n" in card.text
    link = "https://huggingface.co/some-org/tiny-sd/blob/main/LICENSE.md"
    assert (card.data.license, card.data.license_name, card.data.license_link) == ("other", "open", link)
    assert f"That of the base model: [open]({link})." in card.text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: mit\nlanguage: en\n---\n# Base", {"license": "mit"}),
        (
            "---\nlicense: other\nlicense_name: x\nlicense_link: https://x.org\n---\n",
            {"license": "other", "license_name": "x", "license_link": "https://x.org"},
        ),
        ("---\nlicense: other\nlicense_link: LICENSE\n---\n", {"license": "other"}),
        ("---\nlicense: [mit, x]\n---\n", {}),
        ("---\nlicense: 'mit\n---\n", {}),
        ("# Base\nlicense: mit", {}),
        (None, {}),
    ],
    ids=["mit", "other", "file beside", "list", "broken", "no metadata", "no card"],
)
def test_license_is_read_and_never_guessed(tmp_path, text, expected):
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert card_module.base_license(str(tmp_path)) == expected


def test_license_of_a_model_that_cannot_be_reached(monkeypatch):
    def unreachable(*args, **kwargs):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(card_module, "hf_hub_download", unreachable)
    assert card_module.base_license("some-org/unreachable") == {}


def test_card_of_a_local_data_set(sd_folder, tmp_path):
    """The Hub refuses a card whose `datasets` is no data set id; a local folder is one for the text only."""
    (tmp_path / "likes" / "emoji").mkdir(parents=True)
    trainer = make_trainer(sd_folder, tmp_path / "out", "lora")
    trainer.create_model_card(dataset_name=str(tmp_path / "likes" / "emoji"))
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.get("datasets") is None
    assert "| training data | emoji |" in card.text


def test_card_of_a_pushed_model_loads_from_the_hub(sd_folder, tmp_path, fake_hub):
    trainer = pushing_trainer(sd_folder, tmp_path, "full", "end", save_strategy="no", max_steps=1)
    trainer.push_to_hub()
    card = ModelCard.load(fake_hub.commits[-1].folder / "README.md")
    assert 'from_pretrained("someone/tiny-kto")' in loading_code(card)
