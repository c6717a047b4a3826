"""FLUX.2: Mistral 3 (Klein: Qwen3) for the prompt, a transformer over latents that are patchified and normalised."""

from typing import Any, ClassVar

import torch
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

from .base import JOINT_ATTENTION, Conditioning, FlowFamily, Posterior


class Flux2(FlowFamily):
    pipeline_class = "Flux2Pipeline"
    denoiser_class = "Flux2Transformer2DModel"
    # In the blocks of a single stream all projections are one module.
    lora_targets: ClassVar[list[str]] = [*JOINT_ATTENTION, "to_qkv_mlp_proj"]
    # Not the modulations, and not the embedding of timestep and guidance.
    comfyui_modules = r"(single_)?transformer_blocks\..+|x_embedder|context_embedder|norm_out\.linear|proj_out"
    patch_size = 2
    packs_latents = True
    vae_classes = ("AutoencoderKLFlux2",)
    vae_options = ("batch_norm_eps",)
    # What the pipeline samples with by default: the embedded guidance scale, and the steps that its shift depends on.
    guidance_scale: ClassVar[float | None] = 4.0
    num_inference_steps = 50

    @property
    def proportion_empty_prompts(self) -> float:
        return super().proportion_empty_prompts if self.guidance_scale is None else 0.0

    def default_resolution(self) -> int:
        return self.pipeline.default_sample_size * self.pipeline.vae_scale_factor

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        multiple = self.resolution_multiple()
        return (4 * self.latent_channels, height // multiple, width // multiple)

    def shift_mu(self, sequence_length: int) -> float:
        return compute_empirical_mu(sequence_length, self.num_inference_steps)

    def encode_images(self, pixel_values: torch.Tensor) -> Posterior:
        # The mode of the posterior alone, as the pipeline encodes the images that it is given.
        vae = self.pipeline.vae
        latents = self.pipeline._patchify_latents(vae.encode(pixel_values.to(vae.dtype)).latent_dist.mode().float())
        mean, variance = (x.float().reshape(-1, 1, 1) for x in (vae.bn.running_mean, vae.bn.running_var))
        return Posterior((latents - mean) / (variance + vae.config.batch_norm_eps).sqrt(), None)

    def encode_prompts(self, prompts: list[str], device: torch.device) -> Conditioning:
        embeddings, ids = self.encode_prompt(prompts, device=device)
        return {"encoder_hidden_states": embeddings, "txt_ids": ids}

    def denoise(self, model, x_t: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        answer = model(
            hidden_states=self.pipeline._pack_latents(x_t),
            timestep=t,
            guidance=None if self.guidance_scale is None else torch.full_like(t, self.guidance_scale),
            **conditioning,
            img_ids=self.pipeline._prepare_latent_ids(x_t).to(x_t.device),
            return_dict=False,
        )[0]
        return answer.transpose(1, 2).reshape(x_t.shape)


class Flux2Klein(Flux2):
    pipeline_class = "Flux2KleinPipeline"
    guidance_scale = None

    @classmethod
    def check_configs(cls, pipeline, denoiser, vae) -> None:
        super().check_configs(pipeline, denoiser, vae)
        if pipeline.get("is_distilled"):
            raise ValueError(
                "Found a Flux2KleinPipeline with is_distilled=True, which is distilled to few steps: expected the "
                "base model that it was distilled from."
            )

    def sampling_kwargs(self, **options: Any) -> dict[str, Any]:
        if self.pipeline.config.is_distilled and options.get("guidance_scale", 0.0) > 1:
            raise ValueError(
                f"Found guidance_scale={options['guidance_scale']} for a Flux2KleinPipeline with is_distilled=True, "
                "which ignores it: leave it out."
            )
        return options
