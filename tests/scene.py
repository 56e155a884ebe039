"""The README's picture: a scene drawn here, manipulated here, and what SAPL answers. Run by hand.

    python tests/scene.py [--checkpoint FILE] [--out tests/scene.png]   and forged.png beside it

Left what SAPL is given, right what it answers; above the scene as it is, below its manipulation.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import infer                                                    # noqa: E402 (path first)
from weights import synthesis                                   # noqa: E402

BLUE = np.array([95, 140, 205])                                 # of the sky
WHITE = np.array([240, 238, 235])                               # of its clouds
HILLS = ((130, 145, 140), (105, 130, 90), (85, 110, 50))        # far to near
GAP = 8                                                         # pixels between the panels


# --------------------------------------------------------------------------------------- drawing

def fractal(rng, width, height, roughness=0.6):
    """Cloudy noise in [0, 1], (height, width): random grids of doubling size, added up."""
    total = np.zeros((height, width), np.float32)
    for level in range(7):
        cells = (3 * 2 ** level, 4 * 2 ** level)
        grid = Image.fromarray(rng.random(cells, np.float32))
        grid = grid.resize((width, height), Image.Resampling.BICUBIC)
        total += roughness ** level * np.asarray(grid)
    return (total - total.min()) / (total.max() - total.min())


def skyline(rng, x, depth):
    """The height of a range of hills at each x, in picture heights from the top."""
    line = 0.45 + 0.14 * depth
    for _ in range(4):
        frequency = rng.uniform(2, 9)
        line = line + 0.03 * np.sin(x * frequency + rng.uniform(0, 6))
    return line


def scene(seed=3, width=448, height=320):
    """Clouds over rolling meadows, softly focused, with a camera's grain -> PIL RGB."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / height                                    # (H, W)

    # sky: clouds, and haze towards the ground
    cloud = (2.2 * fractal(rng, width, height) - 0.9).clip(0, 1)                 # (H, W)
    haze = np.maximum(cloud, y / 2)[..., None]                                   # (H, W, 1)
    picture = BLUE + (WHITE - BLUE) * haze                                       # (H, W, 3)

    # hills, each range in front of the one before
    for depth, colour in enumerate(HILLS):
        below = y > skyline(rng, x, depth)                                       # (H, W)
        shade = 0.55 + 0.9 * fractal(rng, width, height, 0.75)                   # (H, W)
        hill = np.array(colour) * shade[..., None]                               # (H, W, 3)
        picture = np.where(below[..., None], hill, picture)

    # camera
    image = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
    image = np.asarray(image.filter(ImageFilter.GaussianBlur(0.8)))              # (H, W, 3)
    grain = rng.normal(0, 3, (height, width, 1))
    return Image.fromarray((image + grain).clip(0, 255).astype(np.uint8))


def manipulate(image, seed):
    """Paste a part of another such scene, as the training does -> PIL RGB."""
    rng = np.random.default_rng(seed)
    donor = scene(seed=seed + 100)
    return synthesis.synthesize(image, donor, rng, "splice").image


# ---------------------------------------------------------------------------------- the picture

def arrange(rows):
    """Rows of PIL RGB panels, rows equally wide -> one picture on white."""
    strips = []
    for row in rows:
        width = sum(panel.width for panel in row) + GAP * (len(row) - 1)
        height = max(panel.height for panel in row)
        strip = Image.new("RGB", (width, height), "white")
        x = 0
        for panel in row:
            strip.paste(panel, (x, 0))
            x += panel.width + GAP
        strips.append(strip)

    height = sum(strip.height for strip in strips) + GAP * (len(strips) - 1)
    sheet = Image.new("RGB", (strips[0].width, height), "white")
    y = 0
    for strip in strips:
        sheet.paste(strip, (0, y))
        y += strip.height + GAP
    return sheet


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--checkpoint", metavar="FILE", help="default: the shipped model")
    parser.add_argument("--out", default=str(Path(__file__).with_name("scene.png")))
    parser.add_argument("--seed", type=int, default=2, help="of the manipulation (default 2)")
    args = parser.parse_args()

    model = infer.SAPL.load(args.checkpoint, "cpu")
    genuine = scene()
    forged = manipulate(genuine, args.seed)
    rows = []
    for name, image in (("the scene", genuine), ("manipulated", forged)):
        result = model.localize(image)
        rows.append((image, infer.overlay(image, result)))
        print(f"{name:12} {result.decision:12} score {result.score:.2f}  {result.area:.0%} marked")

    forged.save(Path(args.out).with_name("forged.png"))
    arrange(rows).save(args.out)


if __name__ == "__main__":
    main()
