"""Perturbations: parameters in their published ranges, pixels as defined, the draw repeatable in any process."""

import hashlib
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from megatron_cppo.data import views

SIZES = [(28, 28), (8, 24), (140, 85), (301, 57), (2, 2)]


def picture(width: int, height: int) -> Image.Image:
    """Smooth colours under some noise, so that every perturbation shows."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    noise = np.random.default_rng(3).uniform(-30, 30, (height, width, 3))
    colours = 255 * np.stack([x, y, 1 - x * y], axis=2) + noise
    return Image.fromarray(colours.clip(0, 255).astype(np.uint8))


def digest(image: Image.Image) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()


@pytest.mark.parametrize("name", views.VIEWS)
@pytest.mark.parametrize("size", SIZES)
def test_size_and_mode_are_kept_and_the_seed_decides(name, size):
    image = picture(*size)
    before = digest(image)
    outcomes = [views.VIEWS[name](image, np.random.default_rng(seed)) for seed in [*range(12), *range(12)]]
    assert {(view.size, view.mode) for view in outcomes} == {(size, "RGB")}
    digests = [digest(view) for view in outcomes]
    assert digests[:12] == digests[12:]
    assert digest(image) == before, "the original must not change"
    if min(size) >= 28:
        assert len(set(digests[:12])) >= 4


@pytest.mark.parametrize("name", views.REMOVING)
def test_removing_views_always_change_the_image(name):
    image = picture(140, 84)
    for seed in range(20):
        changed_HW = (np.asarray(views.VIEWS[name](image, np.random.default_rng(seed))) != np.asarray(image)).any(
            axis=2
        )
        assert changed_HW.mean() > 0.2


@pytest.mark.parametrize("name", ["color_jitter", "perspective", "rotation"])
def test_grey_images_stay_grey(name):
    grey = picture(60, 60).convert("L").convert("RGB")
    for seed in range(10):
        pixels_HWC = np.asarray(views.VIEWS[name](grey, np.random.default_rng(seed)))
        assert np.array_equal(pixels_HWC[:, :, 0], pixels_HWC[:, :, 1])
        assert np.array_equal(pixels_HWC[:, :, 0], pixels_HWC[:, :, 2])


def blend(image_HWC: np.ndarray, reference_HWC: np.ndarray, factor: float) -> np.ndarray:
    """torchvision's `_blend`: factor · image + (1 − factor) · reference, clamped to 0..255, cut to integers."""
    mixed = image_HWC.astype(float) * factor + (1.0 - factor) * reference_HWC.astype(float)
    return mixed.clip(0, 255).astype(np.uint8)


def grey_of(image_HWC: np.ndarray) -> np.ndarray:
    """ITU-R 601-2 luma, the grey scale of torchvision and Pillow."""
    luma_HW = image_HWC.astype(float) @ np.array([0.299, 0.587, 0.114])
    return np.repeat(luma_HW[:, :, None], 3, axis=2)


@pytest.mark.parametrize("seed", range(8))
def test_color_jitter_is_torchvisions_definition(seed):
    """Within one of 255 levels for each of the three operations, all of which Pillow cuts to integers."""
    image = picture(50, 40)
    expected = np.asarray(image)
    for name, factor in views.jitter_factors(np.random.default_rng(seed)):
        grey = grey_of(expected)
        references = {
            "brightness": np.zeros_like(expected),
            "contrast": np.full_like(expected, int(np.floor(grey).mean() + 0.5)),
            "saturation": grey,
        }
        expected = blend(expected, references[name], factor)
    jittered = np.asarray(views.color_jitter(image, np.random.default_rng(seed))).astype(int)
    # A level of rounding in one operation is scaled by the factors of those that follow, at most 1.8 twice.
    assert np.abs(jittered - expected).max() <= 1 + 1.8 + 1.8**2
    assert np.abs(jittered - expected).mean() < 0.6


def test_each_color_operation_matches_to_a_level():
    image = picture(50, 40)
    pixels, grey = np.asarray(image), grey_of(np.asarray(image))
    mean = np.full_like(pixels, int(np.floor(grey).mean() + 0.5))
    operations = [
        (ImageEnhance.Brightness, np.zeros_like(pixels)),
        (ImageEnhance.Contrast, mean),
        (ImageEnhance.Color, grey),
    ]
    assert list(views._ENHANCERS.values()) == [operation for operation, _ in operations]
    for operation, reference in operations:
        for factor in (0.2, 0.77, 1.0, 1.3, 1.8):
            difference = np.asarray(operation(image).enhance(factor)).astype(int) - blend(pixels, reference, factor)
            assert np.abs(difference).max() <= 1


