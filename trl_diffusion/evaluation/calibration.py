"""Which beta? How far a few steps without saturation move the log-ratios, and what other code bases mean by theirs."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from transformers import EvalPrediction


LINEAR_BETA = 1.0
"""Small enough that log-ratios, which are far below 1, stay in the linear zone of every loss."""

FACTORS = {
    "diffusion_dpo": 0.5,
    "diffusers_sd": 1.0,
    "diffusers_sdxl": 0.5,
    "diffusion_kto": 1.0,
    "flow_dpo": 0.5,
    "simpletuner": 0.5,
    "dpo": 0.5,
    "rpo": 0.5,
    "kto": 1.0,
}
"""The factor between a `beta` and the squared errors inside the sigmoid: the Diffusion-DPO authors' code, diffusers'
two example scripts, the Diffusion-KTO authors' code and paper, DPO in the code bases of the GRPO family for flow
models, SimpleTuner's `flow_dpo`, and the trainers here. SimpleTuner sums the squared errors over the latent
dimensions; all others take their mean."""
SUMS = ("simpletuner",)


def convert_beta(beta: float, source: str, target: str, *, latent_elements: int | None = None) -> float:
    """
    The `beta` with which another code base has the same number inside the sigmoid for the same errors.

    The sigmoid then saturates at the same log-ratios. The slope of the loss is the same between methods with the same
    loss; KTO's `1 - sigmoid(x)` starts with half the slope of DPO's `-log sigmoid(x)` at the same `x`.

    Args:
        beta (`float`): The number there.
        source (`str`): The code base it comes from, one of [`FACTORS`].
        target (`str`): The code base where it will be used, likewise.
        latent_elements (`int`, *optional*):
            Channels x height x width of a latent image; for `"simpletuner"` only, which sums where others average.
            SimpleTuner's number is fixed with `auto_beta=False` only, which is not its default.

    Returns:
        `float`.

    Raises:
        `ValueError`: if a name is unknown, `beta` is not positive, or `latent_elements` is missing or has no use.
    """
    for name in (source, target):
        if name not in FACTORS:
            raise ValueError(f"Found no code base {name!r}, expected one of {sorted(FACTORS)}.")
    if not 0 < beta < math.inf:
        raise ValueError(f"`beta` must be positive and finite, found {beta}.")
    sums = [name for name in (source, target) if name in SUMS]
    if bool(sums) != (latent_elements is not None):
        raise ValueError(
            f"Found latent_elements={latent_elements} from {source!r} to {target!r}, expected it with one of "
            f"{list(SUMS)} and only there: 4 x 64 x 64 = 16384 for SD 1.5 at 512 pixels."
        )
    if latent_elements is not None and latent_elements < 1:
        raise ValueError(f"`latent_elements` must be at least 1, found {latent_elements}.")

    def strength(name: str) -> float:
        return FACTORS[name] * (latent_elements or 1 if name in SUMS else 1)

    return beta * strength(source) / strength(target)


class Calibration(NamedTuple):
    """What [`calibrate_beta`] finds."""

    steps: int
    rows: int
    scale: float
    """Root mean square of the log-ratios `e_ref - e_theta`, in units of the mean squared error."""
    chosen: float
    """Mean log-ratio of the chosen (liked) images."""
    rejected: float
    """Mean log-ratio of the rejected (disliked) images."""
    factors: dict[float, float]
    """Mean gradient factor by beta."""
    beta: float | None
    """The one of the wanted gradient factor; None if there is none."""


def calibrate_beta(trainer, *, gradient_factor: float = 0.5, betas: tuple[float, ...] = ()) -> Calibration:
    """
    Trains `trainer.args.max_steps` steps in the linear zone of the loss, and finds the beta whose loss would by then
    have a given share of its first slope.

    The steps are the trainer's own at a `beta` of 1, where the sigmoid does not saturate. Adam divides a gradient by
    its size, so that larger betas take nearly the same steps until they saturate. Nearly: gradient clipping
    (`max_grad_norm`) and Adam's `eps` see the scale of the loss. Ten steps of DPO on examples/emoji moved the
    log-ratios by 0.213 (root mean square), and by 0.205 with the loss multiplied by 200 or 5000; without clipping by
    0.213 at all three scales. Take the result as an estimate.

    The log-ratios are those of `trainer.predict` on the training data with the fixed noise of evaluation, and the
    gradient factors are the metric `health/gradient_factor` that the trainer computes from them.

    Args:
        trainer ([`DiffusionTrainer`]):
            An untrained one with few rows, whose method has a `beta`. Not to be used afterwards.
        gradient_factor (`float`, *optional*, defaults to `0.5`):
            The wanted mean slope, as a share of that at the start, in (0, 1).
        betas (`tuple[float, ...]`, *optional*):
            Further ones whose gradient factor is asked for.

    Returns:
        [`Calibration`].

    Raises:
        `ValueError`: if the method has no reference, `gradient_factor` is out of range, or the steps change nothing.
    """
    if trainer.args.precompute_ref_log_probs:
        raise ValueError(
            "The reference is gone with `precompute_ref_log_probs=True`, and it was asked for the draws of a training "
            "only: make a trainer with `precompute_ref_log_probs=False`."
        )
    if trainer.reference is None:
        raise ValueError(f"`{type(trainer).__name__}` has no beta: calibrate that of KTO, RPO or DPO.")
    if not 0 < gradient_factor < 1:
        raise ValueError(f"`gradient_factor` must be between 0 and 1, found {gradient_factor}.")
    trainer.args.beta = LINEAR_BETA
    trainer.train()
    output = trainer.predict(trainer.train_dataset)

    images = len(trainer.image_columns)
    log_ratios = (output.predictions[:, images : 2 * images] - output.predictions[:, :images]).astype(np.float64)
    if not log_ratios.any():
        raise ValueError(
            f"The log-ratios are all 0 after {trainer.state.global_step} steps: raise `learning_rate` or `max_steps`."
        )
    scale = float(np.sqrt(np.square(log_ratios).mean()))
    if images == 2:
        chosen, rejected = log_ratios.T
    else:
        liked = output.label_ids.astype(bool)
        chosen, rejected = log_ratios[liked, 0], log_ratios[~liked, 0]

    def factor(beta: float) -> float:
        trainer.args.beta = beta
        prediction = EvalPrediction(predictions=output.predictions, label_ids=output.label_ids)
        return trainer.evaluation_metrics(prediction)["health/gradient_factor"]

    found = find_beta(factor, gradient_factor, scale)
    asked = sorted({*betas, *(10.0**k for k in range(1, 5)), *([] if found is None else [found])})
    return Calibration(
        steps=trainer.state.global_step,
        rows=len(log_ratios),
        scale=scale,
        chosen=float(chosen.mean()),
        rejected=float(rejected.mean()),
        factors={beta: factor(beta) for beta in asked},
        beta=found,
    )


def find_beta(factor: Callable[[float], float], target: float, scale: float) -> float | None:
    """
    The least beta at which `factor` has fallen to `target`.

    Args:
        factor (`Callable`): From a beta to the mean gradient factor; 1 in the limit of a beta of 0.
        target (`float`): Wanted value, in (0, 1).
        scale (`float`): Size of the log-ratios, in whose inverse the search begins.

    Returns:
        `float`, or None where `factor` never falls so far: where too many pairs are on the wrong side, on which the
        slope grows instead.
    """
    below = None
    for exponent in np.arange(-3, 4, 0.1):
        beta = float(10**exponent / scale)
        if factor(beta) > target:
            below = beta
            continue
        if below is None:
            return None
        above = beta
        for _ in range(40):
            middle = math.sqrt(below * above)
            below, above = (middle, above) if factor(middle) > target else (below, middle)
        return above
    return None
