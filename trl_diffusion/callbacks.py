"""Callbacks: sample images and win rates during training, and a guard against a model that falls apart."""

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import broadcast_object_list
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from .evaluation.statistics import prompt_medians
from .evaluation.win_rate import win_rate
from .rewards.base import Scorer, score_images


ASSETS = "assets"
"""Folder in the output folder of the pictures that the model card shows."""


def image_grid(rows: list[list[Image.Image]], captions: list[str] | None = None, margin: int = 4) -> Image.Image:
    """
    Pictures in rows on white, each row under its caption.

    Args:
        rows (`list[list[PIL.Image.Image]]`): Pictures of one size, row by row.
        captions (`list[str]`, *optional*): One line per row, cut to the width of the grid.
        margin (`int`, *optional*, defaults to `4`): Pixels between pictures.
    """
    width, height = rows[0][0].size
    font = ImageFont.load_default(size=max(11, height // 16))
    head = math.ceil(font.getbbox("Ay")[3] * 1.3) if captions else 0
    columns = max(map(len, rows))
    grid = Image.new(
        "RGB", (columns * (width + margin) + margin, len(rows) * (height + margin + head) + margin), "white"
    )
    draw = ImageDraw.Draw(grid)

    def fits(text: str) -> bool:
        return draw.textlength(text, font) <= grid.width - 2 * margin

    for i, row in enumerate(rows):
        top = margin + i * (height + margin + head)
        if captions:
            text = _cut_to_fit(captions[i], fits, most=grid.width)
            draw.text((margin, top), text, "black", font)
        for j, image in enumerate(row):
            grid.paste(image.convert("RGB"), (margin + j * (width + margin), top + head))
    return grid


def _cut_to_fit(caption: str, fits: Callable[[str], bool], most: int) -> str:
    """The caption in one line, with an ellipsis where it is cut to at most `most` characters that fit."""
    text = " ".join(caption.split())
    if len(text) <= most and fits(text):
        return text
    # By halves, since each measurement takes as long as the text.
    short, long = 0, min(len(text), most)
    while long - short > 1:
        middle = (short + long) // 2
        short, long = (middle, long) if fits(text[:middle] + "…") else (short, middle)
    return text[:short] + "…"


class TensorBoardLogger(TensorBoardCallback):
    """transformers' callback without its dump of the model's config, which a diffusers config does not offer."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)


class LogImagesCallback(TrainerCallback):
    """
    Draws sample images at fixed seeds before the first step, every `every_n_steps` steps and at the end.

    The grid goes to `output_dir/samples/step-000000.png` and to those of tensorboard, wandb and trackio that
    `args.report_to` names; each prompt's first picture, before the training and as of now, goes to `output_dir/assets`
    for the model card. All ranks but the first only wait. Sampling takes nothing from the generators of the training,
    so that a run with this callback computes what a run without it computes.

    Args:
        trainer ([`DiffusionTrainer`]):
            The trainer whose pipeline draws.
        prompts (`list[str]`):
            One row of the grid per prompt.
        every_n_steps (`int`, *optional*, defaults to `500`):
            Optimizer steps between grids.
        num_images_per_prompt (`int`, *optional*, defaults to `4`):
            Images per row; the i-th image of every row starts from seed `seed + i`.
        num_inference_steps (`int`, *optional*, defaults to `25`):
            Sampling steps.
        guidance_scale (`float`, *optional*):
            Guidance scale. Defaults to the pipeline's own.
        seed (`int`, *optional*, defaults to `0`):
            First seed.
        scorers (`dict[str, Scorer]`, *optional*):
            Scorers by name, see [`rewards`]. Each row's mean scores stand in its caption, and the means of all rows
            are logged as `samples/<name>`.
    """

    def __init__(
        self,
        trainer,
        prompts: list[str],
        every_n_steps: int = 500,
        num_images_per_prompt: int = 4,
        num_inference_steps: int = 25,
        guidance_scale: float | None = None,
        seed: int = 0,
        scorers: dict[str, Scorer] | None = None,
    ):
        self.trainer, self.prompts, self.every_n_steps, self.seed = trainer, prompts, every_n_steps, seed
        self.num_images_per_prompt, self.scorers = num_images_per_prompt, scorers or {}
        self.last_step: int | None = None
        self.pipeline_kwargs: dict[str, Any] = {"num_inference_steps": num_inference_steps}
        if guidance_scale is not None:
            self.pipeline_kwargs["guidance_scale"] = guidance_scale

    def draw(self) -> Image.Image:
        """The grid of the policy as it is now; on all ranks."""
        with self.trainer.ready_to_draw():
            return image_grid(*self._draw_and_score()[:2])

    def _draw_and_score(self) -> tuple[list[list[Image.Image]], list[str], dict[str, float]]:
        """Rows of pictures, their captions, and metrics."""
        trainer = self.trainer
        height, width = trainer.image_sizes[0]
        with trainer.whole_pipeline() as pipeline:
            rows = sample_rows(
                pipeline,
                self.prompts,
                [self.seed + i for i in range(self.num_images_per_prompt)],
                height=height,
                width=width,
                **self.pipeline_kwargs,
            )
        captions, metrics = list(self.prompts), {}
        for name, scores in score_rows(self.scorers, rows, self.prompts).items():
            means = [sum(row) / len(row) for row in scores]
            captions = [f"{caption} · {name} {mean:.4g}" for caption, mean in zip(captions, means, strict=True)]
            metrics[f"samples/{name}"] = sum(means) / len(means)
        return rows, captions, metrics

    def _log(self, args, state) -> None:
        metrics: dict[str, float] = {}
        with self.trainer.ready_to_draw() as draws:
            if draws:
                rows, captions, metrics = self._draw_and_score()
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / "samples"
            folder.mkdir(parents=True, exist_ok=True)
            grid = image_grid(rows, captions)
            grid.save(folder / f"step-{state.global_step:06d}.png")
            self._keep([row[0] for row in rows], Path(args.output_dir) / ASSETS, state.global_step)
            self._send_to_trackers(grid, state.global_step)
        self.last_step = state.global_step
        self.trainer.accelerator.wait_for_everyone()
        if self.scorers:
            (metrics,) = broadcast_object_list([metrics])
            log_beside(self.trainer, metrics)

    def _keep(self, pictures: list[Image.Image], folder: Path, step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if step == 0:
            for old in (*folder.glob("before-*.png"), *folder.glob("after-*.png")):
                old.unlink()
        for i, (prompt, picture) in enumerate(zip(self.prompts, pictures, strict=True)):
            about = PngInfo()
            about.add_itxt("prompt", prompt)
            picture.save(folder / f"{'after' if step else 'before'}-{i}.png", pnginfo=about)

    def _send_to_trackers(self, grid: Image.Image, step: int) -> None:
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                pixels = torch.frombuffer(bytearray(grid.tobytes()), dtype=torch.uint8)
                callback.tb_writer.add_image(
                    "samples", pixels.reshape(grid.height, grid.width, 3), step, dataformats="HWC"
                )
            elif isinstance(callback, WandbCallback) and callback._initialized:
                callback._wandb.log({"samples": callback._wandb.Image(grid), "train/global_step": step})
            elif isinstance(callback, TrackioCallback) and callback._initialized:
                callback._trackio.log({"samples": callback._trackio.Image(grid), "train/global_step": step})

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self._log(args, state)

    def on_step_end(self, args, state, control, **kwargs):
        # The last grid comes here and not at the end of training, where the trackers may already be closed.
        if state.global_step % self.every_n_steps == 0 or state.global_step >= state.max_steps:
            self._log(args, state)

    def on_train_end(self, args, state, control, **kwargs):
        if self.last_step != state.global_step:  # stopped early
            self._log(args, state)


class WinRateCallback(TrainerCallback):
    """
    Compares the policy with the model that the training started from: the small form of `trl-diffusion evaluate`.

    The start draws its images once, before the first step; every `every_n_steps` steps and at the end the policy draws
    the same prompts from the same seeds. Logged are, for each scorer, `eval_score/<name>`, the mean of the policy's
    scores, and `eval_win_rate/<name>`, the share of prompts whose median score is higher than the start's, a tie
    counting one half. All ranks but the first only wait. Sampling and scoring take nothing from the generators of the
    training. The start's scores are kept in `output_dir/win_rate.json`, for a run that is resumed.

    Args:
        trainer ([`DiffusionTrainer`]):
            The trainer whose pipeline draws.
        scorers (`dict[str, Scorer]`):
            Scorers by name, see [`rewards`].
        prompts (`list[str]`):
            Prompts, better ones that are not trained on.
        every_n_steps (`int`, *optional*, defaults to `500`):
            Optimizer steps between comparisons.
        num_images_per_prompt (`int`, *optional*, defaults to `5`):
            The i-th image of every prompt starts from seed `seed + i`.
        num_inference_steps (`int`, *optional*, defaults to `25`):
            Sampling steps.
        guidance_scale (`float`, *optional*):
            Guidance scale. Defaults to the pipeline's own.
        seed (`int`, *optional*, defaults to `0`):
            First seed.

    Raises:
        `ValueError`: if there are no scorers or no prompts, or a run is resumed that began without this callback or
            with other settings of it.
    """

    FILE = "win_rate.json"

    def __init__(
        self,
        trainer,
        scorers: dict[str, Scorer],
        prompts: list[str],
        every_n_steps: int = 500,
        num_images_per_prompt: int = 5,
        num_inference_steps: int = 25,
        guidance_scale: float | None = None,
        seed: int = 0,
    ):
        if not scorers or not prompts:
            raise ValueError(
                f"Found {len(scorers)} scorers and {len(prompts)} prompts, expected at least one of each."
            )
        self.trainer, self.scorers, self.every_n_steps = trainer, scorers, every_n_steps
        self.prompts = list(prompts)
        self.seeds = [seed + i for i in range(num_images_per_prompt)]
        self.pipeline_kwargs: dict[str, Any] = {
            "height": trainer.image_sizes[0][0],
            "width": trainer.image_sizes[0][1],
            "num_inference_steps": num_inference_steps,
        }
        if guidance_scale is not None:
            self.pipeline_kwargs["guidance_scale"] = guidance_scale
        self.start: dict[str, list[list[float]]] = {}
        self.last_step: int | None = None

    def _settings(self) -> dict[str, Any]:
        return {
            "prompts": self.prompts,
            "seeds": self.seeds,
            "scorers": sorted(self.scorers),
            "pipeline_kwargs": self.pipeline_kwargs,
        }

    def _scores(self) -> dict[str, list[list[float]]]:
        """On the first rank; the others draw along where each holds but a part of the weights."""
        with self.trainer.ready_to_draw() as draws:
            if not draws:
                return {}
            with self.trainer.whole_pipeline() as pipeline:
                rows = sample_rows(pipeline, self.prompts, self.seeds, **self.pipeline_kwargs)
        return score_rows(self.scorers, rows, self.prompts) if self.trainer.is_world_process_zero() else {}

    def _log(self, state, scores: dict[str, list[list[float]]]) -> None:
        """`scores` are the policy's on rank 0; all ranks log, since the state of each holds the history."""
        metrics: dict[str, float] = {}
        for name, rows in scores.items():
            metrics[f"eval_score/{name}"] = sum(map(sum, rows)) / (len(rows) * len(self.seeds))
            metrics[f"eval_win_rate/{name}"] = win_rate(prompt_medians(rows), prompt_medians(self.start[name])).rate
        (metrics,) = broadcast_object_list([metrics])
        log_beside(self.trainer, metrics)
        self.last_step = state.global_step

    def on_train_begin(self, args, state, control, **kwargs):
        file, problem = Path(args.output_dir) / self.FILE, None
        if state.global_step == 0:
            self.start = self._scores()
        if state.is_world_process_zero and state.global_step == 0:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"settings": self._settings(), "scores": self.start}, indent=1) + "\n")
        elif state.is_world_process_zero:
            record = json.loads(file.read_text()) if file.is_file() else {}
            self.start = record.get("scores", {})
            if record.get("settings") != self._settings():
                found = "other settings of the callback" if record else "nothing"
                problem = (
                    f"Found {found} in {file}, expected the scores of this run's start: resume with the first run's "
                    "`WinRateCallback`, or without one."
                )
        (problem,) = broadcast_object_list([problem])  # so that no rank waits for one that has stopped
        if problem:
            raise ValueError(problem)
        if state.global_step == 0:
            self._log(state, self.start)
        self.last_step = state.global_step

    def on_step_end(self, args, state, control, **kwargs):
        # The last comparison comes here and not at the end of training, where the trackers may already be closed.
        if state.global_step % self.every_n_steps == 0 or state.global_step >= state.max_steps:
            self._log(state, self._scores())

    def on_train_end(self, args, state, control, **kwargs):
        if self.last_step != state.global_step:  # stopped early
            self._log(state, self._scores())