def test_jitter_factors_cover_their_ranges_in_every_order():
    drawn = [views.jitter_factors(np.random.default_rng(seed)) for seed in range(2000)]
    for name, (low, high) in (("brightness", (0.2, 1.3)), ("contrast", (0.2, 1.8)), ("saturation", (0.2, 1.8))):
        factors = np.array([dict(pairs)[name] for pairs in drawn])
        assert factors.min() >= low
        assert factors.max() <= high
        assert factors.min() < low + 0.01
        assert factors.max() > high - 0.01
        assert abs(factors.mean() - (low + high) / 2) < 0.04
    orders = Counter(tuple(name for name, _ in pairs) for pairs in drawn)
    assert len(orders) == 6
    assert min(orders.values()) > 250


def test_perspective_corners_move_inwards_by_at_most_a_tenth():
    width, height = 200, 101
    corners_4SP = np.array(
        [views.perspective_corners((width, height), np.random.default_rng(seed)) for seed in range(1000)]
    ).transpose(1, 0, 2)
    reach = np.array([20, 10])
    home = np.array([(0, 0), (width - 1, 0), (width - 1, height - 1), (0, height - 1)])
    inwards = np.array([(1, 1), (-1, 1), (-1, -1), (1, -1)])
    for corner_SP, start, direction in zip(corners_4SP, home, inwards, strict=True):
        moved = (corner_SP - start) * direction
        assert moved.min() == 0
        assert (moved.max(axis=0) == reach).all()


def test_perspective_maps_the_drawn_corners_to_the_image_corners():
    size = (120, 90)
    corners = views.perspective_corners(size, np.random.default_rng(5))
    a, b, c, d, e, f, g, h = views.perspective_coefficients(size, corners)
    sources = []
    for x, y in corners:
        depth = g * x + h * y + 1
        sources.append(((a * x + b * y + c) / depth, (d * x + e * y + f) / depth))
    np.testing.assert_allclose(sources, [(0, 0), (119, 0), (119, 89), (0, 89)], atol=1e-9)
    np.testing.assert_allclose(
        views.perspective_coefficients(size, [(0, 0), (119, 0), (119, 89), (0, 89)]),
        [1, 0, 0, 0, 1, 0, 0, 0],
        atol=1e-12,
    )


def test_perspective_is_applied_half_of_the_time():
    image = picture(60, 60)
    unchanged = sum(
        views.perspective(image, np.random.default_rng(seed)).tobytes() == image.tobytes() for seed in range(400)
    )
    assert 150 < unchanged < 250


def test_rotation_angles_lie_within_ten_degrees_and_reach_them():
    """The angle is read off the picture: a dot right of the centre moves up by the sine of the angle."""
    image = Image.new("RGB", (201, 201))
    image.paste((255, 255, 255), (180, 98, 185, 103))
    angles = []
    for seed in range(200):
        weights_HW = np.asarray(views.rotation(image, np.random.default_rng(seed)))[:, :, 0].astype(float)
        ys, xs = np.mgrid[:201, :201]
        y, x = (ys * weights_HW).sum() / weights_HW.sum(), (xs * weights_HW).sum() / weights_HW.sum()
        angles.append(np.degrees(np.arctan2(100 - y, x - 100)))
    assert -10.1 < min(angles) < -9.5
    assert 9.5 < max(angles) < 10.1
    assert abs(np.mean(angles)) < 1.5


def test_noise_patches():
    width, height = 400, 200
    boxes_SB4 = np.array([views.noise_boxes((width, height), np.random.default_rng(seed)) for seed in range(100)])
    assert boxes_SB4.shape == (100, 50, 4)
    left, top, right, bottom = boxes_SB4.reshape(-1, 4).T
    assert min(left.min(), top.min()) == 0
    assert (right.max(), bottom.max()) == (width, height)
    for sides, full in ((right - left, width), (bottom - top, height)):
        assert sides.min() == round(0.05 * full)
        assert sides.max() == round(0.15 * full)
        assert abs(sides.mean() / full - 0.10) < 0.002


def test_occlusion_is_uniform_noise_inside_the_boxes_and_nothing_outside():
    image = Image.new("RGB", (400, 300), (7, 7, 7))
    boxes = views.noise_boxes(image.size, np.random.default_rng(2))
    covered_HW = np.zeros((300, 400), bool)
    for left, top, right, bottom in boxes:
        covered_HW[top:bottom, left:right] = True
    pixels_HWC = np.asarray(views.occlusion(image, np.random.default_rng(2)))
    assert (pixels_HWC[~covered_HW] == 7).all()
    noise = pixels_HWC[covered_HW].astype(float)
    assert abs(noise.mean() - 127.5) < 1.0
    assert abs(noise.std() - 73.9) < 1.0
    assert abs(np.corrcoef(noise[:, 0], noise[:, 1])[0, 1]) < 0.02
    assert 0.25 < covered_HW.mean() < 0.5


def test_zoom_crop_keeps_60_to_70_percent_of_each_side_and_shows_it_whole():
    width, height = 500, 250
    boxes = np.array([views.crop_box((width, height), np.random.default_rng(seed)) for seed in range(500)])
    left, top, right, bottom = boxes.T
    share_x, share_y = (right - left) / width, (bottom - top) / height
    assert 0.6 <= share_x.min() < 0.61
    assert 0.69 < share_x.max() <= 0.7
    assert np.abs(share_x - share_y).max() <= 0.004, "both sides by one factor, up to rounding"
    assert (left.min(), top.min()) == (0, 0)
    assert (right.max(), bottom.max()) == (width, height)
    image = picture(100, 50)
    box = views.crop_box(image.size, np.random.default_rng(1))
    expected = image.crop(box).resize(image.size, Image.Resampling.BICUBIC)
    assert views.zoom_crop(image, np.random.default_rng(1)).tobytes() == expected.tobytes()


def test_blacken_hides_whole_patches_of_14_pixels():
    image = Image.new("RGB", (14 * 40 + 5, 14 * 30), (9, 9, 9))
    pixels_HW = np.asarray(views.blacken(image, np.random.default_rng(0)))[:, :, 0]
    patches = pixels_HW[:, : 14 * 40].reshape(30, 14, 40, 14)
    assert (patches.min(axis=(1, 3)) == patches.max(axis=(1, 3))).all()
    assert abs((patches[:, 0, :, 0] == 0).mean() - 0.6) < 0.04
    assert set(np.unique(pixels_HW[:, 14 * 40 :])) == {0, 9}, "the ragged last column is patched as well"


def test_the_draw_is_even_and_named():
    image = picture(40, 40)
    for kind, function, names in (
        ("preserving", views.preserving, ("color_jitter", "perspective", "rotation")),
        ("removing", views.removing, ("occlusion", "zoom_crop")),
    ):
        drawn = Counter(views.draw(kind, (11, epoch, row)) for epoch in range(10) for row in range(120))
        assert set(drawn) == set(names)
        assert min(drawn.values()) > 0.8 * 1200 / len(names)
        for seed in range(6):
            name = views.draw(kind, seed)
            assert function(image, seed).tobytes() == function(image, seed, kinds=(name,)).tobytes()
            assert views.draw(kind, seed, kinds=(name,)) == name
    assert views.draw("removing", 0, kinds=("blacken",)) == "blacken"
    assert views.removing(image, 0, kinds=("blacken",)).tobytes() != views.removing(image, 1, ("blacken",)).tobytes()


def test_unknown_perturbations_are_refused_with_a_suggestion():
    image = picture(30, 30)
    with pytest.raises(views.ViewError, match="got 'oclusion'; did you mean 'occlusion'"):
        views.removing(image, 0, kinds=("oclusion",))
    with pytest.raises(
        views.ViewError, match="no such preserving perturbation: got 'occlusion'; choose from color_jitter"
    ):
        views.draw("preserving", 0, kinds=("occlusion",))


def test_undecoded_images_are_a_programming_error():
    with pytest.raises(AssertionError, match="got mode L"):
        views.preserving(Image.new("L", (30, 30)), 0)


def test_seeds_of_different_shape_and_kind_are_different():
    image = picture(40, 40)
    seeds = [0, 1, (0, 0), (1, 0), (0, 1), (1, 0, 0), (3, 1, 2**40, 0), (3, 1, 2**40, 1)]
    assert len({digest(views.removing(image, seed, ("occlusion",))) for seed in seeds}) == len(seeds)
    assert (
        digest(views.removing(image, np.int64(1)))
        == digest(views.removing(image, 1))
        == digest(views.removing(image, [1]))
    )


def test_another_process_makes_the_same_pixels():
    program = (
        "from tests.unit.test_views import picture, digest\n"
        "from megatron_cppo.data import views\n"
        "image = picture(84, 56)\n"
        "for seed in range(12):\n"
        "    print(digest(views.preserving(image, (7, seed))), digest(views.removing(image, (7, seed))))\n"
    )
    there = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    image = picture(84, 56)
    pairs = [(views.preserving(image, (7, seed)), views.removing(image, (7, seed))) for seed in range(12)]
    assert there == [digest(view) for pair in pairs for view in pair]
