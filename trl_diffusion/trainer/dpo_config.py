"""Settings of Diffusion-DPO."""

from dataclasses import dataclass, field
from typing import Literal

from .base_config import PreferenceConfig


@dataclass(repr=False)  # `DiffusionConfig` keeps tokens out of it
class DiffusionDPOConfig(PreferenceConfig):
    r"""
    Configuration class for the [`DiffusionDPOTrainer`].

    This class includes only the parameters that are specific to Diffusion-DPO; for the others see
    [`PreferenceConfig`], [`DiffusionConfig`] and [`~transformers.TrainingArguments`].

    Parameters:
        beta (`float`, *optional*, defaults to `2000.0`):
            How strongly the policy is held to the reference, in units of 1 / (mean squared error): the loss is
            `-log sigmoid(beta / 2 * margin)`, where the margin is a difference of mean errors. The paper uses 2000 for
            SD 1.5 and 5000 for SDXL. A higher beta stays closer to the reference.
        loss_type (`str`, *optional*, defaults to `"sigmoid"`):
            `"sigmoid"`, `"hinge"` or `"ipo"`; the factor 1/2 belongs to `"sigmoid"` only, see [`~losses.dpo_loss`].
        label_smoothing (`float`, *optional*, defaults to `0.0`):
            Probability that a pair is labelled the wrong way round, in [0, 0.5); for `"sigmoid"` only.
        winner_guard (`float`, *optional*):
            The `mu` of [Diffusion-SDPO](https://huggingface.co/papers/2511.03317), in [0, 1]: in each micro-batch (of
            all ranks) the gradient of the rejected images is scaled down as far as it would raise the error of the
            chosen ones, see [`~losses.rejected_gradient_scale`]. The paper uses 0.9 for SD 1.5 and 0.6 for SDXL. None
            is plain Diffusion-DPO. Not for `"ipo"` and label smoothing, which also push chosen images away.
        learning_rate (`float`, *optional*, defaults to `1e-7`):
            For full fine-tuning with small batches. The authors' code has 1e-8 times the effective batch (2048). LoRA
            wants about 100 times more.
    """

    beta: float = field(
        default=2000.0,
        metadata={"help": "Strength of the hold to the reference, in units of 1 / (mean squared error); halved."},
    )
    loss_type: Literal["sigmoid", "hinge", "ipo"] = field(default="sigmoid", metadata={"help": "Loss of a margin."})
    label_smoothing: float = field(
        default=0.0, metadata={"help": "Probability that a pair is labelled the wrong way round."}
    )
    winner_guard: float | None = field(
        default=None,
        metadata={
            "help": "mu of Diffusion-SDPO: keeps the rejected images from raising the error of the chosen ones."
        },
    )
    learning_rate: float = field(default=1e-7, metadata={"help": "The initial learning rate for AdamW."})

    def __post_init__(self):
        super().__post_init__()
        self._check_beta("the paper uses 2000 for SD 1.5 and 5000 for SDXL")
        self._check_choices(loss_type=("sigmoid", "hinge", "ipo"))
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"`label_smoothing` must be in [0, 0.5), found {self.label_smoothing}.")
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise ValueError(
                f"`label_smoothing={self.label_smoothing}` belongs to `loss_type='sigmoid'`: found "
                f"loss_type={self.loss_type!r}; set it to 0."
            )
        if self.winner_guard is not None:
            if not 0 <= self.winner_guard <= 1:
                raise ValueError(
                    f"`winner_guard` must be in [0, 1], found {self.winner_guard}: the paper uses 0.9 for SD "
                    "1.5 and 0.6 for SDXL."
                )
            if self.loss_type == "ipo" or self.label_smoothing:
                found = "loss_type='ipo'" if self.loss_type == "ipo" else f"label_smoothing={self.label_smoothing}"
                raise ValueError(
                    f"`winner_guard={self.winner_guard}` supposes a loss that only draws chosen images nearer, found "
                    f"{found}: use `loss_type='sigmoid'` or 'hinge' without smoothing, or set it to None."
                )
