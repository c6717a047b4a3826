"""Draw pictures of many prompts and score them: which style, and is it still what the prompt says?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from common import HERE
from diffusers import DiffusionPipeline
from PIL.Image import Image
from tqdm import tqdm
from transformers import CLIPForImageClassification, CLIPModel, CLIPProcessor


GUIDANCE = 2.5
STEPS = 25


@dataclass
class Sample:
    """One picture, with the prompt and the seed that it was drawn from."""

    prompt: str
    seed: int
    image: Image


def draw(pipeline: DiffusionPipeline, prompts: list[str], seeds: int, title: str = "sampling") -> list[Sample]:
    """`seeds` pictures of every prompt. Each comes from a seed of its own, so that batches do not matter."""
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.eval()
    jobs = [(prompt, 1000 * i + k) for i, prompt in enumerate(prompts) for k in range(seeds)]
    samples: list[Sample] = []
    with tqdm(total=len(jobs), desc=title, unit="image") as bar:
        for start in range(0, len(jobs), 32):
            part = jobs[start : start + 32]
            images = pipeline(
                [prompt for prompt, _ in part],
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                generator=[torch.Generator().manual_seed(seed) for _, seed in part],
            ).images
            samples += [Sample(prompt, seed, image) for (prompt, seed), image in zip(part, images, strict=True)]
            bar.update(len(part))
    return samples


class Judges:
    """The style judge and the small CLIP of this folder."""

    def __init__(self) -> None:
        self.clip = CLIPModel.from_pretrained(HERE / "clip", dtype=torch.float32).eval()
        self.processor = CLIPProcessor.from_pretrained(HERE / "clip")
        self.style_model = CLIPForImageClassification.from_pretrained(HERE / "judge", dtype=torch.float32).eval()

    @torch.no_grad()
    def styles(self, images: list[Image]) -> list[str]:
        """Name of the style of each picture."""
        pixels = self.processor(images=images, return_tensors="pt").pixel_values
        names = self.style_model.config.id2label
        return [names[i] for i in self.style_model(pixel_values=pixels).logits.argmax(-1).tolist()]

    @torch.no_grad()
    def content(self, samples: list[Sample], prompts: list[str]) -> tuple[float, float]:
        """Mean CLIP score (100 x cosine), and the share of samples whose own prompt is the nearest of `prompts`."""
        inputs = self.processor(
            text=prompts, images=[sample.image for sample in samples], padding="max_length", return_tensors="pt"
        )
        cosines = self.clip(**inputs).logits_per_image / self.clip.logit_scale.exp()
        own = torch.tensor([prompts.index(sample.prompt) for sample in samples])
        score = 100 * cosines.gather(1, own[:, None]).mean().item()
        return score, (cosines.argmax(1) == own).float().mean().item()


def wilson_interval(successes: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a share (Wilson score), the samples taken as independent."""
    share = successes / total
    centre = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return (centre - half) / (1 + z * z / total), (centre + half) / (1 + z * z / total)
