"""Image decoding, and the patch grid that a vision tower makes of an image.

Owns: bytes or a file → one upright RGB image, and Qwen2.5-VL's rule from pixel size to grid.
Must not know: perturbations (`views`), rows, prompts, or any model class.
"""

import io
import math
import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from megatron_cppo.config import UserError

MAX_IMAGE_PIXELS = 89_478_485
"""Pillow's threshold for a decompression bomb (it warns above it and refuses twice as much)."""
MAX_ASPECT_RATIO = 200
"""Qwen2.5-VL's processor refuses longer images."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
"""What is opened at all. Pillow knows more, among them formats that start another program (EPS)."""
DAMAGE_ERRORS = (
    *(OSError, SyntaxError, ValueError, TypeError, EOFError, LookupError, ArithmeticError, MemoryError),
    *(NotImplementedError, struct.error, Image.DecompressionBombError),
)
"""What Pillow's parsers and decoders raise on damaged data: they read whatever the header claims."""


class ImageError(UserError):
    """An image that cannot be used: what was required, what was given, and what to do."""


def decode(
    source: bytes | str | Path | Image.Image, *, max_image_pixels: int = MAX_IMAGE_PIXELS, min_side: int = 28
) -> Image.Image:
    """Decode an image once and for all: EXIF orientation applied, RGB, no side below `min_side` pixels.

    Transparency is composited on white; of an animation the first frame is taken. `max_image_pixels` bounds the size
    stated in the header, before any pixel is decoded. Raises `ImageError` for anything that cannot be used.
    """
    opened = _open(source)
    _check_shape(opened.height, opened.width)
    if opened.height * opened.width > max_image_pixels:
        raise ImageError(
            f"image is too large: got {opened.width} x {opened.height} = {opened.width * opened.height} pixels, "
            f"the limit is {max_image_pixels}; shrink the image or raise the limit"
        )
    try:
        upright = ImageOps.exif_transpose(opened)
        upright.load()
    except DAMAGE_ERRORS as error:
        raise ImageError(
            f"image is corrupt or truncated: got {_describe(source)} ({error}); replace the file or drop the row"
        ) from error
    return _upscale(_to_rgb(upright), min_side)


def smart_resize(height: int, width: int, *, factor: int = 28, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(height, width) in pixels that Qwen2.5-VL's processor resizes to: multiples of `factor`, area within the bounds.

    The aspect ratio is kept up to rounding. Raises `ImageError` for an empty image or a ratio above 200.
    Source: the published image processor of Qwen2-VL and Qwen2.5-VL.
    """
    _check_shape(height, width)
    resized_h, resized_w = round(height / factor) * factor, round(width / factor) * factor
    if resized_h * resized_w > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        resized_h = max(factor, math.floor(height / shrink / factor) * factor)
        resized_w = max(factor, math.floor(width / shrink / factor) * factor)
    elif resized_h * resized_w < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        resized_h = math.ceil(height * grow / factor) * factor
        resized_w = math.ceil(width * grow / factor) * factor
    return resized_h, resized_w


def grid(
    height: int, width: int, patch_size: int, merge_size: int, min_pixels: int, max_pixels: int
) -> tuple[int, int, int]:
    """(t, h, w) in patches of an image of `height` x `width` pixels: t·h·w / merge_size² tokens of the language model.

    Raises `ImageError` as `smart_resize` does.
    """
    resized_h, resized_w = smart_resize(
        height, width, factor=patch_size * merge_size, min_pixels=min_pixels, max_pixels=max_pixels
    )
    return 1, resized_h // patch_size, resized_w // patch_size


def _open(source: bytes | str | Path | Image.Image) -> Image.Image:
    """Read the header only."""
    if isinstance(source, Image.Image):
        return source
    try:
        return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
    except FileNotFoundError as error:
        raise ImageError(f"image file does not exist: got {source}; check the path and the image folder") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"image is too large: got {_describe(source)} ({error}); shrink the image") from error
    except DAMAGE_ERRORS as error:
        raise ImageError(
            f"not an image in a supported format: got {_describe(source)} ({error}); convert it to PNG or JPEG"
        ) from error


def _check_shape(height: int, width: int) -> None:
    if min(height, width) < 1:
        raise ImageError(f"image has no pixels: got {width} x {height}; drop the row")
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise ImageError(
            f"image is too elongated: got {width} x {height}, the aspect ratio may be at most {MAX_ASPECT_RATIO}; "
            "crop or pad the image"
        )


def _describe(source: bytes | str | Path | Image.Image) -> str:
    if isinstance(source, bytes):
        return f"{len(source)} bytes starting with {source[:8]!r}"
    return f"a {source.mode} image of {source.size}" if isinstance(source, Image.Image) else str(source)


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB without metadata; deeper greys are reduced to 8 bits, transparent pixels become white."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _to_8_bits(image)
    try:
        if image.has_transparency_data:
            layer = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
        image = image.copy() if image.mode == "RGB" else image.convert("RGB")
    except ValueError as error:
        raise ImageError(f"pixel format is unsupported: got mode {image.mode}; convert the image to RGB") from error
    image.info.clear()
    return image


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Integer greys are taken as 16 bits deep, which is what PNG and PGM files hold; floats as 0 to 1."""
    values = np.asarray(image)
    white = 1.0 if image.mode == "F" else 65535.0
    low, high = float(values.min()), float(values.max())
    if not (low >= 0.0 and high <= white):
        raise ImageError(
            f"pixel values are unsupported: got {low:g} to {high:g} in mode {image.mode}, expected 0 to {white:g}; "
            "convert the image to 8 bits"
        )
    return Image.fromarray(np.round(values * (255.0 / white)).astype(np.uint8))


def _upscale(image: Image.Image, min_side: int) -> Image.Image:
    """Enlarge so that the smaller side reaches `min_side`: a tower cannot read less than one merged patch."""
    smaller = min(image.size)
    if smaller >= min_side:
        return image
    size = [max(min_side, round(side * min_side / smaller)) for side in image.size]
    return image.resize((size[0], size[1]), Image.Resampling.LANCZOS)
