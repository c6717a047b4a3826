"""Preference losses as pure functions of log-ratios.

A log-ratio is `r = e_ref - e_theta`: the mean squared error of the frozen reference minus that of the policy, for one
image at one timestep and one noise, in float32. It is positive where the policy denoises the image better than the
reference does, and stands for `log pi_theta - log pi_ref` up to the factor `beta`.

Every loss returns one value per image (or per pair); averaging is the caller's.
"""

from typing import Literal

import torch
import torch.nn.functional as F


Utility = Literal["kahneman_tversky", "loss_averse", "risk_seeking"]


def _check_beta(beta: float) -> None:
    if not beta > 0:
        raise ValueError(f"`beta` must be positive, found {beta}.")


def _signs(log_ratios: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    if labels.dtype != torch.bool or labels.shape != log_ratios.shape:
        raise ValueError(
            f"`labels` must be a bool tensor of shape {tuple(log_ratios.shape)}, found {labels.dtype} of shape "
            f"{tuple(labels.shape)}: pass True for a liked image and False for a disliked one."
        )
    return torch.where(labels, 1.0, -1.0).to(log_ratios.dtype)


def kto_reference_point(log_ratio_sum: torch.Tensor, count: torch.Tensor | int) -> torch.Tensor:
    """
    The reference point `z = max(0, mean log-ratio)` of Diffusion-KTO, detached.

    Sum and count are separate so that they can be added up over ranks and micro-batches before the division: the mean
    of unequal means would be another number.

    Args:
        log_ratio_sum (`torch.Tensor` of shape `()`): Sum of the log-ratios of the window.
        count (`int` or `torch.Tensor` of shape `()`): Number of log-ratios in the sum.

    Returns:
        `torch.Tensor` of shape `()`, at least 0.

    Source: [Diffusion-KTO](https://huggingface.co/papers/2404.04465), the estimate of `Q_ref`.
    """
    return (log_ratio_sum.detach() / count).clamp(min=0)


def kto_loss(
    log_ratios: torch.Tensor,
    labels: torch.Tensor,
    *,
    beta: float,
    reference_point: torch.Tensor | float,
    utility: Utility = "kahneman_tversky",
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> torch.Tensor:
    """
    Diffusion-KTO: `lambda * (1 - U(s * beta * (r - z)))` with `s` = +1 for a liked and -1 for a disliked image.

    There is no factor 1/2: a `beta` here is twice as strong as the same number in [`dpo_loss`].

    Args:
        log_ratios (`torch.Tensor` of shape `(batch,)`):
            `r = e_ref - e_theta`, differences of mean squared errors.
        labels (`torch.BoolTensor` of shape `(batch,)`):
            True where the image is liked.
        beta (`float`):
            Inverse temperature in units of 1 / (mean squared error). The paper uses 5000.
        reference_point (`float` or `torch.Tensor` of shape `()`):
            `z`, see [`kto_reference_point`]. Detached here.
        utility (`str`, *optional*, defaults to `"kahneman_tversky"`):
            `"kahneman_tversky"` is `sigmoid(x)`, `"loss_averse"` is `log sigmoid(x)`, `"risk_seeking"` is
            `-log sigmoid(-x)`.
        desirable_weight (`float`, *optional*, defaults to `1.0`):
            Factor on the loss of liked images.
        undesirable_weight (`float`, *optional*, defaults to `1.0`):
            Factor on the loss of disliked images.

    Returns:
        `torch.Tensor` of shape `(batch,)`: one loss per image.

    Raises:
        `ValueError`: if `beta` is not positive, `labels` are not booleans of the same shape, or `utility` is unknown.

    Source: [Diffusion-KTO](https://huggingface.co/papers/2404.04465), equations 7 to 9.
    """
    _check_beta(beta)
    signs = _signs(log_ratios, labels)
    if isinstance(reference_point, torch.Tensor):
        reference_point = reference_point.detach()
    x = signs * beta * (log_ratios - reference_point)
    if utility == "kahneman_tversky":
        losses = 1 - torch.sigmoid(x)
    elif utility == "loss_averse":
        losses = 1 - F.logsigmoid(x)
    elif utility == "risk_seeking":
        losses = 1 + F.logsigmoid(-x)
    else:
        raise ValueError(f"Unknown utility {utility!r}: choose 'kahneman_tversky', 'loss_averse' or 'risk_seeking'.")
    return torch.where(labels, desirable_weight, undesirable_weight).to(losses.dtype) * losses


def apo_zero_unpaired_loss(
    log_ratios: torch.Tensor,
    labels: torch.Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> torch.Tensor:
    """
    APO-zero for unpaired feedback: [`kto_loss`] with the reference point fixed at 0.

    A liked image pays `1 - sigmoid(beta r)`, a disliked one `sigmoid(beta r)`. Nothing is averaged over the batch, so
    that a batch of one image is enough.

    Args:
        log_ratios (`torch.Tensor` of shape `(batch,)`): `r = e_ref - e_theta`.
        labels (`torch.BoolTensor` of shape `(batch,)`): True where the image is liked.
        beta (`float`): Inverse temperature in units of 1 / (mean squared error).
        desirable_weight (`float`, *optional*, defaults to `1.0`): Factor on the loss of liked images.
        undesirable_weight (`float`, *optional*, defaults to `1.0`): Factor on the loss of disliked images.

    Returns:
        `torch.Tensor` of shape `(batch,)`: one loss per image.

    Raises:
        `ValueError`: if `beta` is not positive or `labels` are not booleans of the same shape.

    Source: [Anchored Preference Optimization](https://huggingface.co/papers/2408.06266).
    """
    return kto_loss(
        log_ratios,
        labels,
        beta=beta,
        reference_point=0.0,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )
