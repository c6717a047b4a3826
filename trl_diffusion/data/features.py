"""What the frozen encoders say of a data set, computed once: latents of all images, embeddings of all prompts.

Of latents the posterior's mean and standard deviation are kept, so that a draw from it is still one; of prompts each
different one, and the empty one. Both are blobs in the safetensors format, one per row, in memory-mapped Arrow files.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import pyarrow as pa
import torch
import transformers
import xxhash
from accelerate import PartialState
from datasets import Dataset, concatenate_datasets
from safetensors.torch import load, save
from torch.utils import data as torch_data
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from tqdm.auto import tqdm

from .cache import built_once, cache_root, fingerprint, own_share, part_file, read_parts, write_part
from .draws import Draws, ExampleKey
from .images import ImageTransform, read_image


if TYPE_CHECKING:
    from ..families import Family


LATENTS, PROMPT_INDEX = "latents", "prompt_index"
"""The columns of a data set with features, in the place of its images and its prompt."""

# The version of what is written here; a change makes old caches be computed anew.
_FORMAT = 1


@dataclass(frozen=True)
class PromptTable:
    """Conditioning by the number of a prompt; 0 is the empty prompt. `blobs` are in the format "arrow"."""

    blobs: Dataset
    dtypes: dict[str, torch.dtype]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        blob = plain_row(self.blobs[index])["prompt"]
        return {name: tensor.to(self.dtypes[name]) for name, tensor in load(blob).items()}


def plain_row(table: pa.Table) -> dict[str, Any]:
    """
    The row of a table of features, in which nothing is to be decoded: lists of numbers as arrays, the rest as Python
    has it. In a fraction of the time that `datasets` takes for long lists.
    """
    values = {name: column[0] for name, column in zip(table.column_names, table.columns, strict=True)}
    return {
        name: value.values.to_numpy(zero_copy_only=False) if isinstance(value, pa.ListScalar) else value.as_py()
        for name, value in values.items()
    }


def read_latents(blob: bytes, flip: bool) -> dict[str, torch.Tensor]:
    """Mean and standard deviation (where there is one), float32 `(images, *latent)`, and sizes `(images, 6)`."""
    found = {name: tensor[int(flip)] for name, tensor in load(blob).items()}
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in found.items()}


def modules_fingerprint(modules: Mapping[str, torch.nn.Module]) -> str:
    """Changes with any weight, wherever the modules were loaded from."""
    digest = xxhash.xxh3_128()
    for part, module in sorted(modules.items()):
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{part}.{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            for plain in plain_tensors(tensor):
                # As bytes, because numpy knows no bfloat16.
                digest.update(plain.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def plain_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """What a tensor subclass, such as torchao's quantized weights, is made of; a plain tensor itself."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from plain_tensors(getattr(tensor, name))


def encoders_fingerprint(encoders: "Family") -> str:
    """Changes when the encoders, their tokenizers or the libraries that run them change."""
    settings: dict[str, Any] = {}
    for name, component in encoders.pipeline.components.items():
        if name in encoders.frozen_modules:
            config = component.config if isinstance(component.config, dict) else component.config.to_dict()
            # Names with an underscore are of the file, and diffusers' list of defaults is in no order.
            settings[name] = sorted((key, str(value)) for key, value in config.items() if not key.startswith("_"))
            continue
        # FLUX.2's tokenizer is inside of a processor.
        component = component.tokenizer if isinstance(component, transformers.ProcessorMixin) else component
        if isinstance(component, transformers.PreTrainedTokenizerBase):
            vocabulary = sorted(component.get_vocab().items())
            settings[name] = [vocabulary, component.model_max_length, component.padding_side]
    own = {name: value for name, value in encoders.pipeline.config.items() if isinstance(value, bool | int | float)}
    versions = [_FORMAT, diffusers.__version__, transformers.__version__]
    return fingerprint(modules_fingerprint(encoders.frozen_modules), settings, own, versions)


