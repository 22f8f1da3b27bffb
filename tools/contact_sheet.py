"""Render docs/views.png: a few images under every perturbation of `megatron_cppo.data.views`.

    python tools/contact_sheet.py docs/views.png [IMAGE ...]

Without images: the two photographs that come with scikit-learn, and six of its scanned digits.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits, load_sample_images

from megatron_cppo.data import views
from megatron_cppo.data.images import decode

CELL = (216, 144)
GAP, MARGIN, GROUP_GAP = 8, 24, 18
TITLE_HEIGHT, LABEL_HEIGHT = 30, 26
SEED = 4
PAPER, INK = (255, 255, 255), (60, 64, 72)
GROUPS = (
    ("", (120, 124, 132), ("original",)),
    ("information-preserving", (38, 128, 90), tuple(views.PRESERVING)),
    ("information-removing", (188, 62, 52), tuple(views.REMOVING)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("images", type=Path, nargs="*")
    arguments = parser.parse_args()
    images = [decode(path) for path in arguments.images] or [*photographs(), digits()]
    sheet = contact_sheet([fill(image, (480, 320)) for image in images])
    # 256 colours: noise does not compress, and no one reads colours off a contact sheet. The paper stays white.
    sheet = sheet.quantize(palette=sheet.quantize(256), dither=Image.Dither.FLOYDSTEINBERG)
    colours = np.array(sheet.getpalette()).reshape(-1, 3)
    colours[np.asarray(sheet)[0, 0]] = PAPER
    sheet.putpalette(colours.ravel().tolist())
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(arguments.output, optimize=True)
    print(f"{arguments.output}: {sheet.width} x {sheet.height}, {arguments.output.stat().st_size / 1000:.0f} kB")


def contact_sheet(images: list[Image.Image]) -> Image.Image:
    """One row an image, one column a perturbation, the columns grouped by what they do to the information."""
    columns = sum(len(names) for _, _, names in GROUPS)
    width = 2 * MARGIN + columns * (CELL[0] + GAP) - GAP + (len(GROUPS) - 1) * GROUP_GAP
    top = MARGIN + TITLE_HEIGHT + LABEL_HEIGHT
    sheet = Image.new("RGB", (width, top + len(images) * (CELL[1] + GAP) - GAP + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    title_font, label_font = ImageFont.load_default(17), ImageFont.load_default(15)
    left = MARGIN
    for title, colour, names in GROUPS:
        right = left + len(names) * (CELL[0] + GAP) - GAP
        if title:
            draw.text(((left + right) / 2, MARGIN), title, colour, title_font, anchor="mt")
            draw.line((left, MARGIN + TITLE_HEIGHT - 6, right, MARGIN + TITLE_HEIGHT - 6), colour, 2)
        for name in names:
            draw.text((left + CELL[0] / 2, top - 9), name.replace("_", " "), INK, label_font, anchor="ms")
            for row, image in enumerate(images):
                cell = perturbed(image, name, row).resize(CELL, Image.Resampling.LANCZOS)
                sheet.paste(cell, (left, top + row * (CELL[1] + GAP)))
            left += CELL[0] + GAP
        left += GROUP_GAP
    return sheet


def perturbed(image: Image.Image, name: str, row: int) -> Image.Image:
    """The view of the first seed that shows something: `perspective` leaves half of the images as they are."""
    if name == "original":
        return image
    candidates = (views.VIEWS[name](image, np.random.default_rng((SEED, row, attempt))) for attempt in range(20))
    return next(view for view in candidates if view.tobytes() != image.tobytes())


def photographs() -> list[Image.Image]:
    return [Image.fromarray(pixels_HWC) for pixels_HWC in load_sample_images().images]


def digits() -> Image.Image:
    """Six scans of 8 x 8 pixels, two rows of three, on dark ground."""
    scans_6HW = load_digits().images[10:16] / 16.0
    canvas = Image.new("RGB", (480, 320), (18, 20, 28))
    for index, scan_HW in enumerate(scans_6HW):
        scan = Image.fromarray((255 * scan_HW).astype(np.uint8)).resize((128, 128), Image.Resampling.BICUBIC)
        place = (16 + 160 * (index % 3), 16 + 160 * (index // 3))
        canvas.paste(Image.new("RGB", scan.size, (240, 236, 220)), place, scan)
    return canvas


def fill(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The largest centred part of that shape, at that size."""
    scale = min(image.width / size[0], image.height / size[1])
    width, height = size[0] * scale, size[1] * scale
    left, top = (image.width - width) / 2, (image.height - height) / 2
    return image.resize(size, Image.Resampling.LANCZOS, box=(left, top, left + width, top + height))


if __name__ == "__main__":
    main()
