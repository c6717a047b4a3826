"""Every engine trains, saves and resumes as one process does; what dies on the way can be resumed from."""

import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerState

from tests.conftest import unpaired
from tests.tiny import tiny_stable_diffusion
from trl_diffusion import DiffusionKTOConfig, DiffusionKTOTrainer, DiffusionSFTConfig, engines
from trl_diffusion.callbacks import LogImagesCallback
from trl_diffusion.cli.launch import resolve_accelerate_config
from trl_diffusion.ema import EMACallback


SCRIPT = Path(__file__).parent / "scripts" / "train_engine.py"
# ZeRO-3 gathers each tensor by itself: fewer of them make the tests faster.
SMALL = {
    "block_out_channels": (16,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "mid_block_type": None,
}
# Plain gradient descent without clipping, so that a gradient that is off by a factor shows; but for `sft`.
COMMON = {"max_steps": 6, "learning_rate": 1e-3, "optim": "sgd", "max_grad_norm": 0.0, "save_strategy": "no"}
STEP = {"window": "step", "beta": 100.0}
LORA = {"lora": True, "learning_rate": 0.3}
VARIANTS: dict[str, dict] = {
    "kto": {"method": "kto", **STEP},
    "kto lora": {"method": "kto", **STEP, **LORA},
    "rpo": {"method": "rpo", **STEP},
    "rpo lora": {"method": "rpo", **STEP, **LORA},
    "dpo": {"method": "dpo", "beta": 100.0},
    "dpo lora": {"method": "dpo", "beta": 100.0, **LORA},
    "sft": {"method": "sft", "learning_rate": 0.1, "max_grad_norm": 0.01},
    "sft lora": {"method": "sft", "lora": True, "learning_rate": 3.0, "max_grad_norm": 0.01},
}
ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
METHODS = [name for name in VARIANTS if not name.endswith("lora")]
# `make test-all` runs the whole product; otherwise each engine trains each method once, such that every pair of an
# engine, a method, a mode (full, LoRA) and a number of accumulated batches occurs.
ALL = os.environ.get("TRL_DIFFUSION_TEST_ALL") == "1"
SPLITS = [
    (engine, method + " lora" * lora, split + 1)
    for e, engine in enumerate(ENGINES)
    for m, method in enumerate(METHODS)
    for lora in (0, 1)
    for split in (0, 1)
    if ALL or (lora, split) == ((m + e) % 2, (m // 2 + e // 2) % 2)
]
ACCUMULATED = [*VARIANTS] if ALL else ["kto", "rpo lora", "dpo", "sft lora"]
BF16_ENGINES = [*ENGINES] if ALL else ["ddp", "zero3", "fsdp2"]
BF16 = {**VARIANTS["dpo"], "bf16": True}
ONCE = {"cache_features": True, "precompute_ref_log_probs": True}
# A reference that moves and an average of the weights, under AdamW: all that a checkpoint has to hold.
ADAM = {"optim": "adamw_torch", "learning_rate": 1e-3, "beta": 100.0, "save_strategy": "steps", "save_steps": 3}
STATEFUL: dict[str, dict] = {
    "stateful": {"method": "dpo", "sync_ref_model": True, "ref_model_sync_steps": 2, "ema_decay": 0.5, **ADAM},
    "stateful lora": {
        "method": "kto",
        "lora": True,
        "ema_decay": 0.5,
        "ema_export": True,
        "validation_prompts": ["picture 1"],
        "validation_steps": 6,
        "num_validation_images": 1,
        "validation_inference_steps": 2,
        **ADAM,
    },
}
# Where weights are sharded, both; otherwise one for each engine.
STATES = [
    (engine, name)
    for e, engine in enumerate(ENGINES)
    for i, name in enumerate(STATEFUL)
    if ALL or engine in ("zero3", "fsdp2") or i == e % 2
]


def launch(jobs: list[dict], folder: Path) -> list[bool]:
    """Runs jobs one after the other, see the script; says which ended well."""
    environment = {k: v for k, v in os.environ.items() if k != "CI"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"}
    environment["HF_DATASETS_CACHE"] = str(folder / "cache")
    tiny_stable_diffusion(**SMALL).save_pretrained(folder / "model")
    file = folder / "jobs.json"
    file.write_text(json.dumps([{"log": str(folder / f"log-{i}")} | job for i, job in enumerate(jobs)]))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(file)], env=environment, capture_output=True, text=True, timeout=3500
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(file.read_text())


def run(folder: Path, name: str, ranks: int, accumulation: int = 1, **options) -> dict:
    batch = 8 // ranks // accumulation
    sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    return COMMON | sizes | {"model": str(folder / "model"), "output_dir": str(folder / name)} | options


def logs(folder: Path) -> str:
    return "".join(file.read_text() for file in sorted(folder.glob("log-*")))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    full = folder / "unet" / "diffusion_pytorch_model.safetensors"
    return load_file(full if full.is_file() else folder / "adapter_model.safetensors")


def result(folder: Path) -> dict:
    return json.loads((folder / "log.json").read_text())


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in result(folder)["train"]]


def assert_same_training(one: Path, two: Path) -> None:
    assert losses(two) == pytest.approx(losses(one), abs=1e-5), two.name
    assert result(two)["eval"]["eval_loss"] == pytest.approx(result(one)["eval"]["eval_loss"], abs=1e-5), two.name
    assert_same_weights(one, two)


def assert_same_weights(one: Path, two: Path, atol: float = 1e-5) -> None:
    expected, found = weights(one), weights(two)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].dtype == weight.dtype
        torch.testing.assert_close(found[name], weight, rtol=0, atol=atol, msg=f"{two}: {name}")


def files(folder: Path) -> set[str]:
    """What was saved, but for the log."""
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} - {"log.json"}


