"""The bench: it times the real training and changes nothing of it. No test looks at how long something took."""

import functools
import json
import multiprocessing
import os
import shlex
import signal

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback

from tests.methods import METHODS
from tests.test_methods import ALL, BOTH, assert_close, losses, trained, trainer_of, weights
from trl_diffusion.bench import measure as bench
from trl_diffusion.bench.estimate import published_models
from trl_diffusion.bench.measure import PARTS, BareLoop, Stopwatch, as_text, measure, synthetic_data
from trl_diffusion.bench.pipelines import published
from trl_diffusion.bench.turns import Steps, compare, comparison_as_text, ratios
from trl_diffusion.cli import main
from trl_diffusion.families import family_of


class Clock:
    """A clock that goes on when it is told to."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


def test_stopwatch(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(bench, "time", clock)
    watch = Stopwatch()
    watch.start()
    clock.now += 1  # other
    with watch.part("data"):
        clock.now += 2
        with watch.part("reference"):
            clock.now += 4
            with watch.part("policy forward"):  # which the reference's forward goes through
                clock.now += 8
        clock.now += 16
    with watch.part("policy forward"):
        clock.now += 32
    with watch.part("data"):
        pass
    assert watch.seconds == {
        "data": 18.0,
        "features": 0.0,
        "reference": 12.0,
        "policy forward": 32.0,
        "backward": 0.0,
        "optimizer": 0.0,
        "other": 1.0,
    }


@ALL
@BOTH
def test_the_training_that_is_measured_is_the_training(tmp_path, method, peft_config):
    options = {"max_steps": 6, "peft_config": peft_config, "gradient_accumulation_steps": 2, "report_to": "none"}
    plain = trained(method, tmp_path / "plain", **options)
    measured = trainer_of(method, tmp_path / "measured", **options)
    result = measure(measured, warmup=1, steps=2)
    # To the last bit, up to the one step in which counting FLOPs takes some kernels apart.
    assert losses(measured)[:3] == losses(plain)[:3]
    assert losses(measured) == pytest.approx(losses(plain), abs=1e-4)
    assert_close(weights(measured), weights(plain))
    assert result["images_per_step"] == 8 * (1 if method in ("kto", "sft") else 2)
    assert result["images_per_second"] == pytest.approx(result["images_per_step"] / result["step_seconds"])
    assert result["parameters"] == sum(p.numel() for n, p in measured.model.named_parameters() if "lora_" not in n)
    assert list(result["part_seconds"]) == list(PARTS)
    unused = {"reference"} if method == "sft" else set()
    assert {name for name, seconds in result["part_seconds"].items() if seconds == 0} == unused


def test_parts_of_a_step(tmp_path):
    """With everything computed before there is no reference; they add up to the steps."""
    trainer = trainer_of(
        "dpo", tmp_path, max_steps=6, cache_features=True, precompute_ref_log_probs=True, num_ref_draws=1
    )
    result = measure(trainer, warmup=1, steps=2, bare=False)
    assert result["part_seconds"]["reference"] == 0
    assert "ratio_to_bare_loop" not in result
    assert "bare" not in as_text(result)


@BOTH
def test_bare_loop_makes_the_step_of_a_plain_loss(tmp_path, peft_config):
    """Against the same, written out: gradient of the mean error, clipped, and one step of AdamW."""
    trainer = trainer_of("dpo", tmp_path, peft_config=peft_config)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    noised = trainer.corrupt(trainer._prepare_inputs(batch))
    bare = BareLoop(trainer, [noised])
    bare.step()

    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    trainer.errors(trainer.model, noised).mean().backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True).step()
    for one, two in zip(parameters, bare.parameters, strict=True):
        torch.testing.assert_close(two, one)
    assert not any(p.requires_grad for p in bare.reference.parameters())
    assert not any("lora_" in name for name, _ in bare.reference.named_parameters())


def test_flops_are_those_of_the_step(tmp_path):
    """Policy forward and backward, reference forward; VAE and text encoder have been run before."""
    trainer = trainer_of("dpo", tmp_path, max_steps=4, cache_features=True, activation_checkpointing=False)
    noised = trainer.corrupt(trainer._prepare_inputs(next(iter(trainer.get_train_dataloader()))))
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        trainer.errors(trainer.model, noised)
    with FlopCounterMode(display=False) as both:
        trainer.errors(trainer.model, noised).sum().backward()
    trainer.model.zero_grad()
    result = measure(trainer, warmup=1, steps=1, bare=False)
    assert result["flops"] == forward.get_total_flops() + both.get_total_flops() > 0


class Noting(TrainerCallback):
    """Appends to a file who makes a step."""

    def __init__(self, name, file, fails_at=None):
        self.name, self.file, self.fails_at = name, file, fails_at

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.fails_at:
            raise RuntimeError(f"{self.name} makes no more steps")
        with self.file.open("a") as notes:
            notes.write(f"{self.name}{state.global_step} ")


def noting(method, folder, fails_at=None, **options):
    """A trainer that writes down its steps; made in a second process, too."""
    callbacks = [Noting(method, folder / "notes", fails_at)]
    return trainer_of(method, folder / method, callbacks=callbacks, report_to="none", **options)


@pytest.mark.slow
@BOTH
def test_trainings_in_turns_are_the_trainings(tmp_path, peft_config):
    """To the last bit those that are alone, though they differ in what a step is."""
    options = {"max_steps": 3, "peft_config": peft_config}
    alone = trained("dpo", tmp_path / "alone", report_to="none", **options)
    this = noting("dpo", tmp_path, **options)
    other = functools.partial(noting, "rpo", tmp_path, gradient_accumulation_steps=2, **options)
    result = compare(this, other, warmup=1)
    assert (tmp_path / "notes").read_text() == "dpo0 rpo0 dpo1 rpo1 dpo2 rpo2 "
    assert losses(this) == losses(alone)
    assert all(torch.equal(weights(this)[name], weight) for name, weight in weights(alone).items())
    assert result["this"]["method"] == "Diffusion-DPO"
    assert result["against"]["method"] == "Diffusion-RPO"
    assert result["against"]["images_per_step"] == 2 * result["this"]["images_per_step"]
    assert result["loss_difference"] is None


@pytest.mark.slow
def test_an_error_of_the_other_is_told(tmp_path):
    this = noting("sft", tmp_path, max_steps=9)
    other = functools.partial(noting, "dpo", tmp_path, fails_at=2, max_steps=9)
    with pytest.raises(RuntimeError, match=r"(?s)compared with broke off.*Traceback.*dpo makes no more steps"):
        compare(this, other, warmup=1)
    assert (tmp_path / "notes").read_text() == "sft0 dpo0 sft1 dpo1 sft2 "
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_an_error_ends_the_other_too(tmp_path):
    this = noting("sft", tmp_path, fails_at=1, max_steps=9)
    with pytest.raises(RuntimeError, match="sft makes no more steps"):
        compare(this, functools.partial(noting, "dpo", tmp_path, max_steps=9), warmup=1)
    assert (tmp_path / "notes").read_text() == "sft0 dpo0 "
    assert not multiprocessing.active_children()


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_the_other_is_killed(tmp_path):
    with pytest.raises(RuntimeError, match="compared with was killed"):
        compare(trainer_of("sft", tmp_path), killed, warmup=1)


def test_ratio_of_neighbours(tmp_path):
    """Three times as fast for as many images, whatever the machine does meanwhile; twice the images count for it."""
    trainer = trainer_of("sft", tmp_path, report_to="none")
    numbers = bench.summary(trainer, 3.0)
    assert numbers["images_per_second"] == pytest.approx(4 / 3)
    this = Steps(numbers, [1.0, 3.0, 2.0], [0.5, 0.25])
    result = ratios(this, Steps(numbers, [3.0, 9.0, 7.0], [0.5, 0.5]))
    assert (result["ratio"], result["loss_difference"]) == (3, 0.25)
    text = comparison_as_text(result, "--dataloader_num_workers 1")
    assert "images/s, this / against  3.000\nlosses differ by at most  0.25" in text
    assert "torch " + torch.__version__ + "; --dataloader_num_workers 1\n" in text

    accumulated = ratios(this, Steps(numbers | {"images_per_step": 8}, [3.0, 9.0, 7.0], [0.5, 0.5, 0.5, 0.5]))
    assert (accumulated["ratio"], accumulated["loss_difference"]) == (1.5, None)
    assert "losses" not in comparison_as_text(accumulated, "--gradient_accumulation_steps 2")


def test_mfu():
    result = {
        **{"method": "Diffusion-DPO", "model": "UNet", "parameters": 2e6, "trainable_parameters": 1e6},
        **{"resolution": 64, "images_per_step": 8, "images_per_second": 4.0, "step_seconds": 2.0, "flops": 3e12},
        **{"part_seconds": dict.fromkeys(PARTS, 0.1), "peak_memory": 2**31, "hardware": "x", "torch": "2"},
    }
    assert "MFU                   15.0 % of 10 TFLOP/s" in as_text(result, peak_tflops=10)
    assert "peak memory           2.00 GiB" in as_text(result)
    assert "MFU" not in as_text(result)


@pytest.mark.parametrize("method", METHODS)
def test_synthetic_data(method, tmp_path):
    trainer_of(method, tmp_path, synthetic_data(8, 16, METHODS[method][1]))


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd35-medium"])
def test_random_pipelines_are_of_their_family(name):
    """Without their memory: the classes fit together, and the family takes them as they are."""
    model = published_models()[name]
    family = family_of(published(name, device="meta"))
    assert family.pipeline_class == model["pipeline_class"]
    assert family.default_resolution() == model["resolution"]


def test_command(sd_folder, tmp_path, capsys):
    file = tmp_path / "numbers.json"
    command = f"bench --method rpo --model_name_or_path {sd_folder} --bench_steps 1 --bench_warmup 1 --use_peft "
    command += f"--use_cpu --per_device_train_batch_size 2 --cache_features --json_file {file}"
    main(command.split())
    printed, result = capsys.readouterr().out, json.loads(file.read_text())
    assert "Diffusion-RPO on a UNet2DConditionModel of" in printed
    assert f"step/bare loop  {result['ratio_to_bare_loop']:10.3f}" in printed
    assert result["trainable_parameters"] < result["parameters"]
    assert result["images_per_step"] == 4


@pytest.mark.slow
def test_command_against(sd_folder, tmp_path, capsys):
    file = tmp_path / "numbers.json"
    command = f"bench --method dpo --model_name_or_path {sd_folder} --bench_steps 2 --bench_warmup 1 --use_cpu "
    command += f"--per_device_train_batch_size 2 --json_file {file} --against"
    main([*command.split(), "--method kto --per_device_train_batch_size 4"])
    printed, result = capsys.readouterr().out, json.loads(file.read_text())
    assert "this:    Diffusion-DPO on a UNet2DConditionModel of" in printed
    assert "against: Diffusion-KTO on a UNet2DConditionModel of" in printed
    assert f"images/s, this / against  {result['ratio']:.3f}" in printed
    assert result["this"]["images_per_step"] == result["against"]["images_per_step"] == 4


def test_command_with_random_weights(monkeypatch, capsys):
    """The pipeline that is named, in its true class; here a tiny one stands for it."""
    from tests.tiny import tiny_stable_diffusion
    from trl_diffusion.bench import pipelines

    monkeypatch.setattr(pipelines, "small", tiny_stable_diffusion)
    main("bench --method sft --bench_steps 1 --bench_warmup 1 --use_cpu --no_bare_loop".split())
    printed = capsys.readouterr().out
    assert "Diffusion-SFT on a UNet2DConditionModel of" in printed
    assert "bare loop" not in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--max_steps 5 --use_cpu", "Found max_steps=5, expected none: `bench_warmup` and `bench_steps` say"),
        ("--bench_steps 0", "Found bench_steps=0 and bench_warmup=2, expected at least 1."),
        ("--use_cpu --against '--max_steps 5'", "Found max_steps=5, expected none"),
        (
            "--use_cpu --against '--bench_steps 5'",
            "Found options of the measurement in `against='--bench_steps 5'`, which is",
        ),
        (
            "--use_cpu --peak_tflops 1 --against '--bf16 true'",
            "Found `peak_tflops` with `against`, which counts no FLOPs: drop one",
        ),
    ],
)
def test_bad_options(sd_folder, refused, options, message):
    assert message in refused("bench", "--model_name_or_path", sd_folder, *shlex.split(options))
