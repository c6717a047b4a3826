"""Drawn images on disk: each written whole or not at all, in a folder for its model and settings."""

import glob
import hashlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from ..callbacks import sample_rows
from ..data.cache import folder_state
from ..export import layout_and_base
from ..hub import existing_base


def model_state(name: str, base_model: str | None = None) -> Any:
    """
    What changes when the weights behind a name change: the files of a folder (of its components or its adapter, and
    of the adapter's base), an exported file and its base, or the commit of a Hub id.

    Args:
        name (`str`): Hub id, folder or file, as [`~hub.load_trained`] takes it.
        base_model (`str`, *optional*): The base model of an adapter, instead of the one that it names.

    Returns:
        What `json.dumps` takes.
    """
    folder = Path(name)
    if folder.is_file():
        _, base = layout_and_base(name, base_model)
        return [_file_states(folder.parent, [glob.escape(folder.name)]), base, model_state(base)]
    if not folder.is_dir():
        return Path(hf_hub_download(name, "model_index.json")).parent.name
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        base = existing_base(name, base_model or json.loads(adapter.read_text())["base_model_name_or_path"])
        return [_file_states(folder, ["*.safetensors", adapter.name]), base, model_state(base)]
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(
            f"Found neither a model_index.json nor an adapter_config.json in {name!r}: expected a pipeline's folder, "
            "or the output folder of an adapter training."
        )
    components = [key for key, value in json.loads(index.read_text()).items() if isinstance(value, list)]
    parts = {key: folder_state(str(folder / key)) for key in components}
    return [_file_states(folder, [index.name]), parts]


def _file_states(folder: Path, patterns: list[str]) -> list[tuple[str, int, int]]:
    files = sorted(file for pattern in patterns for file in folder.glob(pattern))
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


class ImageFolder:
    """
    The images that one model draws with one set of settings.

    Another model, or other settings, get another folder beside this one: images are never mixed, and a baseline that
    was drawn once serves for every policy.

    Args:
        root (`str` or `Path`):
            The folder of these folders.
        model (`str`):
            Hub id or folder.
        settings (`dict[str, Any]`):
            All that the images depend on besides model, prompt and seed.
        base_model (`str`, *optional*):
            The base model of an adapter, instead of the one that it names.
    """

    def __init__(self, root: str | Path, model: str, settings: dict[str, Any], base_model: str | None = None):
        state = model_state(model, base_model)
        record = json.dumps({"model": model, "state": state, "settings": settings}, sort_keys=True)
        self.folder = Path(root) / hashlib.sha256(record.encode()).hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        _write_whole(self.folder / "settings.json", (json.dumps(json.loads(record), indent=2) + "\n").encode())

    def path(self, prompt: str, seed: int) -> Path:
        """Where an image is, once it is drawn."""
        return self.folder / f"{hashlib.sha256(prompt.encode()).hexdigest()[:16]}-{seed}.png"

    def missing(self, prompts: list[str], seeds: list[int]) -> dict[str, list[int]]:
        """The seeds that are not drawn yet, by prompt; prompts that are complete are left out."""
        wanted = {prompt: [seed for seed in seeds if not self.path(prompt, seed).is_file()] for prompt in prompts}
        return {prompt: left for prompt, left in wanted.items() if left}

    def draw(
        self,
        load: Callable[[], DiffusionPipeline],
        prompts: list[str],
        seeds: list[int],
        batch_size: int,
        description: str,
        **kwargs: Any,
    ) -> None:
        """
        Draws what is missing.

        Args:
            load (`Callable[[], DiffusionPipeline]`): Gives the pipeline; called only if something is missing.
            prompts (`list[str]`): Prompts.
            seeds (`list[int]`): One image per seed, the same seeds for all prompts.
            batch_size (`int`): Images of a prompt that are drawn at once, and so the bound on memory.
            description (`str`): Title of the progress bar.
            **kwargs: Passed to the pipeline.
        """
        missing, total = self.missing(prompts, seeds), len(prompts) * len(seeds)
        if not missing:
            return
        pipeline = load()
        left = sum(map(len, missing.values()))
        with tqdm(total=total, initial=total - left, desc=description, unit="image") as bar:
            for prompt, part in missing.items():
                for start in range(0, len(part), batch_size):
                    batch = part[start : start + batch_size]
                    (images,) = sample_rows(pipeline, [prompt], batch, **kwargs)
                    for seed, image in zip(batch, images, strict=True):
                        self._save(image, prompt, seed)
                    bar.update(len(batch))

    def _save(self, image: Image.Image, prompt: str, seed: int) -> None:
        text, data = PngInfo(), io.BytesIO()
        text.add_itxt("prompt", prompt)
        text.add_text("seed", str(seed))
        image.save(data, "PNG", pnginfo=text)
        _write_whole(self.path(prompt, seed), data.getvalue())

    def load(self, prompt: str, seed: int) -> Image.Image:
        """An image that is drawn."""
        with Image.open(self.path(prompt, seed)) as image:
            return image.convert("RGB")


def _write_whole(file: Path, data: bytes) -> None:
    staging = file.with_name(file.name + ".incomplete")
    staging.write_bytes(data)
    os.replace(staging, file)
