"""FLUX.1: T5 for the tokens, CLIP for the pooled embedding, a transformer over packed latents."""

from typing import Any

import torch

from .base import JOINT_ATTENTION, Conditioning, FlowFamily, classifier_free_guidance


class Flux(FlowFamily):
    pipeline_class = "FluxPipeline"
    denoiser_class = "FluxTransformer2DModel"
    components = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "scheduler")
    lora_targets = JOINT_ATTENTION
    comfyui_modules = ".+"
    patch_size = 2
    packs_latents = True
    vae_options = ("scaling_factor", "shift_factor")
    # What a model with an embedded guidance scale is told of it: what the pipeline samples with by default.
    guidance_scale = 3.5

    @property
    def proportion_empty_prompts(self) -> float:
        return 0.0 if self.denoiser.config.guidance_embeds else super().proportion_empty_prompts

    def default_resolution(self) -> int:
        return self.pipeline.default_sample_size * self.pipeline.vae_scale_factor

    def few_step_sign(self) -> str | None:
        if self.denoiser.config.guidance_embeds or self.pipeline.scheduler.config.get("use_dynamic_shifting"):
            return None
        return "without embedded guidance whose scheduler has the same shift at all sizes, as FLUX.1-schnell has it"

    def encode_prompts(self, prompts: list[str], device: torch.device) -> Conditioning:
        embeddings, pooled, _ = self.encode_prompt(prompts, device=device)
        return {"encoder_hidden_states": embeddings, "pooled_projections": pooled}

    def sampling_kwargs(self, guidance_scale: float | None = None, **options: Any) -> dict[str, Any]:
        if guidance_scale is None:
            return options
        if self.denoiser.config.guidance_embeds:
            return options | {"guidance_scale": guidance_scale}
        return classifier_free_guidance(guidance_scale, "") | options

    def denoise(self, model, x_t: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        pipeline, (batch, channels, height, width) = self.pipeline, x_t.shape
        tokens = conditioning["encoder_hidden_states"].shape[1]
        guidance = torch.full_like(t, self.guidance_scale) if self.denoiser.config.guidance_embeds else None
        answer = model(
            hidden_states=pipeline._pack_latents(x_t, batch, channels, height, width),
            timestep=t,
            guidance=guidance,
            **conditioning,
            txt_ids=x_t.new_zeros(tokens, 3),
            img_ids=pipeline._prepare_latent_image_ids(batch, height // 2, width // 2, x_t.device, x_t.dtype),
            return_dict=False,
        )[0]
        scale = pipeline.vae_scale_factor
        return pipeline._unpack_latents(answer, height * scale, width * scale, scale)
