"""Perturbed views of an image: preserving ones keep what it says, removing ones take it away.

Owns: the perturbations on Pillow images, and the seeded draw of one of them.
Must not know: decoding, resizing to patches, which samples need a view.
Every view keeps the pixel size, so grid, token count and positions are those of the original.
A name and a seed determine the pixels, in any process.
"""

import difflib
from collections.abc import Sequence
from typing import Literal

import numpy as np
from PIL import Image, ImageEnhance

from megatron_cppo.config import UserError

Kind = Literal["preserving", "removing"]
Seed = int | Sequence[int]
Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels; right and bottom exclusive."""
Point = tuple[int, int]

JITTER = {"brightness": (0.2, 1.3), "contrast": (0.2, 1.8), "saturation": (0.2, 1.8)}
DISTORTION, DISTORTION_PROBABILITY = 0.2, 0.5
ROTATION_DEGREES = 10.0
NOISE_PATCHES, NOISE_SIDE = 50, (0.05, 0.15)
CROP_SIDE = (0.6, 0.7)
BLACK_PATCH_PIXELS, BLACK_PROBABILITY = 14, 0.6

_ENHANCERS = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "saturation": ImageEnhance.Color,
}


class ViewError(UserError):
    """A perturbation that does not exist, or not of the kind asked for."""


def color_jitter(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Scale brightness, contrast and saturation in random order (torchvision's `ColorJitter`)."""
    for name, factor in jitter_factors(rng):
        image = _ENHANCERS[name](image).enhance(factor)
    return image


