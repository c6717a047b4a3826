"""Preference alignment of text-to-image diffusion models, in the manner of TRL."""

from importlib import import_module
from typing import TYPE_CHECKING


__version__ = "0.1.0.dev0"

# Public name -> module. Loaded on first use, so that `import trl_diffusion` costs nothing.
_NAMES = {
    "DiffusionKTOConfig": "trainer.kto_config",
    "DiffusionKTOTrainer": "trainer.kto_trainer",
    "LogImagesCallback": "callbacks",
    "unpair_preference_dataset": "data",
}

__all__ = ["DiffusionKTOConfig", "DiffusionKTOTrainer", "LogImagesCallback", "unpair_preference_dataset"]

if TYPE_CHECKING:
    from .callbacks import LogImagesCallback
    from .data import unpair_preference_dataset
    from .trainer.kto_config import DiffusionKTOConfig
    from .trainer.kto_trainer import DiffusionKTOTrainer


def __getattr__(name: str):
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_NAMES[name]}", __name__), name)


def __dir__():
    return sorted({*globals(), *__all__})
