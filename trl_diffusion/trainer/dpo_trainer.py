"""Diffusion-DPO: alignment from pairs of images of one prompt, each winner against its own loser."""

import textwrap

import torch
from transformers import EvalPrediction

from ..data.formats import AnyDataset, check_paired, declare_columns
from ..losses import dpo_loss, rejected_gradient_scale
from .base_trainer import DiffusionTrainer
from .dpo_config import DiffusionDPOConfig
from .metrics import Metrics, gradient_factor, image_metrics, is_chosen, log_ratios_by_noise, metric_means


class DiffusionDPOTrainer(DiffusionTrainer):
    """
    Trainer for [Diffusion-DPO](https://huggingface.co/papers/2311.12908): aligns a text-to-image diffusion model with
    pairs of images.

    Reads the columns `prompt` (str), `chosen` and `rejected` (`datasets.Image`), and `weight` (float) where there is
    one. Both images of a pair are corrupted with the same noise at the same timestep, as the authors do.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from peft import LoraConfig
    >>> from trl_diffusion import DiffusionDPOConfig, DiffusionDPOTrainer

    >>> trainer = DiffusionDPOTrainer(
    ...     model="stable-diffusion-v1-5/stable-diffusion-v1-5",
    ...     args=DiffusionDPOConfig(output_dir="sd15-dpo"),
    ...     train_dataset=load_dataset("my/preferences", split="train"),
    ...     peft_config=LoraConfig(r=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]),
    ... )
    >>> trainer.train()
    ```

    Arguments are those of [`DiffusionTrainer`], with `args` a [`DiffusionDPOConfig`].
    """

    _name = "Diffusion-DPO"
    _tag_names = ["trl", "trl-diffusion", "diffusion-dpo", "text-to-image", "diffusers"]  # noqa: RUF012
    _paper = {  # noqa: RUF012
        "title": "Diffusion Model Alignment Using Direct Preference Optimization",
        "id": "2311.12908",
        "citation": textwrap.dedent("""\
            @inproceedings{wallace2024diffusion,
                title     = {{Diffusion Model Alignment Using Direct Preference Optimization}},
                author    = {Bram Wallace and Meihua Dang and Rafael Rafailov and Linqi Zhou and Aaron Lou and
                             Senthil Purushwalkam and Stefano Ermon and Caiming Xiong and Shafiq Joty and
                             Nikhil Naik},
                booktitle = {Conference on Computer Vision and Pattern Recognition},
                year      = 2024,
                eprint    = {arXiv:2311.12908},
            }"""),
    }

    config_class = DiffusionDPOConfig
    columns = ("prompt", "chosen", "rejected")
    image_columns = ("chosen", "rejected")
    args: DiffusionDPOConfig

    def _prepare_dataset(self, dataset: AnyDataset, what: str, args: DiffusionDPOConfig) -> AnyDataset:
        dataset = declare_columns(dataset)
        check_paired(dataset, what, "DiffusionDPOTrainer")
        return super()._prepare_dataset(dataset, what, args)

    # ---- Loss -------------------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        noised, ref_errors = self.frozen_side(model, inputs)
        prediction = self.denoise(model, noised).float()
        errors = self.errors_of(prediction, noised)

        log_ratios = ref_errors - errors
        mu = self.args.winner_guard
        if mu is not None:
            log_ratios = self.guarded(log_ratios, errors, prediction, mu)
        losses = self.losses(log_ratios)
        if "weight" in inputs:
            losses = inputs["weight"] * losses

        with torch.no_grad():
            by_noise = log_ratios_by_noise(ref_errors - errors, noised.noise_level, is_chosen(errors))
            self.record(self.metrics(errors, ref_errors) | by_noise)
        return losses.mean()

    def guarded(
        self, log_ratios: torch.Tensor, errors: torch.Tensor, prediction: torch.Tensor, mu: float
    ) -> torch.Tensor:
        """The same log-ratios; those of rejected images with less gradient (`args.winner_guard`)."""
        (gradients,) = torch.autograd.grad(errors.sum(), prediction, retain_graph=True)
        chosen, rejected = gradients.chunk(2)
        products = torch.stack([chosen.square().sum(), (chosen * rejected).sum()])
        # Two numbers, so that the ranks agree on one scale.
        scale = rejected_gradient_scale(*self.accelerator.reduce(products, reduction="sum"), mu=mu)
        self.record({"health/rejected_gradient_scale": (scale.reshape(1), None)})
        scale = torch.where(is_chosen(errors), 1.0, scale)
        return log_ratios.detach() + scale * (log_ratios - log_ratios.detach())

    def losses(self, log_ratios: torch.Tensor) -> torch.Tensor:
        """One loss per pair, of the log-ratios of all chosen and then all rejected images."""
        chosen, rejected = log_ratios.chunk(2)
        return dpo_loss(
            chosen,
            rejected,
            beta=self.args.beta,
            loss_type=self.args.loss_type,
            label_smoothing=self.args.label_smoothing,
        )

    # ---- Metrics ----------------------------------------------------------------------------------------------------

    def metrics(self, errors: torch.Tensor, ref_errors: torch.Tensor) -> Metrics:
        chosen, rejected = (ref_errors - errors).chunk(2)
        return {
            "rewards/accuracies": (chosen > rejected, None),
            "rewards/margins": (self.args.beta * (chosen - rejected), None),
            "health/negative_margins": (chosen < rejected, None),
            "health/gradient_factor": gradient_factor(self.losses, ref_errors - errors),
            **image_metrics(errors, ref_errors, is_chosen(errors), self.args.beta),
        }

    def evaluation_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        numbers = torch.from_numpy(prediction.predictions)
        errors, ref_errors = numbers[:, :2].T.flatten(), numbers[:, 2:4].T.flatten()
        weight, noise_level = numbers[:, 4], numbers[:, 5].repeat(2)
        losses = weight * self.losses(ref_errors - errors)
        by_noise = log_ratios_by_noise(ref_errors - errors, noise_level, is_chosen(errors))
        metrics = metric_means(self.metrics(errors, ref_errors) | by_noise)
        return self.training_metrics({"loss": losses.mean().item(), **metrics})

    def card_settings(self) -> dict[str, object]:
        args = self.args
        return {
            "method": f"Diffusion-DPO, loss `{args.loss_type}`, label smoothing {args.label_smoothing:g}",
            "beta": f"{args.beta:g} on the difference of mean squared errors"
            + (", with the factor 1/2" if args.loss_type == "sigmoid" else ""),
            **({} if args.winner_guard is None else {"winner guard (Diffusion-SDPO)": f"mu {args.winner_guard:g}"}),
        }