def perspective(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Half of the time, tilt the image plane; what becomes free is black (torchvision's `RandomPerspective`)."""
    if rng.random() >= DISTORTION_PROBABILITY:
        return image.copy()
    coefficients = perspective_coefficients(image.size, perspective_corners(image.size, rng))
    return image.transform(
        image.size, Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BILINEAR, fillcolor=(0, 0, 0)
    )


def rotation(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Rotate about the centre by up to 10° either way; what becomes free is black (torchvision's `RandomRotation`).

    Bilinear where torchvision's default is the nearest pixel, which breaks thin strokes of diagrams.
    """
    degrees = rng.uniform(-ROTATION_DEGREES, ROTATION_DEGREES)
    return image.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=(0, 0, 0))


def occlusion(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Cover the image with 50 patches of uniform noise, which may overlap, each 5-15 % of each side."""
    pixels_HWC = np.array(image)
    for left, top, right, bottom in noise_boxes(image.size, rng):
        pixels_HWC[top:bottom, left:right] = rng.integers(0, 256, (bottom - top, right - left, 3), dtype=np.uint8)
    return Image.fromarray(pixels_HWC)


def zoom_crop(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Keep a random 60-70 % of each side, enlarged to the full size."""
    # Not `resize(box=...)`, whose filter reads pixels beyond the box.
    return image.crop(crop_box(image.size, rng)).resize(image.size, Image.Resampling.BICUBIC)


def blacken(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Blacken each patch of 14 x 14 pixels with probability 0.6 (PAPO, arXiv 2507.06448)."""
    rows, columns = (-(-side // BLACK_PATCH_PIXELS) for side in (image.height, image.width))
    hidden = rng.random((rows, columns)) < BLACK_PROBABILITY
    hidden_HW = hidden.repeat(BLACK_PATCH_PIXELS, axis=0).repeat(BLACK_PATCH_PIXELS, axis=1)
    pixels_HWC = np.array(image)
    pixels_HWC[hidden_HW[: image.height, : image.width]] = 0
    return Image.fromarray(pixels_HWC)


PRESERVING = {"color_jitter": color_jitter, "perspective": perspective, "rotation": rotation}
REMOVING = {"occlusion": occlusion, "zoom_crop": zoom_crop, "blacken": blacken}
VIEWS = {**PRESERVING, **REMOVING}

_KINDS = {"preserving": PRESERVING, "removing": REMOVING}
_DEFAULT_KINDS = {"preserving": tuple(PRESERVING), "removing": ("occlusion", "zoom_crop")}


def preserving(image: Image.Image, seed: Seed, kinds: Sequence[str] = ()) -> Image.Image:
    """An information-preserving view of an RGB image: same size, one perturbation drawn from `kinds` (default: all).

    `seed` is an integer or a sequence such as (seed, epoch, row id, image index), all >= 0. Raises `ViewError`.
    """
    return _view("preserving", image, seed, kinds)


def removing(image: Image.Image, seed: Seed, kinds: Sequence[str] = ()) -> Image.Image:
    """An information-removing view of an RGB image: same size, drawn from `kinds` (default: occlusion, zoom_crop).

    `seed` as in `preserving`; the two draws of one seed are independent. Raises `ViewError`.
    """
    return _view("removing", image, seed, kinds)


def draw(kind: Kind, seed: Seed, kinds: Sequence[str] = ()) -> str:
    """Name of the perturbation that `preserving` or `removing` applies for this seed, for logs. Raises `ViewError`."""
    for name in kinds:
        if name not in _KINDS[kind]:
            close = difflib.get_close_matches(name, _KINDS[kind], n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(_KINDS[kind])}"
            raise ViewError(f"no such {kind} perturbation: got {name!r}; {hint}")
    names = tuple(kinds) or _DEFAULT_KINDS[kind]
    return names[int(_generator(kind, seed, "name").integers(len(names)))]


def jitter_factors(rng: np.random.Generator) -> list[tuple[str, float]]:
    """(property, factor) of `color_jitter`, in the order to apply them."""
    factors = [(name, rng.uniform(low, high)) for name, (low, high) in JITTER.items()]
    return [factors[index] for index in rng.permutation(len(factors))]


def perspective_corners(size: tuple[int, int], rng: np.random.Generator) -> list[Point]:
    """Where the corners go, clockwise from the top left: each up to a tenth of the side (half of 0.2) inwards."""
    width, height = size
    reach_x, reach_y = int(DISTORTION * (width // 2)), int(DISTORTION * (height // 2))
    inset = [(int(rng.integers(reach_x + 1)), int(rng.integers(reach_y + 1))) for _ in range(4)]
    far_x, far_y = width - 1, height - 1
    return [
        (inset[0][0], inset[0][1]),
        (far_x - inset[1][0], inset[1][1]),
        (far_x - inset[2][0], far_y - inset[2][1]),
        (inset[3][0], far_y - inset[3][1]),
    ]


def perspective_coefficients(size: tuple[int, int], corners: Sequence[Point]) -> list[float]:
    """The eight coefficients of the homography from output to input pixels, which sends `corners` to the image's own.

    An output pixel (x, y) shows the input at ((ax + by + c) / (gx + hy + 1), (dx + ey + f) / (gx + hy + 1)).
    """
    far_x, far_y = size[0] - 1, size[1] - 1
    equations, values = [], []
    for (x, y), (u, v) in zip(corners, ((0, 0), (far_x, 0), (far_x, far_y), (0, far_y)), strict=True):
        equations += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    return np.linalg.solve(np.array(equations, float), np.array(values, float)).tolist()


def noise_boxes(size: tuple[int, int], rng: np.random.Generator) -> list[Box]:
    """The patches that `occlusion` covers, all inside the image."""
    return [_box(size, rng.uniform(*NOISE_SIDE), rng.uniform(*NOISE_SIDE), rng) for _ in range(NOISE_PATCHES)]


def crop_box(size: tuple[int, int], rng: np.random.Generator) -> Box:
    """The part that `zoom_crop` keeps; both sides by one factor, so nothing is stretched."""
    share = rng.uniform(*CROP_SIDE)
    return _box(size, share, share, rng)


def _box(size: tuple[int, int], share_x: float, share_y: float, rng: np.random.Generator) -> Box:
    width, height = max(1, round(size[0] * share_x)), max(1, round(size[1] * share_y))
    left, top = int(rng.integers(size[0] - width + 1)), int(rng.integers(size[1] - height + 1))
    return left, top, left + width, top + height


def _view(kind: Kind, image: Image.Image, seed: Seed, kinds: Sequence[str]) -> Image.Image:
    assert image.mode == "RGB", f"a view is made from a decoded RGB image, got mode {image.mode}"
    assert min(image.size) > 1, f"a perturbation needs two pixels a side, got {image.size}"
    view = VIEWS[draw(kind, seed, kinds)](image, _generator(kind, seed, "pixels"))
    assert view.size == image.size, f"the view has size {view.size}, the image {image.size}"
    assert view.mode == "RGB", f"the view has mode {view.mode}"
    return view


def _generator(kind: Kind, seed: Seed, purpose: Literal["name", "pixels"]) -> np.random.Generator:
    """Two streams a seed, so that (name, seed) determine the pixels, whatever the name was drawn from."""
    words = [seed] if isinstance(seed, int | np.integer) else list(seed)
    # The length keeps (1,) and (1, 0) apart, which numpy would pad to the same state.
    return np.random.default_rng([list(_KINDS).index(kind), int(purpose == "pixels"), len(words), *words])
