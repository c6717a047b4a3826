"""Stable Diffusion XL: two CLIP text encoders, their pooled embedding, and the size and crop of each image."""

import torch

from .base import Conditioning, Posterior
from .stable_diffusion import StableDiffusion


class StableDiffusionXL(StableDiffusion):
    pipeline_class = "StableDiffusionXLPipeline"
    components = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "scheduler")
    conditions_on_size = True

    @classmethod
    def check_parts(cls, found) -> None:
        if found["text_encoder"] is None and found["text_encoder_2"] is not None:
            raise ValueError(
                "Found a StableDiffusionXLPipeline with its second text encoder only, as the refiner has it, which "
                "works on other models' images: expected the base model."
            )
        super().check_parts(found)

    @classmethod
    def check_configs(cls, pipeline, denoiser, vae) -> None:
        super().check_configs(pipeline, denoiser, vae)
        if denoiser.get("addition_embed_type") != "text_time":
            raise ValueError(
                f"Found a UNet with addition_embed_type={denoiser.get('addition_embed_type')!r}, expected 'text_time' "
                "(the size of an image), as the base model has it: load the pipeline with its own UNet."
            )

    def check_trainable(self) -> None:
        super().check_trainable()
        config, found = self.denoiser.config, self.denoiser.add_embedding.linear_1.in_features
        sizes = (found - self.pipeline.text_encoder_2.config.projection_dim) / config.addition_time_embed_dim
        if sizes != 6:
            raise ValueError(
                f"Found a UNet that is told {sizes:g} numbers about an image's size, expected 6 (original size, crop, "
                "target size) as for the base model; the refiner, which takes 5, is not supported."
            )
        if self.pipeline.vae.dtype == torch.float16 and self.pipeline.vae.config.get("force_upcast"):
            raise ValueError(
                "Found a VAE in float16, in which it overflows (`force_upcast`): load it in float32 or bfloat16, or "
                "use one made for float16, such as madebyollin/sdxl-vae-fp16-fix."
            )

    def encode_images(self, pixel_values: torch.Tensor) -> Posterior:
        config, posterior = self.pipeline.vae.config, self.posterior(pixel_values)
        if config.get("latents_mean") is None or config.get("latents_std") is None:
            return posterior.scaled(0.0, config.scaling_factor)
        mean, std = (posterior.mean.new_tensor(x).reshape(-1, 1, 1) for x in (config.latents_mean, config.latents_std))
        return posterior.scaled(mean, config.scaling_factor / std)

    def encode_prompts(self, prompts: list[str], device: torch.device) -> Conditioning:
        embeddings, _, pooled, _ = self.encode_prompt(prompts, device=device, do_classifier_free_guidance=False)
        if self.pipeline.config.force_zeros_for_empty_prompt:
            given = torch.tensor([prompt != "" for prompt in prompts], device=embeddings.device)
            embeddings = torch.where(given[:, None, None], embeddings, 0.0)
            pooled = torch.where(given[:, None], pooled, 0.0)
        return {"encoder_hidden_states": embeddings, "text_embeds": pooled}

    def denoise(self, model, x_t: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        embeddings, pooled = conditioning["encoder_hidden_states"], conditioning["text_embeds"]
        return model(
            x_t,
            t,
            encoder_hidden_states=embeddings,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": conditioning["sizes"].to(embeddings.dtype)},
            return_dict=False,
        )[0]
