"""
The frozen policy that the trained one is compared with: the adapter switched off, a frozen copy, or its errors alone,
computed beforehand.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import is_peft_model
from datasets import Dataset
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.utils.data import DataLoader, Sampler
from tqdm.auto import tqdm
from transformers import TrainerCallback

from . import engines
from .data.buckets import in_whole_batches
from .data.cache import built_once, own_share, read_parts, write_part
from .data.draws import ExampleKey
from .data.examples import Examples
from .data.formats import REF_ERRORS
from .data.samplers import Visits


class Reference:
    """
    The frozen reference.

    With an adapter the policy itself is the reference, adapter switched off: no second model in memory. In full
    fine-tuning it is a frozen copy, or the model that the user gave.

    Args:
        model (`nn.Module`):
            The policy before training, which no engine has yet: a denoiser, or a `PeftModel` around one.
        accelerator (`Accelerator`):
            It puts a frozen copy where it will put the policy: on the device, or in parts on all of them.
        ref_model (`nn.Module`, *optional*):
            A reference other than the policy's start.
        follow_mode (`bool`, *optional*, defaults to `False`):
            Whether a frozen copy is in training mode when the policy is. For models without dropout, where the mode
            should change nothing but changes the last digits of some (SDXL), and with them the exact start.
        copied (`bool`, *optional*, defaults to `True`):
            Whether a copy is made where one is needed. If not, the policy itself is the reference, which it is only
            until it is trained.
    """

    def __init__(
        self,
        model: nn.Module,
        accelerator: Accelerator,
        ref_model: nn.Module | None = None,
        follow_mode: bool = False,
        copied: bool = True,
    ):
        if ref_model is model:
            raise ValueError("`model` and `ref_model` are the same object: omit `ref_model` (a frozen copy is made).")
        if ref_model is None and not is_peft_model(model) and copied:
            ref_model = engines.frozen_copy(model, accelerator)
        self.model, self.accelerator, self.follow_mode = ref_model, accelerator, follow_mode
        # Found once: engines wrap modules and leave them what they are, and a search costs as much as a small layer.
        kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        self._adapter_layers = [module for module in model.modules() if isinstance(module, kinds)]
        if self.model is not None:
            self.model.requires_grad_(False).eval()
            # Errors that are computed once are computed by each rank at its own pace, which no engine allows.
            self.model = (
                engines.prepare_frozen(self.model, accelerator) if copied else self.model.to(accelerator.device)
            )

    def at_rest(self) -> nn.Module:
        """The frozen copy, as [`engines.at_rest`] gives it."""
        assert self.model is not None, "an adapter's reference is the policy"
        return engines.at_rest(self.model, self.accelerator)

    @contextmanager
    def policy(self, model: nn.Module) -> Iterator[nn.Module]:
        """
        The callable to send the reference's forward through, without gradient.

        Args:
            model (`nn.Module`): The policy as it is called in training (wrapped by DDP, compiled, ...): an adapter is
                switched off inside it, so that both forwards take the same path and agree to the last bit at step 0.
        """
        with torch.no_grad():
            if self.model is not None:
                if self.model.training != (self.follow_mode and model.training):
                    self.model.train(model.training)
                yield self.model
                return
            # Without an adapter the policy is the reference until it is trained: nothing to switch off.
            with self._adapter_off():
                yield model

    @contextmanager
    def _adapter_off(self) -> Iterator[None]:
        """
        As PEFT's `disable_adapter`, but without touching `requires_grad`.

        FSDP2 keeps of each parameter what it finds at its first forward, which is the reference's: with PEFT's version
        the adapter would get no gradient ever after.
        """
        for layer in self._adapter_layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in self._adapter_layers:
                layer._disable_adapters = False


class SyncReferenceCallback(TrainerCallback):
    """
    Lets the reference follow the policy: `reference = alpha * policy + (1 - alpha) * reference`, with
    `args.ref_model_mixup_alpha`, every `args.ref_model_sync_steps` optimizer steps, as TRL's `SyncRefModelCallback`.

    TRL's gathers both models whole under ZeRO-3, and under FSDP2 writes into shards that the next forward ignores.

    Args:
        trainer ([`DiffusionTrainer`]): The trainer.
    """

    def __init__(self, trainer):
        self.trainer = trainer

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % args.ref_model_sync_steps == 0:
            targets = engines.local_parts(self.trainer.reference.at_rest())
            sources = engines.local_parts(engines.at_rest(self.trainer.model_wrapped, self.trainer.accelerator))
            for target, source in zip(targets, sources, strict=True):
                target.lerp_(source, args.ref_model_mixup_alpha)


def precomputed_errors(
    name: str,
    examples: Examples,
    visits: Visits | None,
    errors_of: Callable[[dict[str, Any]], torch.Tensor],
    collate: Callable[[list], dict[str, Any]],
    batch_size: int,
    num_workers: int = 0,
) -> Dataset:
    """
    The reference's errors of the visits of a training, computed on first use by all ranks together, each its share of
    the visits. How many a row has differs: nothing is computed on which nothing is trained.

    Args:
        name (`str`): The name in the cache, see [`~data.cache.fingerprint`].
        examples ([`~data.examples.Examples`]): The data.
        visits ([`~data.samplers.Visits`], *optional*): The visits. None: the one of an evaluation to each row.
        errors_of (`Callable`): From a batch to the reference's errors, shape `(rows, images)`.
        collate (`Callable`): Makes the batch.
        batch_size (`int`):
            Rows of a batch. All batches are full, and on a CPU the errors are then, to the last bit, those of a
            training with batches of this size.
        num_workers (`int`, *optional*, defaults to `0`): Processes that read examples.

    Returns:
        `Dataset`: the column `ref_errors` of shape `(visits, images)`, row by row.
    """
    counts = np.ones(len(examples), np.int64) if visits is None else visits.counts
    starts = np.concatenate([[0], np.cumsum(counts)])

    def build(folder: Path) -> None:
        # Rows by the number of their visits, which may be many of a few: the work is equal, not the rows.
        share = own_share(int(starts[-1]))
        first, last = np.searchsorted(starts[:-1], [share.start, share.stop])
        last = len(counts) if share.stop == starts[-1] else last
        rows = np.repeat(np.arange(first, last), counts[first:last])
        begin = starts[first]

        def key_of(place: int) -> ExampleKey | int:
            row = int(rows[place])
            if visits is None:
                return row
            when = () if visits.windows is None else map(int, visits.windows[begin + place])
            return ExampleKey(row, int(begin + place - starts[row]), *when)

        # One bucket after the other; the last batch of each is filled up with what is computed twice.
        buckets = np.zeros(len(rows), int) if examples.buckets is None else examples.buckets[rows]
        order = in_whole_batches(buckets, batch_size)
        keys = _Lazy(order, key_of)
        loader = DataLoader(examples, batch_size, sampler=keys, collate_fn=collate, num_workers=num_workers)
        title = f"Reference errors of {starts[-1]} visits to {np.count_nonzero(counts)} rows"
        bar = tqdm(loader, title, disable=not PartialState().is_local_main_process)
        found = [errors_of(batch).cpu().numpy() for batch in bar]
        errors = np.empty((len(rows), found[0].shape[1] if found else 1), np.float32)
        if found:
            errors[order] = np.concatenate(found)
        inner = pa.ListArray.from_arrays(
            np.arange(0, errors.size + 1, errors.shape[1], dtype=np.int32), errors.reshape(-1)
        )
        ragged = pa.ListArray.from_arrays((starts[first : last + 1] - begin).astype(np.int32), inner)
        write_part({REF_ERRORS: ragged}, folder, "errors")

    return read_parts(built_once(f"reference-{name}", build), "errors")


class _Lazy(Sampler[ExampleKey | int]):
    """`function` of each of `places`; keys of many million visits would fill the memory."""

    def __init__(self, places: np.ndarray, function: Callable[[int], ExampleKey | int]):
        self.places, self.function = places, function

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[ExampleKey | int]:
        return map(self.function, self.places)
