"""From rows to training examples: pixels, prompt, label, and the example's own random numbers."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch.nn.utils.rnn import pad_sequence
from torch.utils import data as torch_data

from .draws import EVALUATION, Draws, ExampleKey
from .features import LATENTS, PROMPT_INDEX, PromptTable, plain_row, read_latents
from .formats import EMBEDDING_COLUMNS, REF_ERRORS, check_row
from .images import ImageTransform, read_image


@dataclass(frozen=True)
class ExampleBuilder:
    """
    Turns a row and its key into an example.

    The images of one row (the two of a pair) share timestep, crop, flip and prompt dropout, and by default the noise,
    as in Diffusion-DPO.

    Args:
        columns (`list[str]`): Columns to read.
        image_columns (`tuple[str, ...]`): Those of them that hold images, in the order of the example's pixels.
        transform ([`ImageTransform`]): Applied to each image.
        latent_shape (`tuple[int, ...]`): Shape of one noise sample, e.g. `(4, 64, 64)`.
        proportion_empty_prompts (`float`): Probability that a training example loses its prompt.
        seed (`int`): Seed of the draws.
        share_noise (`bool`, *optional*, defaults to `True`): Whether the images of one row share the noise.
        share_timestep (`bool`, *optional*, defaults to `False`): Whether the rows of one window share the timestep.
        sizes (`str`, *optional*):
            Adds what SDXL is told of each image, see [`ImageTransform.with_sizes`]: `"real"`, or, with `"fixed"`, that
            of an image which was never resized nor cropped.
        num_ref_draws (`int`, *optional*):
            How many different draws an example has: visit `v` takes draw `v % num_ref_draws`. None: each visit has its
            own.
        prompts ([`~data.features.PromptTable`], *optional*):
            What prompts were encoded to, for rows that hold features in the place of images and prompts.
    """

    columns: list[str]
    image_columns: tuple[str, ...]
    transform: ImageTransform
    latent_shape: tuple[int, ...]
    proportion_empty_prompts: float
    seed: int
    share_noise: bool = True
    share_timestep: bool = False
    sizes: Literal["real", "fixed"] | None = None
    num_ref_draws: int | None = None
    prompts: PromptTable | None = None

    def __call__(self, row: Mapping[str, Any], key: ExampleKey) -> dict[str, Any]:
        training = key.visit != EVALUATION
        if self.num_ref_draws is not None and training:
            key = key._replace(visit=key.visit % self.num_ref_draws)
        draws = Draws(self.seed, key)
        drop_prompt = training and draws.uniform("prompt") < self.proportion_empty_prompts
        images = len(self.image_columns)
        look = self._look if self.prompts is None else self._look_up
        example = look(row, draws, drop_prompt) | {
            "posterior_noise": draws.normal("posterior", (images, *self.latent_shape)),
            "noise": draws.normal("noise", (1 if self.share_noise else images, *self.latent_shape)),
            "timestep": (draws.of_window() if self.share_timestep else draws).uniform("timestep"),
        }
        if self.sizes == "fixed":
            height, width = self.transform.height, self.transform.width
            example["sizes"] = torch.tensor(images * [[height, width, 0, 0, height, width]])
        elif self.sizes is None:
            del example["sizes"]
        if REF_ERRORS in self.columns:
            errors = row[REF_ERRORS][key.visit if training else 0 :][:1]
            # None for what a loader fetches ahead of the last step, on which nothing is trained.
            example[REF_ERRORS] = torch.tensor(errors[0] if len(errors) else [torch.nan] * images)
        example |= {name: row[name] for name in ("label", "weight") if name in self.columns}
        # Numpy reads a long list several times as fast as torch does.
        embeddings = {name: np.array(row[name], np.float32) for name in EMBEDDING_COLUMNS if name in self.columns}
        return example | {name: torch.from_numpy(embedding) for name, embedding in embeddings.items()}

    def _look(self, row: Mapping[str, Any], draws: Draws, drop_prompt: bool) -> dict[str, Any]:
        pixels, sizes = zip(*[self.transform.with_sizes(row[name], draws) for name in self.image_columns], strict=True)
        return {
            "pixel_values": torch.stack(pixels),
            "sizes": torch.tensor(sizes),
            "prompt": "" if drop_prompt else row["prompt"],
        }

    def _look_up(self, row: Mapping[str, Any], draws: Draws, drop_prompt: bool) -> dict[str, Any]:
        """The same from computed features."""
        assert self.prompts is not None
        features = read_latents(row[LATENTS], self.transform.flips(draws))
        return features | {"conditioning": self.prompts[0 if drop_prompt else row[PROMPT_INDEX]]}


def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """
    Stacks examples into a batch; prompts stay a list of strings.

    Keys and shapes: `pixel_values` `(batch, images, 3, height, width)` in [-1, 1], or, of features, `latent_mean` and
    `latent_std` `(batch, images, *latent)` and `conditioning`, a `dict` of tensors, shorter prompts padded with zeros;
    `posterior_noise` `(batch, images, *latent)` and `noise` `(batch, 1 or images, *latent)`, standard normal;
    `timestep` `(batch,)`, float64 in [0, 1); `sizes` `(batch, images, 6)`, int64; `label` `(batch,)`, bool; `weight`
    `(batch,)`, float32; `chosen_embedding` and `rejected_embedding` `(batch, dim)`; `ref_errors` `(batch, images)`;
    `prompt`, a list of `batch` strings.
    """
    batch: dict[str, Any] = {}
    for name, first in examples[0].items():
        values = [example[name] for example in examples]
        if isinstance(first, torch.Tensor):
            batch[name] = torch.stack(values)
        elif isinstance(first, dict):
            batch[name] = {key: pad_sequence([value[key] for value in values], batch_first=True) for key in first}
        elif isinstance(first, bool):
            batch[name] = torch.tensor(values, dtype=torch.bool)
        elif isinstance(first, float):
            batch[name] = torch.tensor(values, dtype=torch.float64 if name == "timestep" else torch.float32)
        else:
            batch[name] = values
    return batch


class Examples(torch_data.Dataset):
    """
    A data set by [`ExampleKey`]; a plain place in it gives the fixed draws of evaluation.

    Args:
        dataset (`Dataset`): The rows.
        builders (`list[ExampleBuilder]`): One for each bucket.
        rows_per_window (`int`, *optional*, defaults to `1`): How many consecutive rows share a window.
        buckets (`np.ndarray` of shape `(len(dataset),)`, *optional*): The number of each row's bucket.
        order (`np.ndarray`, *optional*): The rows at the plain places; an example then has its number as `row`.
    """

    def __init__(
        self,
        dataset: Dataset,
        builders: list[ExampleBuilder],
        rows_per_window: int = 1,
        buckets: np.ndarray | None = None,
        order: np.ndarray | None = None,
    ):
        self.rows, self.builders = dataset.select_columns(builders[0].columns), builders
        self.has_features = builders[0].prompts is not None
        if self.has_features:
            self.rows = self.rows.with_format("arrow")
        self.rows_per_window, self.buckets, self.order = rows_per_window, buckets, order

    def __len__(self) -> int:
        return len(self.rows if self.order is None else self.order)

    def __getitem__(self, key: ExampleKey | int) -> dict[str, Any]:
        if not isinstance(key, ExampleKey):
            row = key if self.order is None else int(self.order[key])
            key = ExampleKey(row, window=row // self.rows_per_window)
        builder = self.builders[0 if self.buckets is None else self.buckets[key.row]]
        if self.has_features:
            example = builder(plain_row(self.rows[key.row]), key)
        else:
            example = read_image(key.row, lambda: builder(self.rows[key.row], key))
        return example if self.order is None else example | {"row": torch.tensor(key.row)}


class StreamingExamples(torch_data.IterableDataset):
    """
    A stream; the key of a row is its place in the stream.

    Every rank reads the whole stream and takes its share of the rows (accelerate's `IterableDatasetShard`), so that
    places are global and a resumed run can skip to where it was. Rows of weight 0 are left out.

    Args:
        dataset (`IterableDataset`): The rows.
        builder (`ExampleBuilder`): Makes the examples.
        training (`bool`): Whether the draws are those of the epoch, or the fixed ones of evaluation.
        rows_per_window (`int`, *optional*, defaults to `1`): How many consecutive rows share a window.
        multiple_of (`int`, *optional*, defaults to `1`):
            The rows are filled up to a multiple of this number with rows of a second pass, and their own noise, as
            [`KeyedSampler`] does.
        drop_last (`bool`, *optional*, defaults to `False`): Whether to leave out what fills no such multiple instead.
    """

    def __init__(
        self,
        dataset: IterableDataset,
        builder: ExampleBuilder,
        training: bool,
        rows_per_window: int = 1,
        multiple_of: int = 1,
        drop_last: bool = False,
    ):
        self.rows, self.builder, self.training, self.epoch = dataset, builder, training, 0
        self.rows_per_window, self.multiple_of, self.drop_last = rows_per_window, multiple_of, drop_last

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if not self.drop_last:
            yield from self._examples()
            return
        # A multiple is held until it is full: where a stream ends is not known before.
        held, full = [], False
        for example in self._examples():
            held.append(example)
            if len(held) == self.multiple_of:
                yield from held
                held, full = [], True
        if not full:
            raise ValueError(
                f"Found {len(held)} training rows in the stream, fewer than the {self.multiple_of} of one optimizer "
                "step, and `dataloader_drop_last=True`: set it to False or make the step smaller."
            )

    def _examples(self) -> Iterator[dict[str, Any]]:
        epoch = self.epoch if self.training else EVALUATION
        place, filling = 0, False
        while not filling or place % self.multiple_of:
            before = place
            for index, row in self._checked_rows():
                if row.get("weight") == 0:
                    continue
                # One visit an epoch: a row that comes again does so at another place.
                key = ExampleKey(place, epoch, epoch, place // self.rows_per_window)
                yield read_image(index, partial(self.builder, row, key))
                place += 1
                if filling and place % self.multiple_of == 0:
                    return
            if place == 0:
                raise ValueError(
                    "Found no row in the stream, or none with a `weight` above 0: expected at least one; look at its "
                    "files, filters and weights."
                )
            if place == before or self.drop_last:
                return
            filling = True

    def _checked_rows(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        rows = iter(self.rows.select_columns(self.builder.columns))
        for index in count():
            row = read_image(index, lambda: next(rows, None))
            if row is None:
                return
            check_row(row, self.builder.columns, index)
            yield index, row
