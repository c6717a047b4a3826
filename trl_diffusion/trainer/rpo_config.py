"""Settings of Diffusion-RPO."""

import math
from dataclasses import dataclass, field
from typing import Literal

from ..losses import check_diagonal
from .base_config import PreferenceConfig


@dataclass(repr=False)  # `DiffusionConfig` keeps tokens out of it
class DiffusionRPOConfig(PreferenceConfig):
    r"""
    Configuration class for the [`DiffusionRPOTrainer`].

    This class includes only the parameters that are specific to Diffusion-RPO; for the others see
    [`PreferenceConfig`], [`DiffusionConfig`] and [`~transformers.TrainingArguments`]. The paper's text leaves several
    of them open, and its authors published no code: those are marked as our choice.

    Parameters:
        beta (`float`, *optional*, defaults to `2000.0`):
            How strongly the policy is held to the reference, in units of 1 / (mean squared error): the loss is a
            function of `beta / 2 * margin`, where the margin is a difference of mean errors. As in Diffusion-DPO (our
            choice). A higher beta stays closer to the reference.
        temperature (`float`, *optional*, defaults to `0.1`):
            Of the weights `softmax_j(-(1 - cos(winner_i, loser_j)) / temperature)`. Towards 0 each winner meets only
            the nearest loser, towards infinity all alike. Our choice; the sister paper for language models has 0.5.
        embedding_model (`str`, *optional*, defaults to `"openai/clip-vit-large-patch14"`):
            Hub id or folder of the CLIP model that embeds prompts and images, once per data set; the embeddings are
            cached and the model leaves memory. Not used where an `embedder` is given to the trainer, or the data set
            has the columns `chosen_embedding` and `rejected_embedding`.
        embedding (`str`, *optional*, defaults to `"text_image"`):
            What is compared: `"text_image"` (the mean of the two cosines, our reading), `"text"` or `"image"`.
        diagonal (`str` or `float`, *optional*, defaults to `"include"`):
            What the loser of the winner's own pair weighs: `"include"` by its similarity like any other, `"exclude"`
            nothing, a number in (0, 1) exactly that.
        weight_placement (`str`, *optional*, defaults to `"outside"`):
            Whether the weights stand `"outside"` of the log-sigmoid or, as in the sister paper's code, `"inside"`.
        timestep_sharing (`str`, *optional*, defaults to `"pair"`):
            Whether only the images of a pair share the timestep (`"pair"`, as in Diffusion-DPO) or all pairs of a
            window do (`"window"`, the reading closest to the formula, which has one timestep). Our choice: with many
            timesteps in a step the gradient is less noisy, see docs/trainers/rpo.md.
        noise_sharing (`str`, *optional*, defaults to `"pair"`):
            Whether the images of a `"pair"` share the noise, as in Diffusion-DPO, or `"none"` do. Our choice.
        window (`str`, *optional*, defaults to `"batch"`):
            The contrast set: the pairs of one rank's micro-batch (`"device"`), of the micro-batches of all ranks
            (`"batch"`) or of everything in an optimizer step, accumulation included (`"step"`; one more forward of the
            policy without gradient). The gradient is the exact one of the loss over all of them.
        learning_rate (`float`, *optional*, defaults to `1e-7`):
            For full fine-tuning with small batches, as in Diffusion-DPO. LoRA wants about 100 times more.
    """

    beta: float = field(
        default=2000.0,
        metadata={"help": "Strength of the hold to the reference, in units of 1 / (mean squared error); halved."},
    )
    temperature: float = field(default=0.1, metadata={"help": "Temperature of the contrast weights."})
    embedding_model: str = field(
        default="openai/clip-vit-large-patch14",
        metadata={"help": "Hub id or folder of the CLIP that embeds the pairs."},
    )
    embedding: Literal["text_image", "text", "image"] = field(
        default="text_image", metadata={"help": "What is compared: prompts, images, or both."}
    )
    diagonal: str = field(
        default="include",
        metadata={"help": "Weight of the winner's own loser: `include`, `exclude`, or a number in (0, 1)."},
    )
    weight_placement: Literal["outside", "inside"] = field(
        default="outside", metadata={"help": "Whether the weights stand outside or inside of the log-sigmoid."}
    )
    timestep_sharing: Literal["window", "pair"] = field(
        default="pair", metadata={"help": "Who shares a timestep: the pairs of a window, or a pair's two images."}
    )
    noise_sharing: Literal["pair", "none"] = field(
        default="pair", metadata={"help": "Whether the two images of a pair share the noise."}
    )
    window: Literal["device", "batch", "step"] = field(  # type: ignore[misc]
        default="batch", metadata={"help": "The contrast set: a rank's pairs, those of all ranks, or of the step."}
    )
    learning_rate: float = field(default=1e-7, metadata={"help": "The initial learning rate for AdamW."})

    def __post_init__(self):
        super().__post_init__()
        self._check_beta("Diffusion-DPO uses 2000 for SD 1.5 and 5000 for SDXL")
        self._check_choices(
            embedding=("text_image", "text", "image"),
            weight_placement=("outside", "inside"),
            timestep_sharing=("window", "pair"),
            noise_sharing=("pair", "none"),
        )
        self._check_window()
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"`temperature` must be positive and finite, found {self.temperature}.")
        try:  # a number comes as text from the command line
            self.diagonal = float(self.diagonal)  # type: ignore[assignment]
        except ValueError:
            pass
        check_diagonal(self.diagonal)
