"""Qwen-Image: Qwen2.5-VL for the prompt, a video VAE of one frame, a transformer over packed latents."""

from typing import Any

import torch

from .base import JOINT_ATTENTION, Conditioning, FlowFamily, Posterior, classifier_free_guidance


class QwenImage(FlowFamily):
    pipeline_class = "QwenImagePipeline"
    denoiser_class = "QwenImageTransformer2DModel"
    lora_targets = JOINT_ATTENTION
    comfyui_modules = ".+"
    # What the last block makes of the text.
    has_idle_parameters = True
    prompt_mask = "encoder_hidden_states_mask"
    # What the model's card guides away from; training drops prompts to the same.
    no_prompt = " "
    patch_size = 2
    packs_latents = True
    vae_classes = ("AutoencoderKLQwenImage",)
    vae_options = ("latents_mean", "latents_std")
    latent_channels_option = "z_dim"

    @classmethod
    def check_configs(cls, pipeline, denoiser, vae) -> None:
        super().check_configs(pipeline, denoiser, vae)
        for name in ("guidance_embeds", "zero_cond_t", "use_additional_t_cond"):
            if denoiser.get(name):
                raise ValueError(
                    f"Found a {cls.denoiser_class} with {name}=True, which the {cls.pipeline_class} of diffusers "
                    "0.42.1 cannot call: expected the text-to-image model."
                )

    @classmethod
    def output_channels(cls, in_channels: int) -> tuple[int, ...]:
        return (in_channels // cls.patch_size**2,)

    @classmethod
    def scale_factor(cls, vae) -> int:
        return 2 ** len(vae["temperal_downsample"])

    def default_resolution(self) -> int:
        return self.pipeline.default_sample_size * self.pipeline.vae_scale_factor

    def posterior(self, pixel_values: torch.Tensor) -> Posterior:
        frames = pixel_values.unsqueeze(2).to(self.pipeline.vae.dtype)
        posterior = self.pipeline.vae.encode(frames).latent_dist
        return Posterior(posterior.mean.squeeze(2).float(), posterior.std.squeeze(2).float())

    def encode_images(self, pixel_values: torch.Tensor) -> Posterior:
        config, posterior = self.pipeline.vae.config, self.posterior(pixel_values)
        mean, std = (posterior.mean.new_tensor(x).reshape(-1, 1, 1) for x in (config.latents_mean, config.latents_std))
        return posterior.scaled(mean, 1 / std)

    def encode_prompts(self, prompts: list[str], device: torch.device) -> Conditioning:
        embeddings, mask = self.encode_prompt([prompt or self.no_prompt for prompt in prompts], device=device)
        if mask is None:  # all prompts are equally long
            mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=device)
        return {"encoder_hidden_states": embeddings, "encoder_hidden_states_mask": mask}

    def sampling_kwargs(self, guidance_scale: float | None = None, **options: Any) -> dict[str, Any]:
        # The pipeline's own `guidance_scale` is for models with an embedded one, of which there are none.
        if guidance_scale is None:
            return options
        return classifier_free_guidance(guidance_scale, self.no_prompt) | options

    def denoise(self, model, x_t: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        pipeline, (batch, channels, height, width) = self.pipeline, x_t.shape
        mask = conditioning["encoder_hidden_states_mask"]
        answer = model(
            hidden_states=pipeline._pack_latents(x_t, batch, channels, height, width),
            timestep=t,
            encoder_hidden_states=conditioning["encoder_hidden_states"],
            encoder_hidden_states_mask=None if mask.all() else mask,
            img_shapes=[[(1, height // 2, width // 2)]] * batch,
            return_dict=False,
        )[0]
        scale = pipeline.vae_scale_factor
        return pipeline._unpack_latents(answer, height * scale, width * scale, scale).squeeze(2)