# ---- As one process -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of all runs, named by engine; "one" is a single process."""
    if find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    folder = tmp_path_factory.mktemp("engines")
    runs = [run(folder, f"one {name} 1x1", 1, **options) for name, options in VARIANTS.items()]
    runs += [run(folder, f"one {name} 1x2", 1, 2, **VARIANTS[name]) for name in ACCUMULATED]
    runs += [run(folder, f"one {name}", 1, **options) for name, options in STATEFUL.items()]
    runs += [run(folder, "one bf16", 1, **BF16), run(folder, "one bf16 once", 1, **BF16, **ONCE)]
    jobs = [{"engine": "ddp", "ranks": 1, "runs": runs}]
    for engine in ENGINES:
        splits = [(name, n) for of_engine, name, n in SPLITS if of_engine == engine]
        runs = [run(folder, f"{engine} {name} 2x{n}", 2, n, **VARIANTS[name]) for name, n in splits]
        if engine in BF16_ENGINES:
            runs.append(run(folder, f"{engine} bf16", 2, **BF16))
        if engine in ("zero3", "fsdp2"):
            runs.append(run(folder, f"{engine} dpo once", 2, **VARIANTS["dpo"], **ONCE))
        for name in [name for of_engine, name in STATES if of_engine == engine]:
            options = STATEFUL[name]
            # "auto" has ZeRO-3 keep small parameters whole.
            options = options | ({"engine": "zero3 auto"} if (engine, name) == ("zero3", "stateful") else {})
            runs.append(run(folder, f"{engine} {name}", 2, **options))
            again = options | {"resume": str(folder / f"{engine} {name}" / "checkpoint-3")}
            runs.append(run(folder, f"{engine} {name} again", 2, **again))
        jobs.append({"engine": engine, "ranks": 2, "runs": runs})
    resumed = lambda engine: STATEFUL["stateful"] | {"resume": str(folder / f"{engine} stateful" / "checkpoint-3")}  # noqa: E731
    jobs.append({"engine": "fsdp2", "ranks": 4, "runs": [run(folder, "fsdp2 on 4", 4, **resumed("fsdp2"))]})
    runs = [run(folder, "zero2 on 4", 4, **resumed("zero2"), refused=True)]
    runs.append(run(folder, "zero2 from ddp", 4, **resumed("ddp"), refused=True))
    jobs.append({"engine": "zero2", "ranks": 4, "runs": runs})
    done = launch(jobs, folder)
    assert all(done), (done, logs(folder)[-6000:])
    return folder


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("variant", ACCUMULATED)
def test_accumulation_on_one_process(trained, variant):
    assert len(set(losses(trained / f"one {variant} 1x1"))) == 6
    assert_same_training(trained / f"one {variant} 1x1", trained / f"one {variant} 1x2")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("engine", "variant", "accumulation"), SPLITS)
