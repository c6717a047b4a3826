"""`trl-diffusion env`."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from .errors import Parser


PACKAGES = [
    "trl-diffusion",
    "trl",
    "torch",
    "transformers",
    "diffusers",
    "accelerate",
    "peft",
    "datasets",
    "huggingface-hub",
    "safetensors",
    "deepspeed",
    "bitsandbytes",
    "torchao",
]


def run(argv: list[str]) -> None:
    """Prints platform, accelerators and package versions."""
    Parser(prog="trl-diffusion env", description=run.__doc__).parse_args(argv)
    lines = {"Platform": platform.platform(), "Python": platform.python_version(), "Accelerator": _accelerator()}
    for package in PACKAGES:
        try:
            lines[package] = version(package)
        except PackageNotFoundError:
            lines[package] = "not installed"
    print("\n".join(f"- {name}: {value}" for name, value in lines.items()))


def _accelerator() -> str:
    kind = torch.accelerator.current_accelerator()
    if kind is None:
        return "none (CPU)"
    name = torch.cuda.get_device_name() if kind.type == "cuda" else kind.type
    return f"{torch.accelerator.device_count()} x {name}"
