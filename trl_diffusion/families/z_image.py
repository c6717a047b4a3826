"""Z-Image: Qwen3 for the prompt; a transformer that takes lists, counts time from noise and answers minus the flow."""

import torch
from torch.nn.utils.rnn import pad_sequence

from .base import Conditioning, FlowFamily


class ZImage(FlowFamily):
    pipeline_class = "ZImagePipeline"
    denoiser_class = "ZImageTransformer2DModel"
    comfyui_modules = ".+"
    prompt_mask = "mask"
    patch_size = 2
    vae_options = ("scaling_factor", "shift_factor")

    def default_resolution(self) -> int:
        return 1024

    def few_step_sign(self) -> str | None:
        config = self.pipeline.scheduler.config
        if config.get("use_dynamic_shifting") or config.get("shift") != 3.0:
            return None
        return "whose scheduler has a shift of 3, as that of Z-Image-Turbo has (Z-Image: 6)"

    def encode_prompts(self, prompts: list[str], device: torch.device) -> Conditioning:
        # The pipeline writes its chat template into the list that it is given.
        embeddings, _ = self.encode_prompt(list(prompts), device=device, do_classifier_free_guidance=False)
        mask = [torch.ones(len(e), dtype=torch.bool, device=e.device) for e in embeddings]
        return {"embeddings": pad_sequence(embeddings, True), "mask": pad_sequence(mask, True)}

    def denoise(self, model, x_t: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        rows = zip(conditioning["embeddings"], conditioning["mask"], strict=True)
        images = list(x_t.unsqueeze(2).unbind())  # of one frame
        answers = model(images, 1 - t, [row[mask] for row, mask in rows], return_dict=False)[0]
        return -torch.stack(list(answers)).squeeze(2)