def test_two_ranks_train_as_one_process_does(trained, engine, variant, accumulation):
    """2 x 4, and 2 x 2 accumulated twice, against 1 x 8."""
    assert_same_training(trained / f"one {variant} 1x1", trained / f"{engine} {variant} 2x{accumulation}")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_weights_lie_where_the_engine_has_them(trained, engine):
    """Else the test above would prove nothing. Frozen encoders are left alone."""
    expected = {"ddp": "MULTI_CPU", "fsdp2": "FSDP"}.get(engine, "DEEPSPEED")
    where = engine if engine in ("zero3", "fsdp2") else "whole"
    for variant, n in [(variant, n) for of_engine, variant, n in SPLITS if of_engine == engine]:
        found = result(trained / f"{engine} {variant} 2x{n}")
        assert (found["engine"], found["policy"], found["frozen"]) == (expected, where, "whole")
        assert found.get("reference", where) == where
        assert ("reference" in found) == (variant in ("kto", "rpo", "dpo"))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["one", *BF16_ENGINES])
def test_half_precision_is_for_computing_only(trained, engine):
    """The weights stay float32; policy and reference are rounded alike and start with equal errors."""
    found, exact = trained / f"{engine} bf16", trained / "one dpo 1x1"
    assert losses(found)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses(found) != losses(exact)
    assert losses(found) == pytest.approx(losses(exact), abs=0.05)
    assert {weight.dtype for weight in weights(found).values()} == {torch.float32}
    assert_same_weights(exact, found, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero3 dpo", "fsdp2 dpo", "one bf16"])
def test_what_is_computed_before_is_the_same(trained, name):
    """Features and the reference's errors, by a model that no engine has yet: in the precision that it will have."""
    once, twin = trained / f"{name} once", trained / ("one bf16" if "bf16" in name else "one dpo 1x1")
    assert "reference" not in result(once)
    if "bf16" in name:
        assert losses(once)[0] == pytest.approx(math.log(2), abs=1e-6)
        assert losses(once) == pytest.approx(losses(twin), abs=0.05)
    else:
        assert_same_training(twin, once)


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "name"), STATES)
def test_resume_is_exact(trained, engine, name):
    """Optimizer, moving reference and moving average go on as if nothing had been."""
    once, again = trained / f"{engine} {name}", trained / f"{engine} {name} again"
    assert losses(once) == losses(again)
    for part in ("checkpoint-6", "checkpoint-6/ema"):
        assert_same_weights(once / part, again / part, atol=0)
        assert_same_weights(trained / f"one {name}" / part, once / part, atol=2e-4)  # AdamW enlarges the last digit
    last, average = weights(once / "checkpoint-6"), weights(once / "checkpoint-6" / "ema")
    assert any(not torch.equal(last[key], average[key]) for key in last)
    if name == "stateful":
        reference = "checkpoint-6/reference/diffusion_pytorch_model.safetensors"
        one, two, three = (load_file(root / reference) for root in (trained / f"one {name}", once, again))
        for key in one:
            torch.testing.assert_close(two[key], one[key], rtol=0, atol=2e-4)
            assert torch.equal(two[key], three[key])
            assert one.keys() == last.keys()
        assert any(not torch.equal(one[key], last[key]) for key in one)


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "name"), STATES)
def test_the_same_files_are_saved(trained, engine, name):
    def saved(root: Path) -> set[str]:
        # How an engine keeps its own state is its own affair.
        state = ("optimizer", "rng_state", "global_step", "latest", "zero_to_", "scheduler.pt")
        return {file for file in files(root) if not Path(file).parts[1:2] or not Path(file).parts[1].startswith(state)}

    assert saved(trained / f"{engine} {name}") == saved(trained / f"one {name}")


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "name"), [*(("one", name) for name in STATEFUL), *STATES])
def test_the_average_is_exported_on_request(trained, engine, name):
    """`ema_export` is set in the run with the adapter only."""
    exported = "checkpoint-6/ema" if name == "stateful lora" else "checkpoint-6"
    assert_same_weights(trained / f"{engine} {name}" / exported, trained / f"{engine} {name}", atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("engine", [engine for engine, name in STATES if name == "stateful lora"])
def test_every_engine_draws(trained, engine):
    """Before the first step, where the policy is the start, and at the end with the average of the weights."""
    for step in (0, 6):
        one, two = (
            np.asarray(Image.open(trained / f"{root} stateful lora" / "samples" / f"step-{step:06d}.png"), np.int16)
            for root in ("one", engine)
        )
        assert abs(one - two).max() <= 3


@pytest.mark.slow
def test_resume_on_another_number_of_ranks(trained):
    """Of DDP see test_processes.py."""
    assert losses(trained / "fsdp2 on 4") == pytest.approx(losses(trained / "fsdp2 stateful"), abs=1e-5)
    assert_same_weights(trained / "fsdp2 stateful", trained / "fsdp2 on 4", atol=2e-4)
    for rank in range(4):
        told = (trained / "zero2 on 4" / f"refused-{rank}").read_text()
        assert "is in 2 parts, found 4 rank(s), and DeepSpeed cannot cut it anew: resume with 2 ranks" in told
        told = (trained / "zero2 from ddp" / f"refused-{rank}").read_text()
        assert "was written under one process or DDP, found DeepSpeed: resume with the engine of the first" in told


# ---- The moving average and the moving reference --------------------------------------------------------------------


def kto_trainer(tmp_path, **options):
    sizes = {"per_device_train_batch_size": 4, "beta": 100.0, "learning_rate": 1e-3, "max_steps": 4, "save_steps": 2}
    args = DiffusionKTOConfig(str(tmp_path), use_cpu=True, report_to="none", save_strategy="steps", **sizes | options)
    return DiffusionKTOTrainer(tiny_stable_diffusion(), args=args, train_dataset=unpaired())


class Recorder(TrainerCallback):
    """Keeps the policy's weights of every step."""

    def __init__(self, trainer):
        self.trainer, self.steps = trainer, []

    def on_train_begin(self, *args, **kwargs):
        self.steps = [{k: w.detach().clone() for k, w in self.trainer.model.state_dict().items()}]

    def on_step_end(self, *args, **kwargs):
        self.steps.append({k: w.detach().clone() for k, w in self.trainer.model.state_dict().items()})


def test_the_average_is_that_of_the_steps(tmp_path):
    trainer = kto_trainer(tmp_path, ema_decay=0.5)
    recorder = Recorder(trainer)
    trainer.add_callback(recorder)
    trainer.train()
    average = weights(tmp_path / "checkpoint-4" / "ema")
    for name in average:
        _, *rest = (step[name] for step in recorder.steps)
        # Of the steps before: none, 2/11, 3/12, 4/13 of what was there.
        expected = rest[0]
        for kept, w in zip((2 / 11, 3 / 12, 4 / 13), rest[1:], strict=True):
            expected = kept * expected + (1 - kept) * w
        torch.testing.assert_close(average[name], expected, rtol=0, atol=1e-6)
        assert torch.equal(trainer.model.state_dict()[name], rest[-1]), "the policy keeps its own weights"


@pytest.mark.parametrize("decay", [0.1, 0.9, 0.9999])
def test_the_average_is_that_of_diffusers(decay):
    """Step by step with its `EMAModel`, whose warm-up is its default too."""
    weights = torch.nn.Parameter(torch.zeros(3))
    theirs = EMAModel([weights], decay=decay)
    ours = EMACallback(None, decay)
    ours._parts = lambda: [weights]
    ours.on_train_begin(None, None, None)
    for step in range(1, 60):
        weights.data = torch.randn(3, generator=torch.Generator().manual_seed(step))
        theirs.step([weights])
        ours.on_step_end(None, TrainerState(global_step=step), None)
        torch.testing.assert_close(ours.average[0], theirs.shadow_params[0], rtol=1e-6, atol=1e-6)


def test_images_are_drawn_with_the_average(tmp_path):
    trainer = kto_trainer(tmp_path, ema_decay=0.5, learning_rate=1e-2)
    trainer.train()
    callback = LogImagesCallback(trainer, ["picture 1"], num_images_per_prompt=1, num_inference_steps=2)
    drawn = np.asarray(callback.draw())
    ema, trainer.ema = trainer.ema, None
    assert not np.array_equal(np.asarray(callback.draw()), drawn)
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint-4" / "ema"))
    assert np.array_equal(np.asarray(callback.draw()), drawn)
    assert ema.average


def test_the_reference_follows(tmp_path):
    """At steps 2 and 4, as TRL computes it."""
    trainer = kto_trainer(tmp_path, sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=0.25)
    recorder = Recorder(trainer)
    trainer.add_callback(recorder)
    trainer.train()
    for name, reference in trainer.reference.model.state_dict().items():
        start, _, second, _, fourth = (step[name] for step in recorder.steps)
        expected = 0.75 * (0.75 * start + 0.25 * second) + 0.25 * fourth
        torch.testing.assert_close(reference, expected, rtol=0, atol=1e-6)
        assert not reference.requires_grad


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"ema_decay": 0.5}, {}, r"has `ema_decay` 0\.5, found None: resume with the recorded value"),
        ({}, {"ema_decay": 0.5}, r"has `ema_decay` None, found 0\.5"),
        ({}, {"sync_ref_model": True}, r"has `sync_ref_model` False, found True"),
    ],
)
def test_resume_with_another_choice_is_refused(tmp_path, first, second, message):
    kto_trainer(tmp_path, max_steps=2, **first).train()
    with pytest.raises(ValueError, match=message):
        kto_trainer(tmp_path, **second).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ema_decay": 1.0}, r"`ema_decay` must be in \(0, 1\), found 1.0"),
        ({"ema_export": True}, r"`ema_export=True` needs a moving average of the weights: set `ema_decay`"),
        (
            {"ema_export": True, "ema_decay": 0.9, "load_best_model_at_end": True, "eval_strategy": "steps"},
            r"Found both `ema_export=True` and `load_best_model_at_end=True`, expected one answer",
        ),
    ],
)
def test_ema_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        DiffusionSFTConfig(str(tmp_path), use_cpu=True, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"sync_ref_model": True, "ref_model_mixup_alpha": 0.0},
            r"`ref_model_mixup_alpha` must be in \(0, 1\], found 0.0",
        ),
        ({"sync_ref_model": True, "ref_model_sync_steps": 0}, r"`ref_model_sync_steps` must be at least 1, found 0"),
        (
            {"sync_ref_model": True, "precompute_ref_log_probs": True},
            r"Found both `sync_ref_model=True` and `precompute_ref_log_probs=True`, but errors that are computed",
        ),
        ({"ref_model_sync_steps": 8}, r"which belong to `sync_ref_model=True`: set it, or leave them out"),
    ],
)
def test_sync_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        DiffusionKTOConfig(str(tmp_path), use_cpu=True, **options)


