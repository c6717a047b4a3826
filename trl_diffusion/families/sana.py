"""Sana: Gemma 2 for the prompt, a deep-compression autoencoder, a transformer with linear attention."""

from typing import Any

import torch

from .base import Conditioning, FlowFamily, Posterior, exact_size


class Sana(FlowFamily):
    pipeline_class = "SanaPipeline"
    denoiser_class = "SanaTransformer2DModel"
    vae_classes = ("AutoencoderDC",)

    @classmethod
    def check_configs(cls, pipeline, denoiser, vae) -> None:
        super().check_configs(pipeline, denoiser, vae)
        if denoiser.get("guidance_embeds"):
            raise ValueError(
                "Found a SanaTransformer2DModel that is told a guidance scale, as SANA-Sprint has it, which is "
                "distilled to few steps: expected the model that it was distilled from."
            )

    @classmethod
    def scale_factor(cls, vae) -> int:
        return 2 ** (len(vae["encoder_block_out_channels"]) - 1)

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
        def encode(texts: list[str], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
            return self.encode_prompt(texts, device=device, do_classifier_free_guidance=False, **options)[:2]

        embeddings, mask = encode(prompts)
        empty = torch.tensor([prompt == "" for prompt in prompts], device=embeddings.device)
        if empty.any():
            # The instruction that the pipeline puts before a prompt is not put where there is none.
            embeddings_of_none, mask_of_none = encode([""], complex_human_instruction=None)
            embeddings = torch.where(empty[:, None, None], embeddings_of_none, embeddings)
            mask = torch.where(empty[:, None], mask_of_none, mask)
        return {"encoder_hidden_states": embeddings, "encoder_attention_mask": mask}

    def sampling_kwargs(self, **options: Any) -> dict[str, Any]:
        return exact_size(options)

    def denoise(self, model, x_t: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        scale = self.pipeline.scheduler.config.num_train_timesteps * self.denoiser.config.timestep_scale
        return model(x_t, timestep=t * scale, **conditioning, return_dict=False)[0]
