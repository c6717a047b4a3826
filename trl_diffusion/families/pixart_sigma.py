"""PixArt-Sigma: T5 for the prompt, a transformer that answers a variance beside the noise, which is not used."""

from typing import Any

import torch

from .base import Conditioning, DDPMFamily, exact_size


class PixArtSigma(DDPMFamily):
    pipeline_class = "PixArtSigmaPipeline"
    denoiser_class = "PixArtTransformer2DModel"
    # diffusers has no LoRA loader for this pipeline: an adapter is saved in PEFT's format alone.
    loads_lora = False
    patch_size = 2

    def check_trainable(self) -> None:
        super().check_trainable()
        if self.denoiser.config.use_additional_conditions or self.denoiser.use_additional_conditions:
            raise ValueError(
                "Found a PixArtTransformer2DModel that is told size and aspect ratio, as PixArt-Alpha has it, which "
                "the PixArtSigmaPipeline does not tell: expected `use_additional_conditions=False`."
            )

    @classmethod
    def output_channels(cls, in_channels: int) -> tuple[int, ...]:
        # With the variance, which the pipeline and `denoise` drop, or without.
        return (2 * in_channels, in_channels)

    def encode_prompts(self, prompts: list[str], device: torch.device) -> Conditioning:
        embeddings, mask, _, _ = self.encode_prompt(prompts, device=device, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": embeddings, "encoder_attention_mask": mask}

    def sampling_kwargs(self, **options: Any) -> dict[str, Any]:
        return exact_size(options)

    def denoise(self, model, x_t: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        answer = model(
            x_t,
            timestep=t,
            **conditioning,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return answer[:, : x_t.shape[1]]
