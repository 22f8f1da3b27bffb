"""Decoding: every pixel format to RGB, every kind of damage to an ImageError; the grid is the published processor's."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as published_smart_resize

from megatron_cppo.data.images import ImageError, decode, grid, smart_resize

MIN_PIXELS, MAX_PIXELS = 56 * 56, 14 * 14 * 4 * 1280


def encode(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def picture(width: int = 64, height: int = 48) -> Image.Image:
    pixels_HWC = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels_HWC)


def png_header(width: int, height: int) -> bytes:
    """A PNG that states a size and holds no pixels."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + b"\0\0\0\0IDAT"


def test_bytes_path_and_image_give_the_same_pixels(tmp_path):
    image = picture()
    path = tmp_path / "image.png"
    path.write_bytes(encode(image))
    for source in (path.read_bytes(), path, str(path), image):
        decoded = decode(source)
        assert (decoded.mode, decoded.size) == ("RGB", image.size)
        assert decoded.tobytes() == image.tobytes()
        assert decoded is not image


@pytest.mark.parametrize(
    ("orientation", "stored_as"),
    [
        (2, Image.Transpose.FLIP_LEFT_RIGHT),
        (3, Image.Transpose.ROTATE_180),
        (6, Image.Transpose.ROTATE_90),
        (8, Image.Transpose.ROTATE_270),
    ],
)
def test_exif_orientation_is_applied(orientation, stored_as):
    upright = picture()
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = encode(upright.transpose(stored_as), exif=exif)
    decoded = decode(stored)
    assert decoded.tobytes() == upright.tobytes()
    assert decode(encode(decoded)).tobytes() == upright.tobytes(), "the orientation must not be applied twice"


def test_transparent_pixels_become_white():
    image = Image.new("RGBA", (40, 40), (255, 0, 0, 255))
    image.paste((0, 0, 255, 0), (0, 0, 20, 40))
    image.paste((0, 0, 0, 128), (0, 0, 20, 20))
    decoded = decode(encode(image))
    assert decoded.getpixel((5, 30)) == (255, 255, 255)
    assert decoded.getpixel((30, 5)) == (255, 0, 0)
    assert decoded.getpixel((5, 5)) == (127, 127, 127)


def test_palette_with_transparency_and_grey_with_alpha():
    palette = Image.new("P", (30, 30), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.paste(0, (0, 0, 15, 30))
    decoded = decode(encode(palette, transparency=0))
    assert decoded.getpixel((0, 0)) == (255, 255, 255)
    assert decoded.getpixel((20, 0)) == (10, 20, 30)
    assert decode(encode(Image.new("LA", (30, 30), (100, 0)))).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_every_common_mode_becomes_rgb(mode):
    image = picture().convert(mode)
    assert decode(image).tobytes() == image.convert("RGB").tobytes()


def test_cmyk_jpeg():
    decoded = decode(encode(Image.new("CMYK", (32, 32), (0, 255, 255, 0)), "JPEG", quality=95))
    red, green, blue = decoded.getpixel((10, 10))
    assert red > 200
    assert max(green, blue) < 60


def test_deep_greys_keep_their_brightness():
    values = np.linspace(0, 65535, 32 * 32).reshape(32, 32)
    expected = np.round(values.astype(np.uint16) / 257).astype(np.uint8)
    for image in (Image.fromarray(values.astype(np.uint16)), Image.fromarray(values.astype(np.int32))):
        for source in (image, encode(image, "TIFF")):
            assert np.array_equal(np.asarray(decode(source))[:, :, 0], expected)
    assert np.array_equal(np.asarray(decode(encode(Image.fromarray(values.astype(np.uint16)))))[:, :, 2], expected)
    half = decode(Image.new("F", (30, 30), 0.5))
    assert half.getpixel((0, 0)) == (128, 128, 128)
    with pytest.raises(ImageError, match="expected 0 to 1"):
        decode(Image.new("F", (30, 30), 17.0))


def test_small_images_are_enlarged_to_the_smaller_side():
    assert decode(picture(14, 20)).size == (28, 40)
    assert decode(picture(7, 7), min_side=56).size == (56, 56)
    assert decode(picture(28, 300)).size == (28, 300)
    assert decode(picture(3, 3), min_side=1).size == (3, 3)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "supported format: got 0 bytes"),
        (b"<svg></svg>", "convert it to PNG or JPEG"),
        (encode(picture(), "EPS"), "convert it to PNG or JPEG"),  # Pillow would start Ghostscript
        ("/no/such/image.png", "does not exist: got /no/such/image.png"),
        (Image.new("RGB", (0, 5)), "no pixels: got 0 x 5"),
        (Image.new("RGB", (2, 402)), "aspect ratio may be at most 200"),
        (png_header(60_000, 60_000), "too large"),
        (Image.new("La", (30, 30)), "mode La; convert the image to RGB"),
    ],
)
def test_errors_say_what_was_given_and_what_to_do(source, message):
    with pytest.raises(ImageError, match=message):
        decode(source)


def test_the_pixel_limit_is_checked_before_decoding():
    with pytest.raises(ImageError, match="8000 x 8000 = 64000000 pixels, the limit is 1000000"):
        decode(png_header(8_000, 8_000), max_image_pixels=1_000_000)
    with pytest.raises(ImageError, match="corrupt or truncated"):
        decode(png_header(800, 800), max_image_pixels=1_000_000)
    assert decode(picture(40, 30), max_image_pixels=1200).size == (40, 30)
    with pytest.raises(ImageError, match="the limit is 1199"):
        decode(picture(40, 30), max_image_pixels=1199)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's remarks on damaged TIFF tags
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_damage_is_an_image_error_and_nothing_else(file_format):
    data = encode(picture(), file_format)
    assert decode(data).size == (64, 48)
    for length in (len(data) // 4, len(data) // 2, 3 * len(data) // 4):
        if file_format != "GIF":  # Pillow shows the part of a GIF that is there
            with pytest.raises(ImageError):
                decode(data[:length])
    rng = random.Random(0)
    outcomes = set()
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(8):
            damaged[rng.randrange(min(len(data), 400))] = rng.randrange(256)
        try:
            outcomes.add(decode(bytes(damaged), max_image_pixels=10**6).mode)
        except ImageError:
            outcomes.add("error")
    assert "error" in outcomes
    assert outcomes <= {"RGB", "error"}


def test_smart_resize_equals_the_published_processor():
    rng = random.Random(1)
    for _ in range(5000):
        factor = rng.choice((28, 32))
        low = rng.choice((MIN_PIXELS, 200_704, 4 * factor * factor))
        high = rng.choice((MAX_PIXELS, 1_003_520, 300_000))
        height, width = int(10 ** rng.uniform(0.5, 4)), int(10 ** rng.uniform(0.5, 4))
        if max(height, width) / min(height, width) > 200:
            with pytest.raises(ImageError, match="elongated"):
                smart_resize(height, width, factor=factor, min_pixels=low, max_pixels=high)
            continue
        expected = published_smart_resize(height, width, factor, low, high)
        assert smart_resize(height, width, factor=factor, min_pixels=low, max_pixels=high) == expected


@pytest.mark.parametrize("size", [(64, 48), (28, 28), (500, 333), (1200, 90), (2000, 1500)])
def test_grid_equals_that_of_the_published_processor(size):
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": MIN_PIXELS, "longest_edge": 400_000})
    published = processor(images=[picture(*size)], return_tensors="np")["image_grid_thw"]
    assert grid(size[1], size[0], 14, 2, MIN_PIXELS, 400_000) == tuple(int(n) for n in published[0])
