"""Stable Diffusion 3 and 3.5: two CLIP text encoders, T5 where there is one, a transformer over 16-channel latents."""

import torch

from .base import JOINT_ATTENTION, Conditioning, FlowFamily


class StableDiffusion3(FlowFamily):
    pipeline_class = "StableDiffusion3Pipeline"
    denoiser_class = "SD3Transformer2DModel"
    # Without T5, text_encoder_3, the pipeline fills its place with zeros.
    components = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "scheduler")
    lora_targets = JOINT_ATTENTION
    comfyui_modules = ".+"
    patch_size = 2
    vae_options = ("scaling_factor", "shift_factor")

    def encode_prompts(self, prompts: list[str], device: torch.device) -> Conditioning:
        embeddings, _, pooled, _ = self.encode_prompt(prompts, device=device, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": embeddings, "pooled_projections": pooled}

    def denoise(self, model, x_t: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        timestep = t * self.pipeline.scheduler.config.num_train_timesteps
        return model(hidden_states=x_t, timestep=timestep, **conditioning, return_dict=False)[0]
