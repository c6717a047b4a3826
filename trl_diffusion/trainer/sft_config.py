"""Settings of supervised fine-tuning."""

from dataclasses import dataclass, field

from .base_config import DiffusionConfig


@dataclass(repr=False)  # `DiffusionConfig` keeps tokens out of it
class DiffusionSFTConfig(DiffusionConfig):
    r"""
    Configuration class for the [`DiffusionSFTTrainer`].

    This class includes only the parameters that are specific to supervised fine-tuning; for the others see
    [`DiffusionConfig`] and [`~transformers.TrainingArguments`].

    Parameters:
        learning_rate (`float`, *optional*, defaults to `1e-5`):
            For full fine-tuning. LoRA wants about 10 times more.
    """

    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate for AdamW."})

    def __post_init__(self):
        super().__post_init__()
        if self.error_growth_limit is not None:
            raise ValueError(
                f"`error_growth_limit={self.error_growth_limit}` compares with a reference, which supervised "
                "fine-tuning does not have: leave it at None."
            )
