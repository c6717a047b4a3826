"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a UNet over 4-channel latents, epsilon or v prediction."""

import torch

from ..likelihood import DDPMProcess
from .base import Conditioning, Family


class StableDiffusion(Family):
    pipeline_class = "StableDiffusionPipeline"
    denoiser_class = "UNet2DConditionModel"
    denoiser_name = "unet"
    lora_targets = ["to_q", "to_k", "to_v", "to_out.0"]  # noqa: RUF012

    def check(self) -> None:
        in_channels, latent_channels = self.denoiser.config.in_channels, self.pipeline.vae.config.latent_channels
        if in_channels != latent_channels:
            raise ValueError(
                f"Found a UNet with {in_channels} input channels over a VAE with {latent_channels}: expected a "
                "text-to-image UNet, whose input is the latent alone (inpainting UNets take more)."
            )

    def noise_process(self) -> DDPMProcess:
        return DDPMProcess.from_scheduler(self.pipeline.scheduler)

    def default_resolution(self) -> int:
        return self.denoiser.config.sample_size * self.pipeline.vae_scale_factor

    def resolution_multiple(self) -> int:
        return self.pipeline.vae_scale_factor

    def latent_shape(self, resolution: int) -> tuple[int, ...]:
        side = resolution // self.pipeline.vae_scale_factor
        return (self.pipeline.vae.config.latent_channels, side, side)

    def encode_images(self, pixel_values: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        vae = self.pipeline.vae
        posterior = vae.encode(pixel_values.to(vae.dtype)).latent_dist
        return (posterior.mean.float() + posterior.std.float() * noise) * vae.config.scaling_factor

    def encode_prompts(self, prompts: list[str], device: torch.device) -> Conditioning:
        embeddings, _ = self.pipeline.encode_prompt(
            prompts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": embeddings}

    def denoise(self, model, x_t: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        return model(x_t, t, **conditioning, return_dict=False)[0]
