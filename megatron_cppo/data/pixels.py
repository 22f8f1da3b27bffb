"""From an image to the patches of the vision tower, and its grid from the header alone.

Owns the checkpoint's image processor. Must not know rows, tokens, epochs or views.
Letters: P patches of an image, D values of a patch (channels x frames x height x width).
"""

from __future__ import annotations

import io
from pathlib import Path

from PIL import ExifTags, Image
from torch import Tensor
from transformers import AutoImageProcessor

from megatron_cppo.config import ModelConfig
from megatron_cppo.data.images import DAMAGE_ERRORS, FORMATS, ImageError, decode, smart_resize
from megatron_cppo.data.rows import RowDropped
from megatron_cppo.data.tokenizer import CheckpointError
from megatron_cppo.types import ImageGrid

_SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that swap height and width."""


class PixelReader:
    """One checkpoint's way from an encoded image to patches. Raises CheckpointError without an image processor.

    Images whose smaller side is under one merged patch are enlarged to it by `decode`; the processor does the rest.
    """

    def __init__(self, model_path: str, model: ModelConfig, *, max_image_pixels: int) -> None:
        try:
            # Pillow's resampling on every machine: the same pixels with and without torchvision.
            self._processor = AutoImageProcessor.from_pretrained(model_path, backend="pil", local_files_only=True)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"model.path: no image processor can be loaded from '{model_path}' ({error}); copy the checkpoint's "
                "preprocessor_config.json"
            ) from error
        self._size = {"shortest_edge": model.min_pixels, "longest_edge": model.max_pixels}
        self._max_image_pixels = max_image_pixels
        self._patch: int = self._processor.patch_size
        self._merge: int = self._processor.merge_size

    def grid(self, source: bytes | Path) -> ImageGrid:
        """The grid of an encoded image, from its header alone; RowDropped when there is none."""
        height, width = self._enlarged(*upright_size(source, max_image_pixels=self._max_image_pixels))
        try:
            return self._grid(height, width)
        except ImageError as error:
            raise RowDropped("image: too elongated") from error

    def decode(self, source: bytes | Path, grid: ImageGrid) -> Image.Image:
        """The upright RGB picture; ImageError when the data is damaged, or its size is not the one behind `grid`."""
        image = decode(source, max_image_pixels=self._max_image_pixels, min_side=self._patch * self._merge)
        found = self._grid(image.height, image.width)
        if found != grid:
            raise ImageError(
                f"image has the grid {found}, its header said {grid}: the file changed during the run, or stores its "
                "orientation behind its pixels; save the image again"
            )
        return image

    def resized(self, image: Image.Image, grid: ImageGrid) -> Image.Image:
        """The picture that `patches` cuts up: of the grid's size, by the image processor's own resampling.

        An image processor that is given this one has nothing left to resample, whatever library it does that with.
        """
        size = (grid.width * self._patch, grid.height * self._patch)
        return image if image.size == size else image.resize(size, Image.Resampling(self._processor.resample))

    def patches(self, image: Image.Image, grid: ImageGrid) -> Tensor:
        """Normalised patches [P, D], fp32, of a decoded picture, by the checkpoint's own image processor."""
        features = self._processor(images=[image], size=self._size, return_tensors="pt")
        made = tuple(features["image_grid_thw"][0].tolist())
        assert made == (grid.frames, grid.height, grid.width), f"the processor made grid {made}, the prompt has {grid}"
        return features["pixel_values"]

    def _grid(self, height: int, width: int) -> ImageGrid:
        resized_height, resized_width = smart_resize(
            height,
            width,
            factor=self._patch * self._merge,
            min_pixels=self._size["shortest_edge"],
            max_pixels=self._size["longest_edge"],
        )
        return ImageGrid(1, resized_height // self._patch, resized_width // self._patch, self._merge)

    def _enlarged(self, height: int, width: int) -> tuple[int, int]:
        """The size to which `decode` enlarges a picture that is smaller than one merged patch."""
        least, smaller = self._patch * self._merge, min(height, width)
        if smaller >= least:
            return height, width
        return max(least, round(height * least / smaller)), max(least, round(width * least / smaller))


def upright_size(source: bytes | Path, *, max_image_pixels: int) -> tuple[int, int]:
    """(height, width) of an encoded image once its EXIF orientation is applied, from its header alone.

    Raises RowDropped with a countable reason: nothing there, header corrupt, or more than `max_image_pixels`.
    """
    if not source:
        raise RowDropped("image: empty")
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            width, height = image.size
            # The base class's method: the one of PNG decodes the whole image to look for EXIF data behind the pixels.
            orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RowDropped("image: missing file") from error
    except (IsADirectoryError, PermissionError) as error:
        raise RowDropped("image: unreadable file") from error
    except Image.DecompressionBombError as error:
        raise RowDropped("image: too large") from error
    except DAMAGE_ERRORS as error:
        raise RowDropped("image: corrupt") from error
    if width * height > max_image_pixels:
        raise RowDropped("image: too large")
    if width * height == 0:
        raise RowDropped("image: corrupt")
    return (width, height) if orientation in _SIDEWAYS else (height, width)