@pytest.mark.parametrize("sharded", [True, False])
def test_no_rank_holds_the_weights_twice(monkeypatch, sharded):
    """Of a model that an engine is going to cut in parts, the copy has the same tensors until then."""
    monkeypatch.setattr(engines, "is_sharded", lambda _: sharded)
    model = tiny_stable_diffusion().unet
    copy = engines.frozen_copy(model, None)
    assert type(copy) is type(model)
    for (name, mine), (again, other) in zip(model.named_parameters(), copy.named_parameters(), strict=True):
        assert name == again
        assert mine is not other
        assert torch.equal(mine, other)
        assert (mine.data_ptr() == other.data_ptr()) == sharded
        assert mine.requires_grad
        assert not other.requires_grad


def test_an_adapter_has_no_reference_that_could_follow(tmp_path):
    from peft import LoraConfig

    with pytest.raises(ValueError, match=r"Found `sync_ref_model=True` with a `peft_config`: .* set it to False"):
        DiffusionKTOTrainer(
            tiny_stable_diffusion(),
            args=DiffusionKTOConfig(
                str(tmp_path), use_cpu=True, sync_ref_model=True, per_device_train_batch_size=4, report_to="none"
            ),
            train_dataset=unpaired(),
            peft_config=LoraConfig(r=4),
        )


