"""From a PIL image to the pixels that a VAE reads: orientation, RGB, resize, crop, flip."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps

from .draws import Draws


_TURNED = (5, 6, 7, 8)
"""The EXIF orientations that exchange height and width."""


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an opened file after its EXIF orientation is applied; nothing is decoded."""
    # The base class's method: that of PNG images decodes them, because their orientation may be stored at the end.
    return image.size[::-1] if Image.Image.getexif(image).get(0x0112) in _TURNED else image.size


def check_mode(image: Image.Image) -> None:
    """
    Checks that the numbers of an image have a known range; nothing is decoded.

    Raises:
        `ValueError`: if they are floats or 32-bit integers.
    """
    # Of the files that Pillow opens as 32-bit integers only PPM has a fixed range: it scales to 65535.
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
        kind = "floats" if image.mode == "F" else "32-bit integers"
        raise ValueError(f"found {kind}, whose range is unknown; expected 8 or 16 bits per channel")


def convert_to_rgb(image: Image.Image) -> tuple[Image.Image, bool]:
    """
    An image of any mode as 8-bit RGB, and whether any of it was transparent.

    The EXIF orientation is applied, transparent pixels are composited on white, 16-bit greyscale is scaled to 8 bits.
    Other modes go through Pillow's conversion. Of an animation this is the first frame. ICC profiles are ignored, as
    diffusers ignores them.

    Raises:
        `ValueError`: see [`check_mode`].
    """
    check_mode(image)
    image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):  # Pillow's own conversion would clip at 255
        levels = np.asarray(image).astype(np.uint32)
        # A PNG may declare one of the 65,536 levels transparent.
        clear = levels == image.info.get("transparency", -1)
        image = Image.fromarray(np.where(clear, 255, (levels + 128) // 257).astype(np.uint8))
        return image.convert("RGB"), bool(clear.any())
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if np.asarray(image.getchannel("A")).min() < 255:
            white = Image.new("RGBA", image.size, "white")
            return Image.alpha_composite(white, image).convert("RGB"), True
    return image.convert("RGB"), False


def to_rgb(image: Image.Image) -> Image.Image:
    """[`convert_to_rgb`] with a warning, once per process, when an image is transparent."""
    image, transparent = convert_to_rgb(image)
    if transparent:
        warnings.warn("Found transparent images: they are composited on white.", stacklevel=2)
    return image


@dataclass(frozen=True)
class ImageTransform:
    """
    Resizes an image to just cover `height` x `width` (antialiased, Lanczos), crops that, and scales to [-1, 1].

    Modes other than RGB are converted by [`convert_to_rgb`].

    Args:
        height (`int`), width (`int`):
            Size of the result in pixels.
        center_crop (`bool`, *optional*, defaults to `True`):
            Whether to crop the centre. If `False`, the place of the crop is drawn.
        random_flip (`bool`, *optional*, defaults to `False`):
            Whether to mirror every second image, left to right.
    """

    height: int
    width: int
    center_crop: bool = True
    random_flip: bool = False

    def __call__(self, image: Image.Image, draws: Draws) -> torch.Tensor:
        """Returns float32 pixels of shape `(3, height, width)` in [-1, 1]."""
        return self.with_sizes(image, draws)[0]

    def flips(self, draws: Draws) -> bool:
        """Whether the images of a visit are mirrored."""
        return self.random_flip and draws.uniform("flip") < 0.5

    def with_sizes(self, image: Image.Image, draws: Draws, flip: bool | None = None) -> tuple[torch.Tensor, list[int]]:
        """
        The pixels, and what SDXL wants to know of them: height and width of the original, top and left of the crop (in
        the resized image, mirrored if the pixels are), height and width of the result. `flip` is drawn if it is None.
        """
        image = to_rgb(image)
        original = [image.height, image.width]
        target = (self.width, self.height)
        scale = max(self.width / image.width, self.height / image.height)
        if scale != 1:
            width, height = (max(least, round(side * scale)) for side, least in zip(image.size, target, strict=True))
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        room = [side - least for side, least in zip(image.size, target, strict=True)]
        if self.center_crop:
            left, top = room[0] // 2, room[1] // 2
        else:
            left, top = (int(draws.uniform(f"crop_{axis}") * (room[i] + 1)) for i, axis in enumerate("xy"))
        image = image.crop((left, top, left + self.width, top + self.height))
        if self.flips(draws) if flip is None else flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            left = room[0] - left
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
        return pixels, [*original, top, left, self.height, self.width]


T = TypeVar("T")


def read_image(row: int, read: Callable[[], T]) -> T:
    """Runs `read`, which decodes images, and names the row if that fails."""
    try:
        return read()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"The image in row {row} cannot be read ({error}): replace the file or drop the row."
        ) from error
