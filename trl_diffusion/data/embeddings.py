"""Embeddings of (prompt, image), by which Diffusion-RPO knows what is related."""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset, concatenate_datasets
from PIL.Image import Image
from transformers import CLIPModel, CLIPProcessor

from .cache import computed_columns, fingerprint, folder_state
from .formats import EMBEDDING_COLUMNS, AnyDataset
from .images import to_rgb


Embedder = Callable[[list[Image], list[str]], Any]


@contextmanager
def _named(model: str) -> Iterator[None]:
    """Names the argument where transformers speaks of files, ids and keys only."""
    try:
        yield
    except Exception as error:  # OSError, ValueError, KeyError, SafetensorError ...
        raise ValueError(
            f"`embedding_model={model!r}` is no CLIP model with its processor that can be loaded: {error}"
        ) from error


class CLIPEmbedder:
    """
    Embeds (image, prompt) with a CLIP model.

    Image and text embeddings have length 1 and are joined, so that the cosine of two results is the mean of the cosine
    of the images and the cosine of the texts.

    Args:
        model (`str`): Hub id or folder of a `CLIPModel` with its processor.
        embedding (`str`, *optional*, defaults to `"text_image"`): `"text_image"`, `"text"` or `"image"`.
        device (`torch.device`, *optional*, defaults to `"cpu"`): Where to compute.
    """

    def __init__(
        self,
        model: str,
        embedding: Literal["text_image", "text", "image"] = "text_image",
        device: torch.device | str = "cpu",
    ):
        self.name, self.embedding, self.device = model, embedding, device

    # Loaded with the first pair: where the embeddings are in the cache, no model is needed.
    @functools.cached_property
    def model(self) -> CLIPModel:
        with _named(self.name):
            model, loaded = CLIPModel.from_pretrained(self.name, dtype=torch.float32, output_loading_info=True)
            if loaded["missing_keys"]:  # which transformers fills with random numbers
                raise ValueError(f"its weights lack {', '.join(sorted(loaded['missing_keys'])[:3])} ...")
        return model.eval().to(self.device)

    @functools.cached_property
    def processor(self) -> CLIPProcessor:
        with _named(self.name):
            return CLIPProcessor.from_pretrained(self.name)

    @torch.no_grad()
    def __call__(self, images: list[Image], prompts: list[str]) -> np.ndarray:
        """Returns float32 embeddings of shape `(len(images), dim)`; longer prompts are cut as CLIP cuts them."""
        parts = []
        if self.embedding in ("text_image", "text"):
            tokens = self.processor.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
            parts.append(self.model.get_text_features(**tokens.to(self.device)).pooler_output)
        if self.embedding in ("text_image", "image"):
            pixels = self.processor.image_processor([to_rgb(image) for image in images], return_tensors="pt")
            parts.append(self.model.get_image_features(**pixels.to(self.device)).pooler_output)
        return torch.cat([torch.nn.functional.normalize(part, dim=1) for part in parts], dim=1).cpu().numpy()


def clip_fingerprint(model: str, embedding: str) -> str:
    """Changes when the weights behind a Hub id or folder change."""
    if os.path.isdir(model):
        return fingerprint(folder_state(model), embedding)
    with _named(model):
        commit = CLIPModel.config_class.from_pretrained(model)._commit_hash
    return fingerprint(model, commit, embedding)


def embed_pairs(dataset: Dataset, embedder: Embedder, name: str | None = None, batch_size: int = 64) -> Dataset:
    """
    Adds the columns `chosen_embedding` and `rejected_embedding` to paired data.

    They are computed once and kept in the cache of the `datasets` library.

    Args:
        dataset (`Dataset`):
            Paired data: `prompt, chosen, rejected`.
        embedder (`Callable`):
            From images and prompts, two lists of the same length, to an array or tensor of shape `(length, dim)`.
        name (`str`, *optional*):
            What tells this embedder from others in the cache. Defaults to a hash of it.
        batch_size (`int`, *optional*, defaults to `64`):
            Rows per call.

    Returns:
        `Dataset`: with two more columns, lists of float32.

    Raises:
        `ValueError`: if the embedder returns another shape, or numbers that are not finite.
    """

    def embed(batch: dict[str, list]) -> dict[str, np.ndarray]:
        columns = {}
        for column, side in zip(EMBEDDING_COLUMNS, ("chosen", "rejected"), strict=True):
            found = np.asarray(torch.as_tensor(embedder(batch[side], batch["prompt"])).cpu(), np.float32)
            if found.ndim != 2 or len(found) != len(batch["prompt"]):
                raise ValueError(
                    f"The embedder returned the shape {found.shape} for {len(batch['prompt'])} images, expected "
                    f"({len(batch['prompt'])}, dim): one vector per image."
                )
            if not np.isfinite(found).all():
                raise ValueError(f"The embedder returned numbers that are not finite for {side!r} images.")
            columns[column] = found
        return columns

    rows = dataset.select_columns(["prompt", "chosen", "rejected"])
    key = fingerprint(rows, "pair embeddings", embedder if name is None else name)
    columns = computed_columns(rows, embed, key, batch_size, "Embedding pairs")
    return concatenate_datasets([dataset, columns], axis=1)


def check_embeddings(dataset: AnyDataset, what: str) -> None:
    """
    Checks embeddings that came with a data set; those of a stream cannot be checked ahead.

    Raises:
        `ValueError`: if vectors differ in length, or hold what is no finite number.
    """
    if not isinstance(dataset, Dataset):
        return
    table = dataset.select_columns(list(EMBEDDING_COLUMNS)).with_format("arrow")
    expected = None
    for start in range(0, len(table), 10_000):
        batch = table[start : start + 10_000]
        for name in EMBEDDING_COLUMNS:
            lengths = pc.list_value_length(batch[name]).to_numpy()
            expected = expected or int(lengths[0])
            bad = np.flatnonzero((lengths != expected) | (lengths == 0))
            if len(bad):
                raise ValueError(
                    f"Column {name!r} of the {what} has {lengths[bad[0]]} numbers in row {start + bad[0]}, expected "
                    f"{expected or 'some'}: all embeddings must have the same length."
                )
            numbers = pc.list_flatten(batch[name]).to_numpy().reshape(-1, expected)
            bad = np.flatnonzero(~np.isfinite(numbers).all(axis=1))  # None among them has become NaN
            if len(bad):
                raise ValueError(f"Column {name!r} of the {what} is not finite in row {start + bad[0]}.")
