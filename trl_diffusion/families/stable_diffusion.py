"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a UNet over 4-channel latents, any DDPM prediction."""

import torch

from .base import Conditioning, DDPMFamily


class StableDiffusion(DDPMFamily):
    pipeline_class = "StableDiffusionPipeline"
    denoiser_class = "UNet2DConditionModel"
    denoiser_name = "unet"

    @classmethod
    def check_configs(cls, pipeline, denoiser, vae) -> None:
        super().check_configs(pipeline, denoiser, vae)
        if denoiser.get("time_cond_proj_dim") is not None:
            raise ValueError(
                "Found a UNet that is told a guidance scale (`time_cond_proj_dim`), as latent consistency models are: "
                "its few steps would not survive this training; expected the model that it was distilled from."
            )

    def encode_prompts(self, prompts: list[str], device: torch.device) -> Conditioning:
        embeddings, _ = self.encode_prompt(prompts, device=device, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": embeddings}

    def denoise(self, model, x_t: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        return model(x_t, t, **conditioning, return_dict=False)[0]
