"""
Scorers of images, all with one signature: `(images, prompts) -> list[float]`, higher is better.

    from trl_diffusion.rewards import CLIPScorer

    scores = CLIPScorer("examples/emoji/clip")(images, prompts)

Any function with this signature is a scorer too: in callbacks, and, as `module:function`, on the command line.

The models are loaded by plain transformers from ids or folders, in safetensors. Three are published as pickles only:
`HPS_v2.1_compressed.pt`, `ImageReward.pt` and `aesthetic-model.pth`; these are read with `weights_only=True`, which
executes nothing, and a safetensors file of the same tensors is taken in their place.

Left out, because no plain model class of transformers computes them: HPSv3 and MPS, whose code comes with packages
that pin old versions. Wrap such a package in a function of your own.
"""

import importlib
from collections import Counter

import torch

from .base import ModelScorer, Scorer, score_images
from .classifier import ClassifierScorer
from .clip import AestheticScorer, CLIPScorer, HPSv2Scorer, PickScorer
from .image_reward import ImageRewardScorer


SCORERS: dict[str, type[ModelScorer]] = {
    "aesthetic": AestheticScorer,
    "classifier": ClassifierScorer,
    "clip": CLIPScorer,
    "hpsv2": HPSv2Scorer,
    "imagereward": ImageRewardScorer,
    "pickscore": PickScorer,
}
"""Names on the command line."""


def load_scorer(spec: str, device: torch.device | str | None = None) -> Scorer:
    """
    The scorer that a word of the command line describes.

    Args:
        spec (`str`):
            `name`, one of [`SCORERS`], with the published weights; `name=arguments`, the first arguments of its class,
            joined by colons, such as `clip=examples/emoji/clip` or `classifier=folder:label`; or `module:function`.
        device (`torch.device` or `str`, *optional*):
            Where to compute, for those of [`SCORERS`].

    Raises:
        `ValueError`: if it describes none, or its weights cannot be loaded.
    """
    name, _, arguments = spec.partition("=")
    try:
        if name in SCORERS:
            return SCORERS[name].from_spec(arguments.split(":") if arguments else [], device)
        module, colon, function = spec.partition(":")
        if colon:
            scorer = getattr(importlib.import_module(module), function)
            if not callable(scorer):
                raise TypeError(
                    f"found a {type(scorer).__name__}, expected a function (images, prompts) -> list[float]"
                )
            return scorer
    except (ImportError, AttributeError, OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"The scorer {spec!r} cannot be loaded ({error}); expected `name=folder` or `module:function`"
        ) from error
    raise ValueError(
        f"Found no scorer {spec!r}: expected one of {sorted(SCORERS)}, `name=folder`, or `module:function`."
    )


def scorer_names(specs: list[str]) -> dict[str, str]:
    """
    Short names for specifications: the part before `=` where that is unique, else all of it.

    Returns:
        `dict[str, str]`: specifications by name.

    Raises:
        `ValueError`: if one is given twice.
    """
    twice = [spec for spec, count in Counter(specs).items() if count > 1]
    if twice:
        raise ValueError(f"Found the scorer {twice[0]!r} twice: name each once.")
    short = Counter(spec.partition("=")[0] for spec in specs)
    return {spec.partition("=")[0] if short[spec.partition("=")[0]] == 1 else spec: spec for spec in specs}


def load_scorers(specs: list[str], device: torch.device | str | None = None) -> dict[str, Scorer]:
    """Scorers by name, as the callbacks take them; see [`load_scorer`] and [`scorer_names`]."""
    return {name: load_scorer(spec, device) for name, spec in scorer_names(specs).items()}


__all__ = [
    "SCORERS",
    "AestheticScorer",
    "CLIPScorer",
    "ClassifierScorer",
    "HPSv2Scorer",
    "ImageRewardScorer",
    "ModelScorer",
    "PickScorer",
    "Scorer",
    "load_scorer",
    "load_scorers",
    "score_images",
    "scorer_names",
]
