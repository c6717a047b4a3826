"""
Two trainings that make their steps in turns: what an option gains, on a machine that is not always equally fast.

Each is a process of its own, since two pools of threads in one hinder each other, and at any time one of them waits.
The steps are those of the trainers' own loops, and neighbours meet the same machine.
"""

import multiprocessing
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from transformers import TrainerCallback

from .measure import heading, summary, synchronize


class TurnCallback(TrainerCallback):
    """Looks at the clock after each step, and lets the other training make one."""

    def __init__(self, give_turn: Callable[[], None]):
        self.give_turn = give_turn
        self.seconds: list[float] = []
        self._since = 0.0

    def on_step_end(self, args, state, control, **kwargs):
        synchronize()
        self.seconds.append(time.perf_counter() - self._since)
        self.give_turn()
        self._since = time.perf_counter()


@dataclass
class Steps:
    """What came of one of the two: durations of steps, and losses of micro-batches."""

    summary: dict[str, Any]
    seconds: list[float]
    losses: list[float]


def _train(trainer, give_turn: Callable[[], None], warmup: int) -> Steps:
    clock, inner, losses = TurnCallback(give_turn), trainer.training_step, []

    def training_step(*args, **kwargs):
        losses.append(inner(*args, **kwargs))
        return losses[-1]

    trainer.training_step = training_step
    trainer.add_callback(clock)
    trainer.train()
    seconds = clock.seconds[warmup:]
    return Steps(summary(trainer, statistics.median(seconds)), seconds, torch.stack(losses).tolist())


def _other(make_trainer: Callable[[], Any], warmup: int, connection: Connection) -> None:
    """The second process."""

    def give_turn() -> None:
        connection.send(None)
        connection.recv()

    try:
        trainer = make_trainer()
        give_turn()
        connection.send(_train(trainer, give_turn, warmup))
    except (EOFError, BrokenPipeError):  # the first process is gone
        return
    except Exception:
        connection.send(traceback.format_exc())


def _received(connection: Connection) -> Any:
    try:
        message = connection.recv()
    except EOFError:
        raise RuntimeError("The training that this one is compared with was killed, for its memory perhaps.") from None
    if isinstance(message, str):
        raise RuntimeError(f"The training that this one is compared with broke off:\n{message}")
    return message


def compare(trainer, make_other: Callable[[], Any], warmup: int) -> dict[str, Any]:
    """
    Times two trainers step by step, in turns.

    Args:
        trainer ([`DiffusionTrainer`]): Not yet trained.
        make_other (`Callable`): Makes what it is compared with, of as many steps; called in a process of its own, for
            which it is pickled.
        warmup (`int`): First steps that are not measured.

    Returns:
        `dict`: `this` and `against`, each with what [`~bench.measure.summary`] says; `ratio`, the median over
        neighbouring steps of how many images per second `this` makes for one of `against`; and `loss_difference`, the
        largest between the losses of the same micro-batch, None where their numbers differ.

    Raises:
        `RuntimeError`: with the traceback of the other, if it breaks off; if it is killed.
    """
    spawn = multiprocessing.get_context("spawn")
    connection, far_end = spawn.Pipe()
    process = spawn.Process(target=_other, args=(make_other, warmup, far_end))
    process.start()
    far_end.close()  # so that the end of the process is noticed here

    def give_turn() -> None:
        connection.send(None)
        _received(connection)

    try:
        _received(connection)  # it is made
        this = _train(trainer, give_turn, warmup)
        connection.send(None)  # after its last step
        against = _received(connection)
    finally:
        connection.close()
        process.join()
    return ratios(this, against)


def ratios(this: Steps, against: Steps) -> dict[str, Any]:
    """What [`compare`] returns."""
    longer = statistics.median(b / a for a, b in zip(this.seconds, against.seconds, strict=True))
    difference = None
    if len(this.losses) == len(against.losses):
        difference = max(abs(a - b) for a, b in zip(this.losses, against.losses, strict=True))
    return {
        "this": this.summary,
        "against": against.summary,
        "ratio": longer * this.summary["images_per_step"] / against.summary["images_per_step"],
        "loss_difference": difference,
    }


def comparison_as_text(result: dict[str, Any], against: str) -> str:
    """What `trl-diffusion bench --against` prints."""
    this, other = result["this"], result["against"]
    lines = [f"this:    {heading(this)}", f"against: {heading(other)}; {against}"]
    for name, part in (("this", this), ("against", other)):
        lines.append(
            f"{name:<10}{1e3 * part['step_seconds']:12.1f} ms a step{part['images_per_second']:12.2f} images/s"
        )
    lines.append(f"images/s, this / against  {result['ratio']:.3f}")
    if result["loss_difference"] is not None:
        lines.append(f"losses differ by at most  {result['loss_difference']:.2g}")
    return "\n".join(lines)
