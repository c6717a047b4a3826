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


def dpo_loss(
    chosen_log_ratios: torch.Tensor,
    rejected_log_ratios: torch.Tensor,
    *,
    beta: float,
    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """
    Diffusion-DPO: `-log sigmoid((beta / 2) * m)` with the margin `m = r_chosen - r_rejected`.

    The factor 1/2 is the authors': a `beta` here is half as strong as the same number in [`kto_loss`]. It belongs to
    the sigmoid; `"hinge"` and `"ipo"` are written as in their papers, without it.

    Args:
        chosen_log_ratios (`torch.Tensor` of shape `(pairs,)`):
            `r = e_ref - e_theta` of the chosen images, differences of mean squared errors.
        rejected_log_ratios (`torch.Tensor` of shape `(pairs,)`):
            The same of the rejected images, at the same timestep and noise.
        beta (`float`):
            Inverse temperature in units of 1 / (mean squared error). The paper uses 2000 for SD 1.5, 5000 for SDXL.
            Of `"ipo"` it sets the margin that is aimed at, `1 / (2 beta)`.
        loss_type (`str`, *optional*, defaults to `"sigmoid"`):
            `"sigmoid"`, `"hinge"`: `relu(1 - beta m)`, or `"ipo"`: `(m - 1 / (2 beta))^2`. At `m = 0` their slopes are
            `beta / 4`, `beta` and `1 / beta`.
        label_smoothing (`float`, *optional*, defaults to `0.0`):
            Probability that a pair is labelled the wrong way round, in [0, 0.5); for `"sigmoid"` only (cDPO).

    Returns:
        `torch.Tensor` of shape `(pairs,)`: one loss per pair.

    Raises:
        `ValueError`: if `beta` is not positive, `label_smoothing` is out of range or has no meaning for `loss_type`,
            or `loss_type` is unknown.

    Source: [Diffusion-DPO](https://huggingface.co/papers/2311.12908), equation 14; hinge from
    [SLiC](https://huggingface.co/papers/2305.10425), [IPO](https://huggingface.co/papers/2310.12036).
    """
    _check_beta(beta)
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"`label_smoothing` must be in [0, 0.5), found {label_smoothing}.")
    if label_smoothing and loss_type != "sigmoid":
        raise ValueError(f"`label_smoothing` belongs to `loss_type='sigmoid'`, found loss_type={loss_type!r}.")
    margins = chosen_log_ratios - rejected_log_ratios
    if loss_type == "hinge":
        return torch.relu(1 - beta * margins)
    if loss_type == "ipo":
        return (margins - 1 / (2 * beta)).square()
    if loss_type != "sigmoid":
        raise ValueError(f"Unknown loss_type {loss_type!r}: choose 'sigmoid', 'hinge' or 'ipo'.")
    x = beta / 2 * margins
    if not label_smoothing:
        return -F.logsigmoid(x)
    return -(1 - label_smoothing) * F.logsigmoid(x) - label_smoothing * F.logsigmoid(-x)


def rejected_gradient_scale(chosen_square: torch.Tensor, inner_product: torch.Tensor, *, mu: float) -> torch.Tensor:
    """
    Diffusion-SDPO: how much of the rejected images' gradient leaves the chosen images' error alone.

    With the gradients `g` of the errors with respect to the denoiser's answers, a step along `-(g_w - lambda g_l)`
    changes the chosen images' error by `-(|g_w|^2 - lambda g_w.g_l)` to first order, if the answers are taken for the
    parameters. `lambda = (1 - mu) |g_w|^2 / g_w.g_l`, held within [0, 1], leaves at least `mu |g_w|^2` of the fall;
    where the product is not positive the rejected images do no harm and `lambda` is 1.

    Args:
        chosen_square (`torch.Tensor` of shape `()`): `|g_w|^2`, over all pairs.
        inner_product (`torch.Tensor` of shape `()`): `g_w.g_l`, over all pairs.
        mu (`float`): Share of the fall that is kept, in [0, 1].

    Returns:
        `torch.Tensor` of shape `()`: `lambda`, in [0, 1].

    Raises:
        `ValueError`: if `mu` is out of range.

    Source: [Diffusion-SDPO](https://huggingface.co/papers/2511.03317).
    """
    if not 0 <= mu <= 1:
        raise ValueError(f"`mu` must be in [0, 1], found {mu}.")
    # The division is by a positive number only: no NaN of 0 / 0 in the branch that is not taken.
    aligned = inner_product > 0
    scale = (1 - mu) * chosen_square / torch.where(aligned, inner_product, 1.0)
    return torch.where(aligned, scale.clamp(max=1), 1.0)


