"""Options that the training commands share; the names are TRL's where TRL has the option."""

from dataclasses import dataclass, field

import torch
from diffusers import BitsAndBytesConfig
from peft import LoraConfig


@dataclass
class ScriptArguments:
    """
    Which data to train on.

    Parameters:
        dataset_name (`str`):
            Hub id or local folder, as `datasets.load_dataset` takes it.
        dataset_config (`str`, *optional*):
            Its configuration.
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            Split to train on.
        dataset_test_split (`str`, *optional*, defaults to `"test"`):
            Split to evaluate on, if `--eval_strategy` asks for evaluation.
        dataset_streaming (`bool`, *optional*, defaults to `False`):
            Whether to stream the data set.
        allow_outside (`bool`, *optional*, defaults to `False`):
            Whether rows may name image files outside of the data set's folder.
    """

    dataset_name: str = field(metadata={"help": "Hub id or local folder of the data set."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split to evaluate on, where asked for."})
    dataset_streaming: bool = field(default=False, metadata={"help": "Whether to stream the data set."})
    allow_outside: bool = field(
        default=False, metadata={"help": "Whether rows may name image files outside of the data set's folder."}
    )


@dataclass
class ModelArguments:
    """
    Which model to train, and how much of it.

    Parameters:
        model_name_or_path (`str`):
            Hub id or local folder of a diffusers pipeline.
        model_revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Dtype of the loaded weights; half precision is for LoRA only.
        use_peft (`bool`, *optional*, defaults to `False`):
            Whether to train a LoRA instead of the whole denoiser.
        lora_r (`int`, *optional*, defaults to `16`), lora_alpha (`int`, *optional*, defaults to `32`):
            Rank, and scale: the update is multiplied by alpha / rank.
        lora_dropout (`float`, *optional*, defaults to `0.0`):
            Dropout of the LoRA layers. Needs `--disable_dropout false` to have an effect.
        lora_target_modules (`list[str]`, *optional*):
            Modules to adapt. Defaults to the family's attention projections.
        use_rslora, use_dora (`bool`, *optional*, defaults to `False`):
            Variants of LoRA, see PEFT.
        load_in_4bit, load_in_8bit (`bool`, *optional*, defaults to `False`):
            Whether to quantize the denoiser with bitsandbytes, which needs a GPU; for `--use_peft`.
        bnb_4bit_quant_type (`str`, *optional*, defaults to `"nf4"`), use_bnb_nested_quant (`bool`, *optional*, \
            defaults to `False`):
            Type of 4-bit weights, and whether to quantize their scales too.
    """

    model_name_or_path: str = field(metadata={"help": "Hub id or local folder of a diffusers pipeline."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the Hub."})
    dtype: str = field(
        default="float32",
        metadata={"help": "Dtype of the loaded weights.", "choices": ["bfloat16", "float16", "float32"]},
    )
    use_peft: bool = field(default=False, metadata={"help": "Whether to train a LoRA."})
    lora_r: int = field(default=16, metadata={"help": "LoRA rank."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA alpha: the update is scaled by alpha / rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "LoRA dropout; needs `--disable_dropout false`."})
    lora_target_modules: list[str] | None = field(default=None, metadata={"help": "Modules that LoRA adapts."})
    use_rslora: bool = field(default=False, metadata={"help": "Rank-stabilised LoRA."})
    use_dora: bool = field(default=False, metadata={"help": "Weight-decomposed LoRA."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Whether to quantize the denoiser to 4 bits."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Whether to quantize the denoiser to 8 bits."})
    bnb_4bit_quant_type: str = field(
        default="nf4", metadata={"help": "Type of 4-bit weights.", "choices": ["fp4", "nf4"]}
    )
    use_bnb_nested_quant: bool = field(
        default=False, metadata={"help": "Whether to quantize the scales of 4-bit weights too."}
    )

    def peft_config(self) -> LoraConfig | None:
        """The LoRA configuration, or None for full fine-tuning."""
        if not self.use_peft:
            return None
        modules = self.lora_target_modules
        if (
            modules is not None
            and len(modules) == 1
            and (modules[0] == "all-linear" or set(modules[0]) & set("*|()\\[]"))
        ):
            modules = modules[0]  # type: ignore[assignment]  # a keyword of PEFT, or a regular expression
        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=modules,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
        )

    def quantization_config(self) -> BitsAndBytesConfig | None:
        """The bitsandbytes configuration, or None."""
        if not self.load_in_4bit and not self.load_in_8bit:
            return None
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("Found `--load_in_4bit` and `--load_in_8bit`, expected one of them: drop one.")
        if self.load_in_8bit:
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=getattr(torch, self.dtype),
            bnb_4bit_quant_type=self.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=self.use_bnb_nested_quant,
        )

    def init_kwargs(self) -> dict[str, object]:
        """Keyword arguments of `DiffusionPipeline.from_pretrained`."""
        revision = {} if self.model_revision is None else {"revision": self.model_revision}
        return {"dtype": self.dtype, **revision}
