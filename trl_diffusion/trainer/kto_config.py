"""Settings of Diffusion-KTO."""

import math
from dataclasses import dataclass, field
from typing import Literal

from .base_config import PreferenceConfig


@dataclass(repr=False)  # `DiffusionConfig` keeps tokens out of it
class DiffusionKTOConfig(PreferenceConfig):
    r"""
    Configuration class for the [`DiffusionKTOTrainer`].

    This class includes only the parameters that are specific to Diffusion-KTO; for the others see
    [`PreferenceConfig`], [`DiffusionConfig`] and [`~transformers.TrainingArguments`].

    Parameters:
        beta (`float`, *optional*, defaults to `5000.0`):
            How strongly the policy is held to the reference, in units of 1 / (mean squared error): the loss is a
            function of `beta * (e_ref - e_theta)`, where both errors are means over the latent dimensions. There is no
            factor 1/2, so that 5000 here is as strong as 10000 in Diffusion-DPO. The paper uses 5000, its authors'
            example script 1000. A higher beta stays closer to the reference.
        loss_type (`str`, *optional*, defaults to `"kto"`):
            `"kto"`, or `"apo_zero_unpaired"`, which has no reference point and works with one image per batch.
        utility (`str`, *optional*, defaults to `"kahneman_tversky"`):
            The value function of `loss_type="kto"`: `"kahneman_tversky"`, `"loss_averse"` or `"risk_seeking"`.
        desirable_weight (`float`, *optional*, defaults to `1.0`):
            Factor on the loss of liked images.
        undesirable_weight (`float`, *optional*, defaults to `1.0`):
            Factor on the loss of disliked images.
        desirable_ratio (`float`, *optional*, defaults to `0.8`):
            Probability that a drawn example is a liked one (the paper's gamma; 0.8 was its best). None takes the rows
            as they come, each once an epoch; streaming data sets need that.
        reference_point (`str`, *optional*, defaults to `"matched"`):
            Where the reference point `z = max(0, mean of e_ref - e_theta)` is measured: `"matched"` on the window's
            own images and prompts (no extra cost), `"mismatched"` on images with the prompt of their neighbour in the
            micro-batch (the paper's formula; one more forward of policy and reference without gradient), `"none"` sets
            it to 0.
        window (`str`, *optional*, defaults to `"batch"`):
            Over what the mean is taken: `"device"` (one rank's micro-batch), `"batch"` (the micro-batches of all
            ranks) or `"step"` (everything of an optimizer step, accumulation included, so that the loss does not
            depend on how a step is split; one more forward of the policy without gradient).
        learning_rate (`float`, *optional*, defaults to `1e-7`):
            The paper's, for full fine-tuning with 1000 warm-up steps. LoRA wants about 100 times more.
    """

    beta: float = field(
        default=5000.0,
        metadata={
            "help": "Strength of the hold to the reference, in units of 1 / (mean squared error); no factor 1/2."
        },
    )
    loss_type: Literal["kto", "apo_zero_unpaired"] = field(
        default="kto", metadata={"help": "Loss type: `kto`, or `apo_zero_unpaired` (no reference point)."}
    )
    utility: Literal["kahneman_tversky", "loss_averse", "risk_seeking"] = field(
        default="kahneman_tversky", metadata={"help": "Value function of `loss_type='kto'`."}
    )
    desirable_weight: float = field(default=1.0, metadata={"help": "Factor on the loss of liked images."})
    undesirable_weight: float = field(default=1.0, metadata={"help": "Factor on the loss of disliked images."})
    desirable_ratio: float | None = field(
        default=0.8,
        metadata={"help": "Probability that a drawn example is a liked one. None takes the rows as they come."},
    )
    reference_point: Literal["matched", "mismatched", "none"] = field(
        default="matched", metadata={"help": "Where the reference point is measured, or `none` for 0."}
    )
    window: Literal["device", "batch", "step"] = field(  # type: ignore[misc]
        default="batch", metadata={"help": "Over what the reference point's mean is taken."}
    )
    learning_rate: float = field(default=1e-7, metadata={"help": "The initial learning rate for AdamW."})

    def __post_init__(self):
        super().__post_init__()
        self._check_beta("the paper uses 5000")
        self._check_choices(
            loss_type=("kto", "apo_zero_unpaired"),
            utility=("kahneman_tversky", "loss_averse", "risk_seeking"),
            reference_point=("matched", "mismatched", "none"),
        )
        self._check_window()
        if self.desirable_ratio is not None and not 0 < self.desirable_ratio <= 1:
            raise ValueError(
                f"`desirable_ratio` must be in (0, 1], found {self.desirable_ratio}: None takes the rows as they come."
            )
        if self.desirable_ratio is not None and self.train_sampling_strategy == "sequential":
            raise ValueError(
                "`train_sampling_strategy='sequential'` contradicts a `desirable_ratio`: set `desirable_ratio=None`."
            )
        for name in ("desirable_weight", "undesirable_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must not be negative, infinite or nan, found {getattr(self, name)}.")
        if self.loss_type == "apo_zero_unpaired":
            for name, default in (
                ("utility", "kahneman_tversky"),
                ("reference_point", "matched"),
                ("window", "batch"),
            ):
                if getattr(self, name) != default:
                    raise ValueError(
                        f"`{name}={getattr(self, name)!r}` belongs to `loss_type='kto'`: found "
                        f"loss_type='apo_zero_unpaired', which has none; leave `{name}` at its default."
                    )
