"""
Times the real training step, beside a bare loop that does its arithmetic and nothing else.

A trainer trains; a callback looks at the clock. After each step the bare loop makes one of its own, on copies of the
weights and on the batch that the trainer saw first, so that both meet the same machine: policy forward and backward,
reference forward, optimizer. Then some steps are timed in parts.
"""

import copy
import io
import platform
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback

from ..data.buckets import show_size
from ..likelihood import denoising_error


PARTS = ("data", "features", "reference", "policy forward", "backward", "optimizer", "other")


def synchronize() -> None:
    """Waits for the device, whose work a CPU only orders."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def peak_memory() -> int:
    """Bytes: of the accelerator, or of this process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # Kibibytes, but bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@dataclass
class Stopwatch:
    """Seconds by part; what happens in a part inside of another counts for the inner one, and `reference` is whole."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    _open: list[str] = field(default_factory=lambda: ["other"])
    _since: float = 0.0

    def start(self) -> None:
        synchronize()
        self._since = time.perf_counter()

    def _switch(self) -> None:
        synchronize()
        now = time.perf_counter()
        self.seconds[self._open[-1]] += now - self._since
        self._since = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._switch()
        # The policy's method is what the reference's forward goes through, too.
        self._open.append("reference" if self._open[-1] == "reference" else name)
        yield
        self._switch()
        self._open.pop()

    def wrap(self, owner: Any, method: str, name: str) -> None:
        """Has the time in a method of an object count for a part."""
        inner = getattr(owner, method)

        def timed(*args, **kwargs):
            with self.part(name):
                return inner(*args, **kwargs)

        setattr(owner, method, timed)

    def watch(self, trainer) -> None:
        """Divides the trainer's step."""
        self.wrap(trainer, "get_batch_samples", "data")
        self.wrap(trainer, "corrupt", "features")
        self.wrap(trainer, "reference_errors", "reference")
        self.wrap(trainer, "denoise", "policy forward")
        self.wrap(trainer.accelerator, "backward", "backward")
        self.wrap(trainer.accelerator, "clip_grad_norm_", "optimizer")
        self.wrap(trainer.optimizer, "step", "optimizer")
        self.start()


class BareLoop:
    """
    The floor of a step: for each micro-batch the reference's forward, the policy's forward and backward; then the
    norm of the gradient and the optimizer.

    Args:
        trainer ([`DiffusionTrainer`]): Its weights are copied, its optimizer is made anew.
        batches (`list`): The corrupted micro-batches of one step.
    """

    def __init__(self, trainer, batches: list):
        self.trainer, self.batches = trainer, batches
        model = trainer.accelerator.unwrap_model(trainer.model)
        self.policy = copy.deepcopy(model).train()
        self.reference = None
        if trainer.reference is not None:
            given = trainer.reference.model
            if given is not None:
                self.reference = copy.deepcopy(trainer.accelerator.unwrap_model(given))
            else:
                self.reference = copy.deepcopy(model).unload() if is_peft_model(model) else copy.deepcopy(model)
            self.reference.requires_grad_(False).train(self.policy.training)
        self.parameters = [p for p in self.policy.parameters() if p.requires_grad]
        optimizer_class, options = trainer.get_optimizer_cls_and_kwargs(trainer.args)
        self.optimizer = optimizer_class(self.parameters, **options)

    def step(self) -> None:
        args, losses = self.trainer.args, []
        for noised in self.batches:
            with self.trainer.compute_loss_context_manager():
                ref_errors: torch.Tensor | float = 0.0
                if self.reference is not None:
                    with torch.no_grad():
                        ref_errors = self._errors(self.reference, noised)
                errors = self._errors(self.policy, noised)
                losses.append((errors - ref_errors).mean() / len(self.batches))
            losses[-1].backward()
        if args.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.parameters, args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _errors(self, model, noised) -> torch.Tensor:
        conditioning = noised.conditioning if noised.sizes is None else noised.conditioning | {"sizes": noised.sizes}
        prediction = self.trainer.family.denoise(model, noised.x_t, noised.t, conditioning)
        return denoising_error(prediction, noised.target)


class Clock(TrainerCallback):
    """
    Looks at the clock after each step, and has the bare loop make one of its own.

    Args:
        trainer ([`DiffusionTrainer`]): What is measured.
        warmup (`int`): First steps that are not measured.
        steps (`int`): Steps that are.
        bare (`bool`): Whether to compare with the bare loop.
    """

    def __init__(self, trainer, warmup: int, steps: int, bare: bool = True):
        self.trainer, self.warmup, self.steps, self.with_bare = trainer, warmup, steps, bare
        self.step_seconds: list[float] = []
        self.bare_seconds: list[float] = []
        self.batches: list = []
        self.bare: BareLoop | None = None
        self.stopwatch = Stopwatch()
        self.memory = 0
        self.flops = 0
        self._since = 0.0
        self._counter: FlopCounterMode | None = None
        self._corrupt = trainer.corrupt
        trainer.corrupt = self._keep

    def _keep(self, inputs):
        noised = self._corrupt(inputs)
        if len(self.batches) < self.trainer.args.gradient_accumulation_steps:
            self.batches.append(noised)
        return noised

    def on_step_end(self, args, state, control, **kwargs):
        synchronize()
        now, step = time.perf_counter(), state.global_step
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self.flops, self._counter = self._counter.get_total_flops(), None
        if self.warmup < step <= self.warmup + self.steps:
            self.step_seconds.append(now - self._since)
            if self.bare is not None:
                start = time.perf_counter()
                self.bare.step()
                synchronize()
                self.bare_seconds.append(time.perf_counter() - start)
        if step == self.warmup:
            self.memory = peak_memory()
            self.trainer.corrupt = self._corrupt
            if self.with_bare:
                self.bare = BareLoop(self.trainer, self.batches)
                self.bare.step()
        if step == self.warmup + self.steps:
            self.bare = None
            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()
        if step == self.warmup + self.steps + 1:
            self.stopwatch.watch(self.trainer)
        self._since = time.perf_counter()


