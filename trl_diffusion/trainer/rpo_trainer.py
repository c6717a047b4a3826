"""Diffusion-RPO: alignment from pairs, each winner against the losers of related prompts too."""

import textwrap
import warnings
from typing import Any

import torch
from datasets import Dataset
from transformers import EvalPrediction

from ..data.embeddings import CLIPEmbedder, Embedder, check_embeddings, clip_fingerprint, embed_pairs
from ..data.formats import EMBEDDING_COLUMNS, AnyDataset, check_dataset, check_paired, declare_columns
from ..hub import public_name
from ..losses import contrast_weights, rpo_loss
from ..markdown import code
from .base_trainer import DiffusionTrainer, Noised, rows_per_window, widest_float
from .metrics import Metrics, gradient_factor, image_metrics, is_chosen, log_ratios_by_noise, metric_means
from .rpo_config import DiffusionRPOConfig


OWN_WEIGHT = 0.5
"""The mean weight of a winner's own loser below which a warning is given, see docs/trainers/rpo.md."""


class DiffusionRPOTrainer(DiffusionTrainer):
    """
    Trainer for [Diffusion-RPO](https://huggingface.co/papers/2406.06382): aligns a text-to-image diffusion model with
    pairs of images, contrasting each winner with the losers of its own and of related prompts.

    Reads the columns `prompt` (str), `chosen` and `rejected` (`datasets.Image`), and `weight` (float) where there is
    one. How related (prompt, image) and (prompt, image) are, an embedding tells, which is computed once per data set.

    The paper's authors published no code. Known are the contrast of winners with losers of related prompts, its
    weighting by similarity in CLIP space, and where the weights stand; temperature, the way text and image embeddings
    combine, and the sharing of timesteps and noise are our choices, see [`DiffusionRPOConfig`].

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from peft import LoraConfig
    >>> from trl_diffusion import DiffusionRPOConfig, DiffusionRPOTrainer

    >>> trainer = DiffusionRPOTrainer(
    ...     model="stable-diffusion-v1-5/stable-diffusion-v1-5",
    ...     args=DiffusionRPOConfig(output_dir="sd15-rpo"),
    ...     train_dataset=load_dataset("my/preferences", split="train"),
    ...     peft_config=LoraConfig(r=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]),
    ... )
    >>> trainer.train()
    ```

    Args:
        embedder (`Callable`, *optional*):
            From a list of images and a list of prompts to an array or tensor of shape `(length, dim)`, instead of the
            CLIP of `args.embedding_model`. It is let go of when the data sets are embedded.
        **kwargs:
            Arguments of [`DiffusionTrainer`], with `args` a [`DiffusionRPOConfig`].
    """

    _name = "Diffusion-RPO"
    _tag_names = ["trl", "trl-diffusion", "diffusion-rpo", "text-to-image", "diffusers"]  # noqa: RUF012
    _paper = {  # noqa: RUF012
        "title": "Diffusion-RPO: Aligning Diffusion Models through Relative Preference Optimization",
        "id": "2406.06382",
        "citation": textwrap.dedent("""\
            @article{gu2024diffusionrpo,
                title   = {{Diffusion-RPO: Aligning Diffusion Models through Relative Preference Optimization}},
                author  = {Yi Gu and Zhendong Wang and Yueqin Yin and Yujia Xie and Mingyuan Zhou},
                year    = 2024,
                eprint  = {arXiv:2406.06382},
            }"""),
    }

    config_class = DiffusionRPOConfig
    columns = ("prompt", "chosen", "rejected")
    image_columns = ("chosen", "rejected")
    feature_columns = EMBEDDING_COLUMNS
    args: DiffusionRPOConfig

    def __init__(self, *args, embedder: Embedder | None = None, **kwargs):
        self._embedder, self._has_own_embedder, self._warned = embedder, embedder is not None, False
        super().__init__(*args, **kwargs)
        self._embedder = None

    # ---- Data -------------------------------------------------------------------------------------------------------

    def _prepare_dataset(self, dataset: AnyDataset, what: str, args: DiffusionRPOConfig) -> AnyDataset:
        dataset = declare_columns(dataset)
        check_paired(dataset, what, "DiffusionRPOTrainer")
        dataset = super()._prepare_dataset(dataset, what, args)
        embedded = sorted(set(EMBEDDING_COLUMNS) & set(dataset.column_names))
        if what.startswith("training"):
            self._has_own_embeddings = bool(embedded)
        if embedded:
            if self._embedder is not None:
                raise ValueError(f"Found an `embedder`, and the columns {embedded} in the {what}: drop one of them.")
            check_dataset(dataset, self.columns + EMBEDDING_COLUMNS, what)
            check_embeddings(dataset, what)
        elif not isinstance(dataset, Dataset):
            raise ValueError(
                f"The streaming {what} has no columns {list(EMBEDDING_COLUMNS)}, which cannot be computed ahead for a "
                "stream: store them with `trl_diffusion.data.embed_pairs`, or load the data set without streaming."
            )
        if isinstance(dataset, Dataset) and len(dataset) < 2:
            raise ValueError(
                f"The {what} has one pair, which makes no contrast set: expected at least 2, or `DiffusionDPOTrainer`."
            )
        return dataset

    def add_features(self, dataset: AnyDataset, args: DiffusionRPOConfig) -> AnyDataset:
        if set(EMBEDDING_COLUMNS) <= set(dataset.column_names):
            return dataset
        if not self._has_own_embedder:
            name = clip_fingerprint(args.embedding_model, args.embedding)
            return embed_pairs(dataset, CLIPEmbedder(args.embedding_model, args.embedding, args.device), name)
        if self._embedder is None:
            raise ValueError(
                f"The data set lacks the columns {list(EMBEDDING_COLUMNS)} and the `embedder` is gone: give the data "
                "set to the trainer's constructor, or embed it with `trl_diffusion.data.embed_pairs`."
            )
        return embed_pairs(dataset, self._embedder)

    def check_batch_size(self, args: DiffusionRPOConfig) -> None:
        if rows_per_window(args) < 2:
            raise ValueError(
                f"Found per_device_train_batch_size=1 with window={args.window!r} on {args.world_size} rank(s): a "
                "contrast set of one pair would be Diffusion-DPO; raise it to at least 2, or use "
                "`DiffusionDPOTrainer`."
            )

    def check_computed_once(self, args: DiffusionRPOConfig) -> None:
        if args.timestep_sharing == "window" and args.num_ref_draws is not None:
            raise ValueError(
                "`timestep_sharing='window'` gives a row another timestep in each window that it comes into, so that "
                f"it has no {args.num_ref_draws} draws that could come again: drop `num_ref_draws`, or set "
                "`timestep_sharing='pair'`."
            )

    def shared_draws(self, args: DiffusionRPOConfig) -> dict[str, Any]:
        return {"share_timestep": args.timestep_sharing == "window", "share_noise": args.noise_sharing == "pair"}

    # ---- Loss -------------------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        noised, ref_errors = self.frozen_side(model, inputs)
        errors = self.errors(model, noised)
        pairs = self.window_values(model, inputs, noised, ref_errors - errors)

        # The loss depends on the model through the log-ratios alone: one number per image is what ranks exchange, and
        # each micro-batch keeps the gradient through its own winners and its own losers.
        window, parts = self.over_window(pairs)
        losses, metrics = self.contrast(window)

        with torch.no_grad():
            by_noise = log_ratios_by_noise(ref_errors - errors, noised.noise_level, is_chosen(errors))
            self.record(metrics | image_metrics(errors, ref_errors, is_chosen(errors), self.args.beta) | by_noise)
        return self.window_mean(losses, parts).float()

    def window_values(self, model, inputs, noised: Noised, log_ratios: torch.Tensor) -> torch.Tensor:
        """Log-ratio of winner and loser, weight of the row, embedding of winner and loser: `(pairs, 3 + 2 x dim)`."""
        chosen, rejected = log_ratios.chunk(2)
        weight = inputs.get("weight", torch.ones_like(chosen))
        embeddings = [inputs[name] for name in EMBEDDING_COLUMNS]
        if embeddings[0].shape != embeddings[1].shape:  # a stream's, which could not be checked ahead
            raise ValueError(
                f"The embeddings of winners have {embeddings[0].shape[1]} numbers and those of losers "
                f"{embeddings[1].shape[1]}, expected the same."
            )
        return torch.cat([torch.stack([chosen, rejected, weight], dim=1), *embeddings], dim=1)

    def contrast(self, pairs: torch.Tensor) -> tuple[torch.Tensor, Metrics]:
        """
        One loss per winner of a contrast set, and what is logged of it.

        Args:
            pairs (`torch.Tensor` of shape `(pairs, 3 + 2 x dim)`): See [`window_values`].
        """
        # In float64, so that rows sum to 1 and the loss at step 0 is log 2 to the last digit.
        pairs = pairs.to(widest_float(pairs.device))
        # Only the log-ratios depend on the model.
        log_ratios, row_weights, embeddings = pairs[:, :2].T, pairs[:, 2].detach(), pairs[:, 3:].detach()
        weights = contrast_weights(
            *embeddings.chunk(2, dim=1), temperature=self.args.temperature, diagonal=self.args.diagonal
        )

        def losses(log_ratios: torch.Tensor) -> torch.Tensor:
            chosen, rejected = log_ratios
            return row_weights * rpo_loss(
                chosen, rejected, weights, beta=self.args.beta, weight_placement=self.args.weight_placement
            )

        margins = (log_ratios[0, :, None] - log_ratios[1, None, :]).detach()
        # Accuracies and margins are means over the weighted pairs.
        return losses(log_ratios), {
            "rewards/accuracies": ((weights * (margins > 0)).sum(1), None),
            "rewards/margins": ((weights * self.args.beta * margins).sum(1), None),
            "health/negative_margins": ((weights * (margins < 0)).sum(1), None),
            "health/gradient_factor": gradient_factor(losses, log_ratios),
            # The perplexity of a row: how many losers a winner is contrasted with, in effect.
            "contrast/effective_losers": (torch.special.entr(weights).sum(1).exp(), None),
            "contrast/diagonal_weight": (weights.diagonal(), None),
        }

    # ---- Metrics ----------------------------------------------------------------------------------------------------

    def training_metrics(self, means: dict[str, float]) -> dict[str, float]:
        share = means.get("contrast/diagonal_weight", 1.0)
        if (
            share < OWN_WEIGHT
            and self.args.diagonal == "include"
            and not self._warned
            and self.is_world_process_zero()
        ):
            self._warned = True
            warnings.warn(
                f"A winner's own loser has {share:.2g} of the weight on average in windows of {self.rows_per_window} "
                f"pairs, and the losers of other pairs outweigh it: set `diagonal=0.8`, which keeps its weight in a "
                "window of any size, lower `temperature`, or choose a smaller `window`.",
                stacklevel=2,
            )
        return super().training_metrics(means)

    def evaluation_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Contrast sets are cut from the evaluation set in its order, as large as in training."""
        numbers = torch.from_numpy(prediction.predictions)
        errors, ref_errors = numbers[:, :2], numbers[:, 2:4]
        pairs = torch.cat([ref_errors - errors, numbers[:, 4:5], numbers[:, 6:]], dim=1)
        # What is left over joins the last set.
        sets = pairs.tensor_split([i * self.rows_per_window for i in range(1, len(pairs) // self.rows_per_window)])
        losses, metrics = zip(*map(self.contrast, sets), strict=True)
        contrast: Metrics = {}
        for name in metrics[0]:
            values, masks = zip(*(part[name] for part in metrics), strict=True)
            contrast[name] = (torch.cat(values, -1), None if masks[0] is None else torch.cat(masks, -1))
        errors, ref_errors = errors.T.flatten(), ref_errors.T.flatten()
        images = image_metrics(errors, ref_errors, is_chosen(errors), self.args.beta)
        images |= log_ratios_by_noise(ref_errors - errors, numbers[:, 5].repeat(2), is_chosen(errors))
        return self.training_metrics({"loss": torch.cat(losses).mean().item(), **metric_means(contrast | images)})

    def card_settings(self) -> dict[str, object]:
        args = self.args
        return {
            "method": f"Diffusion-RPO, weights {args.weight_placement} of the log-sigmoid",
            "beta": f"{args.beta:g} on the difference of mean squared errors, with the factor 1/2",
            "contrast": f"temperature {args.temperature:g}, diagonal {args.diagonal}, over the {args.window}",
            "embedding": "columns of the data set"
            if self._has_own_embeddings
            else "the user's"
            if self._has_own_embedder
            else f"{args.embedding} of {code(public_name(args.embedding_model))}",
            "timestep shared by": f"the {args.timestep_sharing}",
            "noise shared by": f"{args.noise_sharing}",
        }
