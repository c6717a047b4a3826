"""Diffusion-KTO: alignment from single images that people liked or disliked."""

import textwrap

import torch
from datasets import IterableDataset
from transformers import EvalPrediction

from ..data.formats import AnyDataset, declare_columns, read_labels, unpair_preference_dataset
from ..data.samplers import DesirableRatioSampler
from ..losses import apo_zero_unpaired_loss, kto_loss, kto_reference_point
from .base_trainer import DiffusionTrainer, Noised, rows_per_window
from .kto_config import DiffusionKTOConfig
from .metrics import Metrics, gradient_factor, image_metrics, log_ratios_by_noise, metric_means


class DiffusionKTOTrainer(DiffusionTrainer):
    """
    Trainer for [Diffusion-KTO](https://huggingface.co/papers/2404.04465): aligns a text-to-image diffusion model with
    per-image feedback, without pairs.

    Reads the columns `prompt` (str), `image` (`datasets.Image`) and `label` (bool, True = liked), and `weight` (float)
    where there is one. Paired data (`prompt, chosen, rejected`) is unpaired, as TRL's `KTOTrainer` does.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from peft import LoraConfig
    >>> from trl_diffusion import DiffusionKTOConfig, DiffusionKTOTrainer

    >>> trainer = DiffusionKTOTrainer(
    ...     model="stable-diffusion-v1-5/stable-diffusion-v1-5",
    ...     args=DiffusionKTOConfig(output_dir="sd15-kto"),
    ...     train_dataset=load_dataset("my/likes-and-dislikes", split="train"),
    ...     peft_config=LoraConfig(r=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]),
    ... )
    >>> trainer.train()
    ```

    Arguments are those of [`DiffusionTrainer`], with `args` a [`DiffusionKTOConfig`].
    """

    _name = "Diffusion-KTO"
    _tag_names = ["trl", "trl-diffusion", "diffusion-kto", "text-to-image", "diffusers"]  # noqa: RUF012
    _paper = {  # noqa: RUF012
        "title": "Aligning Diffusion Models by Optimizing Human Utility",
        "id": "2404.04465",
        "citation": textwrap.dedent("""\
            @inproceedings{li2024aligning,
                title     = {{Aligning Diffusion Models by Optimizing Human Utility}},
                author    = {Shufan Li and Konstantinos Kallidromitis and Akash Gokul and Yusuke Kato and
                             Kazuki Kozuka},
                booktitle = {Advances in Neural Information Processing Systems},
                year      = 2024,
                eprint    = {arXiv:2404.04465},
            }"""),
    }

    config_class = DiffusionKTOConfig
    columns = ("prompt", "image", "label")
    image_columns = ("image",)
    args: DiffusionKTOConfig

    # ---- Data -------------------------------------------------------------------------------------------------------

    def _prepare_dataset(self, dataset: AnyDataset, what: str, args: DiffusionKTOConfig) -> AnyDataset:
        dataset = declare_columns(dataset)
        paired = {"chosen", "rejected"} <= set(getattr(dataset, "column_names", None) or ())
        if paired:
            dataset = unpair_preference_dataset(dataset)
        dataset = super()._prepare_dataset(dataset, what, args)
        if not isinstance(dataset, IterableDataset) and what.startswith("training"):
            labels = read_labels(dataset)
            if labels.all() or not labels.any():
                raise ValueError(
                    f"All {len(labels)} labels of the {what} are {bool(labels[0])}, expected liked (True) and "
                    "disliked (False) images: add the other kind, or use supervised fine-tuning on what is liked."
                )
        return dataset

    def _check_training_stream(self, args: DiffusionKTOConfig) -> None:
        super()._check_training_stream(args)
        if args.desirable_ratio is not None:
            raise ValueError(
                f"`desirable_ratio={args.desirable_ratio}` needs all labels at once and cannot be had from a stream: "
                "set `desirable_ratio=None` and mix liked and disliked rows in the data set."
            )

    def _get_train_sampler(self, train_dataset=None):
        if self.args.desirable_ratio is None:
            return super()._get_train_sampler(train_dataset)
        return DesirableRatioSampler(
            read_labels(self.train_dataset),
            self.args.desirable_ratio,
            self.examples_per_step,
            seed=self.example_builders[0].seed,
            drop_last=self.args.dataloader_drop_last,
            buckets=self.buckets(self.train_dataset),
        )

    def check_batch_size(self, args: DiffusionKTOConfig) -> None:
        if args.loss_type != "kto":
            return
        if args.reference_point == "mismatched" and args.per_device_train_batch_size < 2:
            raise ValueError(
                "`reference_point='mismatched'` pairs each image with its neighbour's prompt: found "
                "per_device_train_batch_size=1, expected at least 2."
            )
        if args.reference_point == "matched" and rows_per_window(args) < 2:
            raise ValueError(
                "The reference point is a mean over a window of one image, which cancels that image's own log-ratio: "
                "raise `per_device_train_batch_size` to at least 2, or set `loss_type='apo_zero_unpaired'` or "
                "`reference_point='none'`."
            )

    def check_computed_once(self, args: DiffusionKTOConfig) -> None:
        if args.precompute_ref_log_probs and args.loss_type == "kto" and args.reference_point == "mismatched":
            raise ValueError(
                "`reference_point='mismatched'` needs the reference on prompts that change with the order of the "
                "rows: drop `precompute_ref_log_probs`, or set `reference_point='matched'`."
            )

    # ---- Loss -------------------------------------------------------------------------------------------------------

    @property
    def scores_steps(self) -> bool:
        return super().scores_steps and self.args.reference_point != "none"

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        noised, ref_errors = self.frozen_side(model, inputs)
        errors = self.errors(model, noised)
        log_ratios = ref_errors - errors

        z = self.window_reference_point(model, inputs, noised, log_ratios)
        losses = self.losses(log_ratios, inputs["label"], z)
        if "weight" in inputs:
            losses = inputs["weight"] * losses

        with torch.no_grad():
            metrics = self.metrics(errors, ref_errors, inputs["label"], z)
            self.record(metrics | log_ratios_by_noise(log_ratios, noised.noise_level, inputs["label"]))
        return losses.mean()

    def losses(self, log_ratios: torch.Tensor, labels: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """One loss per image, by `args.loss_type`."""
        weights = {
            "desirable_weight": self.args.desirable_weight,
            "undesirable_weight": self.args.undesirable_weight,
        }
        if self.args.loss_type == "apo_zero_unpaired":
            return apo_zero_unpaired_loss(log_ratios, labels, beta=self.args.beta, **weights)
        return kto_loss(
            log_ratios, labels, beta=self.args.beta, reference_point=z, utility=self.args.utility, **weights
        )

    @torch.no_grad()
    def window_reference_point(self, model, inputs, noised: Noised, log_ratios: torch.Tensor) -> torch.Tensor:
        """`z = max(0, mean log-ratio)` over the window (`args.window`)."""
        if self.args.loss_type == "apo_zero_unpaired" or self.args.reference_point == "none":
            return log_ratios.new_zeros(())
        if self.args.window == "step":  # scored before
            values = torch.cat(self._step_values)
        else:
            values, _ = self.over_window(self.window_values(model, inputs, noised, log_ratios))
        return kto_reference_point(values.sum(), len(values))

    def window_values(self, model, inputs, noised: Noised, log_ratios: torch.Tensor) -> torch.Tensor:
        if self.args.reference_point == "mismatched":
            unrelated = {name: tensor.roll(1, dims=0) for name, tensor in noised.conditioning.items()}
            noised = noised._replace(conditioning=unrelated)
            log_ratios = self.reference_errors(model, noised) - self.errors(model, noised)
        return log_ratios

    # ---- Metrics ----------------------------------------------------------------------------------------------------

    def metrics(
        self, errors: torch.Tensor, ref_errors: torch.Tensor, labels: torch.Tensor, z: torch.Tensor
    ) -> Metrics:
        # On the right side of the reference point: what the loss wants of a liked and of a disliked image.
        log_ratios = ref_errors - errors
        return {
            "kl": (z, None),
            "rewards/accuracies": ((log_ratios > z) == labels, None),
            "health/negative_margins": (torch.where(labels, log_ratios < z, log_ratios > z), None),
            "health/gradient_factor": gradient_factor(
                lambda x: self.losses(x, labels, torch.zeros_like(z)), log_ratios - z
            ),
            **image_metrics(errors, ref_errors, labels, self.args.beta),
        }

    def training_metrics(self, means: dict[str, float]) -> dict[str, float]:
        if "rewards/chosen" in means and "rewards/rejected" in means:
            means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
        return super().training_metrics(means)

    def evaluation_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        errors, ref_errors, weight, noise_level = torch.from_numpy(prediction.predictions).unbind(1)
        labels = torch.from_numpy(prediction.label_ids).bool()
        log_ratios = ref_errors - errors
        # The window is the whole evaluation set; its matched pairs serve for every kind of reference point but "none".
        z = kto_reference_point(log_ratios.sum(), len(log_ratios))
        if self.args.loss_type == "apo_zero_unpaired" or self.args.reference_point == "none":
            z = torch.zeros(())
        metrics = {"loss": (weight * self.losses(log_ratios, labels, z)).mean().item()}
        by_noise = log_ratios_by_noise(log_ratios, noise_level, labels)
        metrics |= metric_means(self.metrics(errors, ref_errors, labels, z) | by_noise)
        return self.training_metrics(metrics)

    def card_settings(self) -> dict[str, object]:
        args = self.args
        return {
            "method": f"Diffusion-KTO, loss `{args.loss_type}`, utility `{args.utility}`",
            "beta": f"{args.beta:g} on the difference of mean squared errors, without a factor 1/2",
            "reference point": "none"
            if args.loss_type == "apo_zero_unpaired" or args.reference_point == "none"
            else f"{args.reference_point}, over the {args.window}",
            "desirable / undesirable weight": f"{args.desirable_weight:g} / {args.undesirable_weight:g}",
            "share of liked images drawn": args.desirable_ratio
            if args.desirable_ratio is not None
            else "as they come",
        }