class ErrorGrowthCallback(TrainerCallback):
    """
    Warns, or stops the training, where the policy has become worse than the reference at the very images that it
    should like: the first sign of samples that turn to noise.

    Reads the logged metric `health/error_growth/chosen`, the chosen (liked) images' mean error over the reference's.
    Added by the trainers where `error_growth_limit` is set.

    Args:
        limit (`float`):
            Largest growth that is accepted: 0.1 is 10 % over the reference.
        patience (`int`, *optional*, defaults to `3`):
            Logs in a row that must be beyond it.
        action (`str`, *optional*, defaults to `"warn"`):
            `"warn"`, once for each time that the limit is passed for so long, or `"stop"`, which ends the training as
            if it had reached its last step.

    Raises:
        `ValueError`: if `limit` is negative or not finite, `patience` is below 1 or `action` is unknown.
    """

    METRIC = "health/error_growth/chosen"

    def __init__(self, limit: float, patience: int = 3, action: Literal["warn", "stop"] = "warn"):
        if not 0 <= limit < math.inf:
            raise ValueError(f"`limit` must be at least 0 and finite, found {limit}: 0.1 is 10 % over the reference.")
        if patience < 1:
            raise ValueError(f"`patience` must be at least 1 log, found {patience}.")
        if action not in ("warn", "stop"):
            raise ValueError(f"`action` must be 'warn' or 'stop', found {action!r}.")
        self.limit, self.patience, self.action = limit, patience, action

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.METRIC not in (logs or {}):
            return
        # From the history, which is in every checkpoint: a resumed run counts on.
        beyond = 0
        for entry in reversed([entry for entry in state.log_history if self.METRIC in entry]):
            if entry[self.METRIC] <= 1 + self.limit:
                break
            beyond += 1
        if beyond < self.patience:
            return
        if state.is_world_process_zero and beyond == self.patience:
            warnings.warn(
                f"The error of the chosen images was more than {self.limit:.0%} over the reference's in the last "
                f"{beyond} logs ({self.METRIC} = {logs[self.METRIC]:.3f} at step {state.global_step})"
                + ("; the training stops" if self.action == "stop" else "")
                + ": lower `learning_rate` or raise `beta`; Diffusion-DPO has `winner_guard`.",
                stacklevel=2,
            )
        control.should_training_stop = control.should_training_stop or self.action == "stop"


