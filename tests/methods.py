"""The four methods, and a trainer of any of them as tests want it: on the CPU, quick, and without a word."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

from datasets import Dataset

from tests.conftest import embed, pairs, unpaired
from trl_diffusion import (
    DiffusionDPOConfig,
    DiffusionDPOTrainer,
    DiffusionKTOConfig,
    DiffusionKTOTrainer,
    DiffusionRPOConfig,
    DiffusionRPOTrainer,
    DiffusionSFTConfig,
    DiffusionSFTTrainer,
)


class Method(NamedTuple):
    config: Any
    trainer: Any
    data: Callable[..., Dataset]
    # The tiny pipelines' errors are of the size of 1: a beta of thousands would leave no gradient.
    options: dict[str, Any]
    arguments: dict[str, Any]


METHODS = {
    "kto": Method(DiffusionKTOConfig, DiffusionKTOTrainer, unpaired, {"beta": 100.0}, {}),
    "rpo": Method(DiffusionRPOConfig, DiffusionRPOTrainer, pairs, {"beta": 100.0}, {"embedder": embed}),
    "dpo": Method(DiffusionDPOConfig, DiffusionDPOTrainer, pairs, {"beta": 100.0}, {}),
    "sft": Method(DiffusionSFTConfig, DiffusionSFTTrainer, pairs, {}, {}),
}
ARGUMENTS = ("ref_model", "eval_dataset", "callbacks", "quantization_config", "peft_config", "embedder")


def make_trainer(method: str, model, folder, dataset: Dataset | None = None, **changes):
    """A trainer; `changes` are those of its configuration, or arguments of the trainer."""
    config_class, trainer_class, data, options, arguments = METHODS[method]
    settings = {
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 1e-4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    given = {name: changes.pop(name) for name in ARGUMENTS if name in changes}
    if "peft_config" in given:
        given["peft_config"] = copy.deepcopy(given["peft_config"])
    return trainer_class(
        model=model,
        args=config_class(str(folder), **settings | options | changes),
        train_dataset=data() if dataset is None else dataset,
        **arguments | given,
    )