def contrast_weights(
    chosen_embeddings: torch.Tensor,
    rejected_embeddings: torch.Tensor,
    *,
    temperature: float,
    diagonal: str | float = "include",
) -> torch.Tensor:
    """
    How much each chosen image is contrasted with each rejected one: `softmax_j(-(1 - cos(c_i, r_j)) / temperature)`.

    Args:
        chosen_embeddings (`torch.Tensor` of shape `(pairs, dim)`):
            Embeddings of (prompt, chosen image); their length does not matter.
        rejected_embeddings (`torch.Tensor` of shape `(pairs, dim)`):
            Embeddings of (prompt, rejected image), in the order of the pairs.
        temperature (`float`):
            In units of cosine distance. Towards 0 only the nearest rejected image counts, towards infinity all alike.
        diagonal (`str` or `float`, *optional*, defaults to `"include"`):
            What the rejected image of the winner's own pair weighs: `"include"` by its similarity like any other,
            `"exclude"` nothing, a number in (0, 1) exactly that, the others sharing the rest by similarity.

    Returns:
        `torch.Tensor` of shape `(pairs, pairs)`: a row per chosen image, which sums to 1.

    Raises:
        `ValueError`: if the shapes differ, `temperature` is not positive, `diagonal` is none of these, or one pair is
            given and its own loser shall not have all the weight.

    Source: [Diffusion-RPO](https://huggingface.co/papers/2406.06382); the distance and the softmax are those of its
    sister paper [RPO](https://huggingface.co/papers/2402.10958).
    """
    if chosen_embeddings.ndim != 2 or chosen_embeddings.shape != rejected_embeddings.shape:
        raise ValueError(
            "The embeddings must be two tensors of the same shape (pairs, dim), found "
            f"{tuple(chosen_embeddings.shape)} and {tuple(rejected_embeddings.shape)}."
        )
    if not temperature > 0:
        raise ValueError(f"`temperature` must be positive, found {temperature}.")
    check_diagonal(diagonal)
    pairs = len(chosen_embeddings)
    if pairs < 2 and diagonal != "include":
        raise ValueError(
            f"`diagonal={diagonal!r}` needs other pairs to contrast with, found {pairs} pair: give at least 2."
        )
    cosines = F.normalize(chosen_embeddings, dim=1) @ F.normalize(rejected_embeddings, dim=1).T
    logits = (cosines - 1) / temperature
    if diagonal == "include":
        return logits.softmax(dim=1)
    own = torch.eye(pairs, dtype=torch.bool, device=logits.device)
    others = logits.masked_fill(own, -torch.inf).softmax(dim=1)
    if isinstance(diagonal, str):
        return others
    return torch.where(own, diagonal, (1 - diagonal) * others)


def check_diagonal(diagonal: str | float) -> None:
    """Raises `ValueError` where [`contrast_weights`] would."""
    if diagonal not in ("include", "exclude") and (isinstance(diagonal, str) or not 0 < diagonal < 1):
        raise ValueError(f"`diagonal` must be 'include', 'exclude' or a number between 0 and 1, found {diagonal!r}.")


def rpo_loss(
    chosen_log_ratios: torch.Tensor,
    rejected_log_ratios: torch.Tensor,
    weights: torch.Tensor,
    *,
    beta: float,
    weight_placement: Literal["outside", "inside"] = "outside",
) -> torch.Tensor:
    """
    Diffusion-RPO: every chosen image against every rejected one, weighted by how related they are.

    Outside: `sum_j w_ij * -log sigmoid((beta / 2) * (r_i - r_j))`. With one pair, or all weight on the diagonal, this
    is [`dpo_loss`]. Inside: `mean_j -log sigmoid((beta / 2) * w_ij * (r_i - r_j))`, the sister paper's form for
    language models, whose gradient is smaller by about the number of pairs.

    Args:
        chosen_log_ratios (`torch.Tensor` of shape `(chosen,)`):
            `r = e_ref - e_theta` of the chosen images, differences of mean squared errors.
        rejected_log_ratios (`torch.Tensor` of shape `(rejected,)`):
            The same of the rejected images.
        weights (`torch.Tensor` of shape `(chosen, rejected)`):
            See [`contrast_weights`].
        beta (`float`):
            Inverse temperature in units of 1 / (mean squared error), with the factor 1/2 of [`dpo_loss`].
        weight_placement (`str`, *optional*, defaults to `"outside"`):
            Whether the weights stand `"outside"` or `"inside"` of the log-sigmoid.

    Returns:
        `torch.Tensor` of shape `(chosen,)`: one loss per chosen image.

    Raises:
        `ValueError`: if `beta` is not positive, `weights` has another shape, or `weight_placement` is unknown.

    Source: [Diffusion-RPO](https://huggingface.co/papers/2406.06382); inside from
    [RPO](https://huggingface.co/papers/2402.10958).
    """
    _check_beta(beta)
    expected = (len(chosen_log_ratios), len(rejected_log_ratios))
    if tuple(weights.shape) != expected:
        raise ValueError(
            f"`weights` must have the shape (chosen, rejected) = {expected}, found {tuple(weights.shape)}."
        )
    x = beta / 2 * (chosen_log_ratios[:, None] - rejected_log_ratios[None, :])
    if weight_placement == "outside":
        return (weights * -F.logsigmoid(x)).sum(dim=1)
    if weight_placement == "inside":
        return -F.logsigmoid(weights * x).mean(dim=1)
    raise ValueError(f"Unknown weight_placement {weight_placement!r}: choose 'outside' or 'inside'.")