# ---- Faults ---------------------------------------------------------------------------------------------------------


FAULTS: dict[str, dict] = {
    "rank killed in a step": {"when": "step", "ranks": [1], "step": 3},
    "all killed in a step": {"when": "step", "ranks": [0, 1], "step": 3},
    "first killed in a checkpoint": {"when": "checkpoint", "ranks": [0], "step": 4},
    "second killed in a checkpoint": {"when": "checkpoint", "ranks": [1], "step": 4},
    "all killed in a checkpoint": {"when": "checkpoint", "ranks": [0, 1], "step": 4},
    # The weights are about 140 kilobytes, the optimizer's state 280.
    "disk full for weights": {"when": "disk 100000", "ranks": [0], "step": 4},
    "disk full for the optimizer": {"when": "disk 200000", "ranks": [0], "step": 4},
    "rank killed in the cache": {"when": "cache", "ranks": [1], "step": 0},
    "all killed in the cache": {"when": "cache", "ranks": [0, 1], "step": 0},
}
SHARDED_FAULTS = {
    "zero2": {"when": "checkpoint", "ranks": [0, 1], "step": 4},
    "fsdp2": {"when": "checkpoint", "ranks": [1], "step": 4},
}


def options_of(name: str) -> dict:
    options = ADAM | {"save_steps": 2, "ema_decay": 0.5}
    # Rows of its own, so that it finds no cache of another run.
    rows = {"rank killed in the cache": 40, "all killed in the cache": 41}.get(name)
    return options if rows is None else options | {"method": "rpo", "window": "batch", "rows": rows}


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    """Undisturbed runs, the same runs disturbed and resumed, and ranks that disagree."""
    folder = tmp_path_factory.mktemp("faults")
    jobs, expected = [], []

    def add(engine: str, ends_well: bool, *runs) -> None:
        jobs.append({"engine": engine, "ranks": 2, "runs": runs})
        expected.append(ends_well)

    for name, fault in FAULTS.items():
        add("ddp", False, run(folder, name, 2, **options_of(name), fault=fault))
    resumed = [run(folder, name, 2, **options_of(name), resume="last") for name in FAULTS]
    undisturbed = [run(folder, "undisturbed", 2, **options_of(""))]
    undisturbed += [run(folder, f"undisturbed {name}", 2, **options_of(name)) for name in FAULTS if "cache" in name]
    disagree = [
        run(folder, "rows", 2, by_rank={"rows": [12, 11]}, refused=True),
        run(folder, "rates", 2, by_rank={"learning_rate": [1e-2, 1e-3]}, refused=True),
    ]
    add("ddp", True, *resumed, *undisturbed, *disagree)
    for engine, fault in SHARDED_FAULTS.items():
        add(engine, False, run(folder, engine, 2, **options_of(""), fault=fault))
        again = run(folder, engine, 2, **options_of(""), resume="last")
        add(engine, True, again, run(folder, f"undisturbed {engine}", 2, **options_of("")))
    done = launch(jobs, folder)
    assert done == expected, (done, logs(folder)[-6000:])
    return folder


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", [*FAULTS, *SHARDED_FAULTS])
def test_disturbed_runs_can_be_resumed(faults, name):
    """To the last bit, and without leftovers."""
    twin = faults / (f"undisturbed {name}" if name in SHARDED_FAULTS or "cache" in name else "undisturbed")
    assert files(faults / name) == files(twin)
    for part in ("", "checkpoint-6", "checkpoint-6/ema"):
        assert_same_weights(twin / part, faults / name / part, atol=0)
    assert losses(faults / name) == losses(twin)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["weights", "the optimizer"])
def test_a_full_disk_is_told(faults, what):
    name = f"disk full for {what}"
    told = (faults / f"log-{list(FAULTS).index(name)}.0").read_text()
    assert f"OSError: The checkpoint of step 4 could not be written to {faults / name}: " in told
    assert "earlier checkpoints are whole: if the disk is full make room" in told


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("rows", "the number of training rows: found 12 on rank 0 and 11 on rank 1"),
        ("rates", "`learning_rate`: found 0.01 on rank 0 and 0.001 on rank 1"),
    ],
)
def test_ranks_that_disagree_are_refused(faults, name, found):
    for rank in range(2):
        assert f"The ranks disagree on {found}" in (faults / name / f"refused-{rank}").read_text()


# ---- Configuration --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["single_gpu", "multi_gpu", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload", "fsdp2", "fsdp2_offload"],
)
def test_accelerate_config_by_name(name):
    options = resolve_accelerate_config(["--num_processes", "2", "--accelerate_config", name])
    assert options[:3] == ["--num_processes", "2", "--config_file"]
    assert Path(options[3]).name == f"{name}.yaml"
    assert Path(options[3]).is_file()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"block_out_channels": (320, 1280), "attention_head_dim": 8}, 1280),
        ({"num_attention_heads": 24, "attention_head_dim": 64}, 1536),
        ({"dim": 3840, "n_heads": 30}, 3840),
    ],
)
def test_width_of_a_denoiser(config, expected):
    class Denoiser:
        pass

    denoiser = Denoiser()
    denoiser.config = config
    assert engines.width(denoiser) == expected
    denoiser.config = {}
    with pytest.raises(ValueError, match=r"Found no width in the configuration of a Denoiser: replace 'auto' by"):
        engines.width(denoiser)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (
            "global_step3/zero_pp_rank_0_mp_rank_00_optim_states.pt",
            r"written under DeepSpeed, found one process or DDP: resume with the engine of the first run",
        ),
        ("optimizer.bin", r"written under FSDP2, found one process or DDP: resume with the engine of the first run"),
    ],
)
def test_checkpoint_of_another_engine_is_refused(tmp_path, file, message):
    """Trainer would go on with a new optimizer, without a word."""
    trainer = kto_trainer(tmp_path, max_steps=2)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-2"
    (checkpoint / "optimizer.pt").unlink()
    (checkpoint / file).parent.mkdir(exist_ok=True)
    (checkpoint / file).touch()
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=str(checkpoint))
