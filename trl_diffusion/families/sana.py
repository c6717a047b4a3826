"""Sana: Gemma 2 for the prompt, a deep-compression autoencoder, a transformer with linear attention."""

import inspect

import torch

from .base import Conditioning, FlowFamily, Posterior


class Sana(FlowFamily):
    pipeline_class = "SanaPipeline"
    denoiser_class = "SanaTransformer2DModel"

    def check_trainable(self) -> None:
        super().check_trainable()
        if self.denoiser.config.guidance_embeds:
            raise ValueError(
                "Found a SanaTransformer2DModel that is told a guidance scale, as SANA-Sprint has it, which is "
                "distilled to few steps: expected the model that it was distilled from."
            )

    def timestep_shift(self, height: int, width: int) -> float:
        # The pipeline hands its scheduler no mu.
        config = self.pipeline.scheduler.config
        return config.get("shift", config.get("flow_shift"))

    def encode_images(self, pixel_values: torch.Tensor) -> Posterior:
        # This autoencoder gives one latent, not a distribution.
        vae = self.pipeline.vae
        latents = vae.encode(pixel_values.to(vae.dtype)).latent.float()
        return Posterior(latents, None).scaled(0.0, vae.config.scaling_factor)

    def encode_prompts(self, prompts: list[str], device: torch.device) -> Conditioning:
        def encode(texts: list[str], instruction: list[str] | None) -> tuple[torch.Tensor, torch.Tensor]:
            return self.pipeline.encode_prompt(
                texts, do_classifier_free_guidance=False, device=device, complex_human_instruction=instruction
            )[:2]

        # What the pipeline puts before a prompt, but not where there is none.
        instruction = inspect.signature(self.pipeline.__call__).parameters["complex_human_instruction"].default
        embeddings, mask = encode(prompts, instruction)
        empty = torch.tensor([prompt == "" for prompt in prompts], device=embeddings.device)
        if empty.any():
            embeddings_of_none, mask_of_none = encode([""], None)
            embeddings = torch.where(empty[:, None, None], embeddings_of_none, embeddings)
            mask = torch.where(empty[:, None], mask_of_none, mask)
        return {"encoder_hidden_states": embeddings, "encoder_attention_mask": mask}

    def denoise(self, model, x_t: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        scale = self.pipeline.scheduler.config.num_train_timesteps * self.denoiser.config.timestep_scale
        return model(x_t, timestep=t * scale, **conditioning, return_dict=False)[0]
