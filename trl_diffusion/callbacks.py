"""Callbacks that let people look: grids of sample images during training."""

import math
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback


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
    for i, row in enumerate(rows):
        top = margin + i * (height + margin + head)
        if captions:
            text = " ".join(captions[i].split())
            while len(text) > 1 and draw.textlength(text, font) > grid.width - 2 * margin:
                text = text[:-2] + "…"
            draw.text((margin, top), text, "black", font)
        for j, image in enumerate(row):
            grid.paste(image.convert("RGB"), (margin + j * (width + margin), top + head))
    return grid


class TensorBoardLogger(TensorBoardCallback):
    """transformers' callback without its dump of the model's config, which a diffusers config does not offer."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)


class LogImagesCallback(TrainerCallback):
    """
    Draws sample images at fixed seeds before the first step, every `every_n_steps` steps and at the end.

    The grid goes to `output_dir/samples/step-000000.png` and to those of tensorboard, wandb and trackio that
    `args.report_to` names. All ranks but the first only wait. Sampling takes nothing from the generators of the
    training, so that a run with this callback computes what a run without it computes.

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
    ):
        self.trainer, self.prompts, self.every_n_steps, self.seed = trainer, prompts, every_n_steps, seed
        self.num_images_per_prompt = num_images_per_prompt
        self.last_step: int | None = None
        self.pipeline_kwargs: dict[str, Any] = {"num_inference_steps": num_inference_steps}
        if guidance_scale is not None:
            self.pipeline_kwargs["guidance_scale"] = guidance_scale

    def draw(self) -> Image.Image:
        """The grid of the policy as it is now."""
        trainer = self.trainer
        rows = sample_rows(
            trainer.pipeline,
            self.prompts,
            [self.seed + i for i in range(self.num_images_per_prompt)],
            height=trainer.resolution,
            width=trainer.resolution,
            **self.pipeline_kwargs,
        )
        return image_grid(rows, self.prompts)

    def _log(self, args, state) -> None:
        if state.is_world_process_zero:
            grid = self.draw()
            folder = Path(args.output_dir) / "samples"
            folder.mkdir(parents=True, exist_ok=True)
            grid.save(folder / f"step-{state.global_step:06d}.png")
            self._send_to_trackers(grid, state.global_step)
        self.last_step = state.global_step
        self.trainer.accelerator.wait_for_everyone()

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
                    [prompt] * len(seeds),
                    generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                    **kwargs,
                ).images
                for prompt in prompts
            ]
    finally:
        pipeline.set_progress_bar_config(**hidden)
        for module in training:
            module.train()