class _Images(torch_data.Dataset):
    """Pixels of all images of a row, as they are and, where flipping is on, mirrored; and their sizes."""

    def __init__(
        self,
        dataset: Dataset,
        image_columns: tuple[str, ...],
        transforms: list[ImageTransform],
        buckets: np.ndarray | None,
    ):
        self.rows, self.transforms, self.buckets = dataset.select_columns(list(image_columns)), transforms, buckets
        self.flips = (False, True) if transforms[0].random_flip else (False,)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return read_image(index, lambda: self._look(index))

    def _look(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        row, draws = self.rows[index], Draws(0, ExampleKey(index))  # nothing here is drawn
        transform = self.transforms[0 if self.buckets is None else self.buckets[index]]
        seen = [transform.with_sizes(image, draws, flip) for flip in self.flips for image in row.values()]
        pixels, sizes = zip(*seen, strict=True)
        shape = (len(self.flips), len(row))
        return torch.stack(pixels).unflatten(0, shape), torch.tensor(sizes).unflatten(0, shape)


@dataclass(frozen=True)
class FeatureCache:
    """
    Makes features of data sets.

    Args:
        encoders ([`~families.Family`]): VAE and text encoders.
        encoders_name (`str`): Their [`encoders_fingerprint`].
        image_columns (`tuple[str, ...]`): The columns with images.
        transforms (`list[ImageTransform]`):
            What is done to the images of each bucket, nothing of it at random but the flip.
        device (`torch.device`): Where to compute.
        context (`Callable`): Gives the autocast of the training.
        precision (`str`): The name of it.
        dtype (`torch.dtype`, *optional*): How floating point numbers are kept. Defaults to the dtype they come in.
        batch_size (`int`, *optional*, defaults to `8`): Rows per call of an encoder.
        num_workers (`int`, *optional*, defaults to `0`): Processes that decode images.
    """

    encoders: "Family"
    encoders_name: str
    image_columns: tuple[str, ...]
    transforms: list[ImageTransform]
    device: torch.device
    context: Callable[[], AbstractContextManager]
    precision: str
    dtype: torch.dtype | None = None
    batch_size: int = 8
    num_workers: int = 0

    def __call__(self, source: Dataset, buckets: np.ndarray | None = None) -> tuple[Dataset, PromptTable]:
        """
        The columns [`LATENTS`] and [`PROMPT_INDEX`] for a data set of a prompt and images, and what the latter points
        to. Computed on first use, by all ranks together, each its share. `buckets` has the number of each row's.

        Raises:
            `ValueError`: if an image cannot be read, or the disk has no room.
        """
        name = fingerprint(source, self.encoders_name, repr(self.transforms), self.precision, str(self.dtype))
        folder = built_once(f"features-{name}", lambda folder: self._build(source, buckets, folder))
        dtypes = json.loads((folder / "dtypes.json").read_text())
        blobs = read_parts(folder, "prompts").with_format("arrow")
        table = PromptTable(blobs, {k: getattr(torch, v) for k, v in dtypes.items()})
        return concatenate_datasets([read_parts(folder, "index"), read_parts(folder, "latents")], axis=1), table

    def _build(self, source: Dataset, buckets: np.ndarray | None, folder: Path) -> None:
        for module in self.encoders.frozen_modules.values():
            module.requires_grad_(False).eval().to(self.device)
        images = _Images(source, self.image_columns, self.transforms, buckets)
        prompts, index = _unique_prompts(source)
        with torch.no_grad(), self.context():
            # The longest prompt and the first images stand for all.
            (a_prompt,) = self._encode_prompts([max(prompts, key=len)])
            (an_image,) = self._encode_images([images[0]])
            size = len(prompts) * len(save(self._kept(a_prompt))) + len(source) * len(an_image)
            _check_room(size, len(source), folder)
            title = f"Features, about {size / 2**30:.2g} GiB"

            share = own_share(len(prompts))
            batches = (prompts[i : min(i + self.batch_size, share.stop)] for i in share[:: self.batch_size])
            blobs = (save(self._kept(row)) for batch in batches for row in self._encode_prompts(batch))
            _write(blobs, part_file(folder, "prompts"), "prompt", len(share), f"{title}: prompts")

            share = own_share(len(source))
            loader = torch_data.DataLoader(
                torch_data.Subset(images, share), self.batch_size, num_workers=self.num_workers, collate_fn=list
            )
            blobs = (blob for batch in loader for blob in self._encode_images(batch))
            _write(blobs, part_file(folder, "latents"), LATENTS, len(share), f"{title}: images")
        if PartialState().is_main_process:
            write_part({PROMPT_INDEX: index}, folder, "index")
            dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in a_prompt.items()}
            (folder / "dtypes.json").write_text(json.dumps(dtypes) + "\n")

    def _kept(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """As they are written: on the CPU, without the tensors that they are views of, and in `dtype`."""
        kept = {}
        for name, tensor in tensors.items():
            dtype = self.dtype if tensor.is_floating_point() else None
            kept[name] = tensor.to(device="cpu", dtype=dtype, copy=True, memory_format=torch.contiguous_format)
        return kept

    def _encode_prompts(self, prompts: list[str]) -> list[dict[str, torch.Tensor]]:
        return self.encoders.separate(self.encoders.encode_prompts(prompts, self.device))

    def _encode_images(self, batch: list[tuple[torch.Tensor, torch.Tensor]]) -> list[bytes]:
        blobs = [b""] * len(batch)
        for shape in {pixels.shape for pixels, _ in batch}:  # (flips, images, 3, height, width), one of each bucket
            places = [i for i, (pixels, _) in enumerate(batch) if pixels.shape == shape]
            pixels = torch.stack([batch[i][0] for i in places]).flatten(0, 2)
            posterior = self.encoders.encode_images(pixels.to(self.device))
            parts = {"latent_mean": posterior.mean.unflatten(0, (len(places), *shape[:2]))}
            if posterior.std is not None:
                parts["latent_std"] = posterior.std.unflatten(0, (len(places), *shape[:2]))
            for k, i in enumerate(places):
                row = {name: part[k] for name, part in parts.items()}
                blobs[i] = save(self._kept(row | {"sizes": batch[i][1]}))
        return blobs


def _unique_prompts(rows: Dataset) -> tuple[list[str], np.ndarray]:
    """The empty prompt and all others, each once; and of each row the number of its own."""
    numbers = {"": 0}
    index = np.empty(len(rows), np.int64)
    table = rows.select_columns(["prompt"]).with_format("arrow")
    for start in range(0, len(rows), 10_000):
        prompts = table[start : start + 10_000]["prompt"].to_pylist()
        index[start : start + len(prompts)] = [numbers.setdefault(prompt, len(numbers)) for prompt in prompts]
    return list(numbers), index


def _check_room(size: int, rows: int, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise ValueError(
            f"The features of {rows} rows take about {size / 2**30:.3g} GiB, found {free / 2**30:.3g} GiB free in "
            f"{cache_root()}: make room, set HF_DATASETS_CACHE to a larger disk, set `features_dtype='bfloat16'`, or "
            "set `cache_features=False`."
        )


def _write(blobs: Iterable[bytes], file: str, column: str, count: int, title: str) -> None:
    """Writes an Arrow file of one binary column, as the `datasets` library reads it."""
    if count == 0:
        return
    schema = pa.schema([(column, pa.large_binary())])
    bar = tqdm(blobs, title, count, disable=not PartialState().is_local_main_process)
    with pa.OSFile(file, "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        held: list[bytes] = []
        for done, blob in enumerate(bar, start=1):
            held.append(blob)
            # Neither a million small batches, which take long to open, nor a large one in memory.
            if done == count or len(held) == 1000 or len(held) * len(blob) > 2**25:
                writer.write_batch(pa.record_batch([pa.array(held, pa.large_binary())], schema=schema))
                held = []


__all__ = ["LATENTS", "PROMPT_INDEX", "FeatureCache", "PromptTable", "encoders_fingerprint", "read_latents"]