def synthetic_data(rows: int, side: int, trainer_class) -> Dataset:
    """
    Pictures without a subject, as JPEG files of `side` x `side` pixels, in the columns of a trainer; embeddings, which
    are computed once and outside of the steps, are random numbers.
    """
    rng = np.random.default_rng(0)

    def picture() -> dict[str, Any]:
        colours = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        file = io.BytesIO()
        colours.resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        return {"bytes": file.getvalue(), "path": None}

    columns: dict[str, list] = {
        "prompt": [f"a picture of thing {i}" for i in range(rows)],
        **{name: [picture() for _ in range(rows)] for name in trainer_class.image_columns},
        **{name: rng.normal(size=(rows, 512)).tolist() for name in trainer_class.feature_columns},
        "label": [bool(i % 2) for i in range(rows)],
    }
    kinds = {
        "prompt": Value("string"),
        **{name: ImageFeature() for name in trainer_class.image_columns},
        **{name: List(Value("float32")) for name in trainer_class.feature_columns},
        "label": Value("bool"),
    }
    return Dataset.from_dict(columns, features=Features(kinds)).select_columns(
        [*trainer_class.columns, *trainer_class.feature_columns]
    )


def measure(trainer, warmup: int, steps: int, bare: bool = True) -> dict[str, Any]:
    """
    Times a trainer.

    Args:
        trainer ([`DiffusionTrainer`]): A trainer with `max_steps` of `warmup + 2 * steps + 1`, not yet trained.
        warmup (`int`): First steps that are not measured.
        steps (`int`): Steps that are measured, and then as many in parts.
        bare (`bool`, *optional*, defaults to `True`): Whether to compare with the bare loop.

    Returns:
        `dict`: `step_seconds` and `bare_step_seconds` are medians, `ratio_to_bare_loop` the median of the ratios of
        neighbours, `part_seconds` means; `images_per_second` counts all images that the policy learns from; `flops`
        are those of one step, with what gradient checkpointing computes again; `peak_memory` is that of the trainer
        without the bare loop, in bytes.
    """
    clock = Clock(trainer, warmup, steps, bare)
    trainer.add_callback(clock)
    trainer.train()
    result = summary(trainer, statistics.median(clock.step_seconds)) | {
        "part_seconds": {name: total / steps for name, total in clock.stopwatch.seconds.items()},
        "peak_memory": clock.memory,
        "flops": clock.flops,
    }
    if bare:
        ratios = [a / b for a, b in zip(clock.step_seconds, clock.bare_seconds, strict=True)]
        result |= {
            "bare_step_seconds": statistics.median(clock.bare_seconds),
            "ratio_to_bare_loop": statistics.median(ratios),
        }
    return result


def summary(trainer, step_seconds: float) -> dict[str, Any]:
    """What is trained, where, and how fast, for a duration of one step."""
    images = trainer.examples_per_step * len(trainer.image_columns)
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in trainer.model.parameters() if not p.requires_grad)
    return {
        "method": trainer._name,
        "model": trainer.family.denoiser_class,
        "parameters": frozen if is_peft_model(trainer.model) else frozen + trained,
        "trainable_parameters": trained,
        "resolution": ", ".join(map(show_size, trainer.image_sizes)),
        "images_per_step": images,
        "step_seconds": step_seconds,
        "images_per_second": images / step_seconds,
        "hardware": hardware(),
        "torch": torch.__version__,
    }


def hardware() -> str:
    """The accelerator's name, or the processor's with the number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"


def heading(result: dict[str, Any]) -> str:
    """The first line of what is printed of a [`summary`]."""
    return (
        f"{result['method']} on a {result['model']} of {result['parameters'] / 1e6:.1f} M parameters, "
        f"{result['trainable_parameters'] / 1e6:.2f} M of them trained, {result['resolution']} px, "
        f"{result['images_per_step']} images a step; {result['hardware']}, torch {result['torch']}"
    )


def as_text(result: dict[str, Any], peak_tflops: float | None = None) -> str:
    """What `trl-diffusion bench` prints."""
    lines = [
        heading(result),
        f"images/s        {result['images_per_second']:10.2f}",
        f"step            {1e3 * result['step_seconds']:10.1f} ms",
    ]
    lines += [f"  {name:<14}{1e3 * seconds:10.1f} ms" for name, seconds in result["part_seconds"].items()]
    if "ratio_to_bare_loop" in result:
        lines.append(f"bare loop       {1e3 * result['bare_step_seconds']:10.1f} ms")
        lines.append(f"step/bare loop  {result['ratio_to_bare_loop']:10.3f}")
    lines.append(f"peak memory     {result['peak_memory'] / 2**30:10.2f} GiB")
    lines.append(f"FLOPs a step    {result['flops'] / 1e12:10.3f} T")
    if peak_tflops is not None:
        share = result["flops"] / result["step_seconds"] / (peak_tflops * 1e12)
        lines.append(f"MFU             {100 * share:10.1f} % of {peak_tflops:g} TFLOP/s")
    return "\n".join(lines)
