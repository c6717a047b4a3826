"""What is logged: masked means over all ranks, and the measures that several methods share."""

from collections.abc import Callable

import torch


Metrics = dict[str, tuple[torch.Tensor, torch.Tensor | None]]
"""Values by name, each with the mask of the values that it is a mean of (None: of all)."""


def is_chosen(errors: torch.Tensor) -> torch.Tensor:
    """The mask of the chosen images of a batch of pairs: its first half."""
    return torch.arange(len(errors), device=errors.device) < len(errors) // 2


def image_metrics(errors: torch.Tensor, ref_errors: torch.Tensor, chosen: torch.Tensor, beta: float) -> Metrics:
    """What is logged of single images, apart for chosen (liked) and rejected ones; names as in TRL."""
    metrics: Metrics = {}
    for name, mask in (("chosen", chosen), ("rejected", ~chosen)):
        metrics[f"rewards/{name}"] = (beta * (ref_errors - errors), mask)
        metrics[f"logps/{name}"] = (-errors, mask)
        metrics[f"errors/{name}"] = (errors, mask)
        metrics[f"ref_errors/{name}"] = (ref_errors, mask)
    return metrics


def log_ratios_by_noise(log_ratios: torch.Tensor, noise_level: torch.Tensor, chosen: torch.Tensor) -> Metrics:
    """Log-ratios apart for the quarters of the noise range, `q1` with the least noise: where does the policy move?"""
    quarter = (4 * noise_level).long().clamp(max=3)
    return {
        f"log_ratios/q{i + 1}/{name}": (log_ratios, mask & (quarter == i))
        for i in range(4)
        for name, mask in (("chosen", chosen), ("rejected", ~chosen))
    }


def gradient_factor(
    losses: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    How steep a loss is at `x`, as a share of its slope at 0, where the training starts: 1 in the linear zone, 0 on the
    flat end of a sigmoid.

    Args:
        losses (`Callable`): From numbers of the shape of `x` to losses.
        x (`torch.Tensor`): Log-ratios.

    Returns:
        The shares, of the shape of `x`, and where they exist (a weight of 0 makes all slopes 0).
    """

    at = [x.detach().requires_grad_(), torch.zeros_like(x).requires_grad_()]
    with torch.enable_grad():
        now, start = (slope.abs() for slope in torch.autograd.grad([losses(y).sum() for y in at], at))
    return now / start, start > 0


def metric_means(metrics: Metrics) -> dict[str, float]:
    """Their means; a mean of nothing is left out."""
    kept = {name: values if where is None else values[where] for name, (values, where) in metrics.items()}
    return {name: values.float().mean().item() for name, values in kept.items() if values.numel()}


class MetricSums:
    """
    Sums and counts that stay on the device until they are logged.

    Means are taken over all images of all ranks and steps since the last log, in one collective and one
    synchronisation per log: a mean of the ranks' means would be wrong where the ranks hold unequal counts.
    """

    def __init__(self):
        # Sums and counts of metrics of one length, `(2, metrics)`, by their names.
        self._sums: dict[tuple[str, ...], torch.Tensor] = {}

    def add(self, metrics: Metrics) -> None:
        """Adds values, or those of them where their mask is True: few operations, however many metrics there are."""
        by_length: dict[int, list[str]] = {}
        for name, (values, _) in metrics.items():
            by_length.setdefault(values.numel(), []).append(name)
        for names in by_length.values():
            values = torch.stack([metrics[name][0].detach().float().reshape(-1) for name in names])
            everywhere = torch.ones_like(values[0], dtype=torch.bool)
            masks = [metrics[name][1] for name in names]
            where = torch.stack([everywhere if mask is None else mask.reshape(-1) for mask in masks])
            sums = torch.stack([torch.where(where, values, 0.0).sum(1), where.sum(1)])
            key = tuple(names)
            self._sums[key] = self._sums[key] + sums if key in self._sums else sums

    def pop_means(self, accelerator) -> dict[str, float]:
        """Means over all ranks, then starts anew. Every rank must call it, having added the same names."""
        if not self._sums:
            return {}
        # A name can be in several entries: a short last batch may be as long as a metric of one value.
        names = sorted({name for key in self._sums for name in key})
        sums = torch.zeros(2, len(names), device=next(iter(self._sums.values())).device)
        for key, values in self._sums.items():
            sums[:, [names.index(name) for name in key]] += values
        self._sums = {}
        means = accelerator.reduce(sums, reduction="sum").T.tolist()
        return {name: total / count for name, (total, count) in zip(names, means, strict=True) if count}
