"""Pipelines with random weights of true configurations, to be timed and not looked at."""

from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .estimate import build, published_models


def spelling_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that spells, and so needs no file."""
    letters = [chr(code) for code in range(33, 127)]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)


def small() -> DiffusionPipeline:
    """A UNet of 28.6 M parameters over 32 x 32 latents, with the VAE of Stable Diffusion in its true size."""
    unet = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(96, 192, 384),
        layers_per_block=1,
        cross_attention_dim=256,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=256,
    )
    text = CLIPTextConfig(
        vocab_size=49408, hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=spelling_tokenizer(),
        unet=unet,
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def published(name: str, device: str = "cpu") -> DiffusionPipeline:
    """A published model in its true size, but for T5, without which Stable Diffusion 3 works too."""
    model = published_models()[name]
    plan = model["random_pipeline"]
    # The frozen parts stand in the order of the components; what comes after them is left out.
    components: dict[str, Any] = {
        component: build(part, device) for component, part in zip(plan["components"], model["frozen"], strict=False)
    }
    encoders = [component for component in components if component.startswith("text_encoder")]
    components |= {component.replace("text_encoder", "tokenizer"): spelling_tokenizer() for component in encoders}
    components[plan["denoiser_name"]] = build(model["denoiser"], device)
    scheduler = getattr(diffusers, plan["scheduler"]["class"])(**plan["scheduler"]["config"])
    return getattr(diffusers, model["pipeline_class"])(scheduler=scheduler, **components, **plan["absent"])


RANDOM = ("small", "sd15", "sdxl", "sd35-medium")


def random_pipeline(name: str) -> DiffusionPipeline:
    """The pipeline of one of these names, with the same random weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return small() if name == "small" else published(name)