def log_beside(trainer, metrics: dict[str, float]) -> None:
    """Logs metrics, and leaves the trainer's own log of the step to come: `on_log` would take it for done."""
    should_log = trainer.control.should_log
    trainer.log(metrics)
    trainer.control.should_log = should_log


def score_rows(
    scorers: dict[str, Scorer], rows: list[list[Image.Image]], prompts: list[str]
) -> dict[str, list[list[float]]]:
    """
    Scores of rows of pictures, leaving random states as they were.

    Args:
        scorers (`dict[str, Scorer]`): Scorers by name.
        rows (`list[list[PIL.Image.Image]]`): One row per prompt, all equally long.
        prompts (`list[str]`): Prompts.

    Returns:
        `dict[str, list[list[float]]]`: by scorer, one number per picture.
    """
    columns = len(rows[0])
    images = [image for row in rows for image in row]
    words = [prompt for prompt in prompts for _ in range(columns)]
    devices = [torch.accelerator.current_device_index()] if torch.accelerator.is_available() else []
    tables = {}
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        for name, scorer in scorers.items():
            scores = score_images(name, scorer, images, words)
            tables[name] = [scores[i : i + columns] for i in range(0, len(scores), columns)]
    return tables


def sample_rows(pipeline, prompts: list[str], seeds: list[int], **kwargs) -> list[list[Image.Image]]:
    """
    Draws `len(seeds)` images of each prompt, leaving modes and random states as they were.

    Args:
        pipeline (`DiffusionPipeline`): The pipeline.
        prompts (`list[str]`): One row per prompt.
        seeds (`list[int]`): One image per seed, the same seeds for all prompts.
        **kwargs: Passed to the pipeline.
    """
    modules = [module for module in pipeline.components.values() if isinstance(module, torch.nn.Module)]
    training = [module for module in modules if module.training]
    for module in training:
        module.eval()
    hidden = pipeline._progress_bar_config if hasattr(pipeline, "_progress_bar_config") else {}
    pipeline.set_progress_bar_config(disable=True)
    devices = [torch.accelerator.current_device_index()] if torch.accelerator.is_available() else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            return [
                pipeline(
                    prompt=[prompt] * len(seeds),  # not the first argument of FLUX.2
                    generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                    **kwargs,
                ).images
                for prompt in prompts
            ]
    finally:
        pipeline.set_progress_bar_config(**hidden)
        for module in training:
            module.train()
