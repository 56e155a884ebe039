"""The README's picture: a scene drawn here, manipulated here, and what SAPL answers. Run by hand.

    python tests/scene.py [--checkpoint FILE] [--out tests/scene.png]   and forged.png beside it
"""
import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data                                                     # noqa: E402 (path first)
import infer                                                    # noqa: E402


def fractal(rng, width, height, roughness=0.6):
    """Cloudy noise in [0, 1], (height, width): random grids of doubling size, added up."""
    total = np.zeros((height, width), np.float32)
    for level in range(7):
        grid = Image.fromarray(rng.random((3 * 2 ** level, 4 * 2 ** level), np.float32))
        grid = grid.resize((width, height), Image.Resampling.BICUBIC)
        total += roughness ** level * np.asarray(grid)
    return (total - total.min()) / (total.max() - total.min())


def scene(seed=3, width=448, height=320):
    """Clouds over rolling meadows, softly focused, with a camera's grain -> PIL RGB."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / height
    blue, white = np.array([95, 140, 205]), np.array([240, 238, 235])
    cloud = (2.2 * fractal(rng, width, height) - 0.9).clip(0, 1)[..., None]
    picture = blue + (white - blue) * np.maximum(cloud, y[..., None] / 2)
    for depth, colour in enumerate(((130, 145, 140), (105, 130, 90), (85, 110, 50))):
        line = 0.45 + 0.14 * depth + sum(0.03 * np.sin(x * rng.uniform(2, 9) + rng.uniform(0, 6))
                                         for _ in range(4))
        shade = 0.55 + 0.9 * fractal(rng, width, height, 0.75)[..., None]
        picture = np.where((y > line)[..., None], np.array(colour) * shade, picture)
    image = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
    image = np.asarray(image.filter(ImageFilter.GaussianBlur(0.8)))
    grain = rng.normal(0, 3, (height, width, 1))
    return Image.fromarray((image + grain).clip(0, 255).astype(np.uint8))


def manipulate(image, seed):
    """Paste a part of another such scene, as the training does -> PIL RGB."""
    rng = np.random.default_rng(seed)
    donor = np.asarray(scene(seed=seed + 100))
    return Image.fromarray(data.synthesize(np.asarray(image), donor, rng, "splice")[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint", help="default: the shipped model")
    parser.add_argument("--out", default=str(Path(__file__).with_name("scene.png")))
    parser.add_argument("--seed", type=int, default=2, help="of the manipulation")
    args = parser.parse_args()
    model = infer.SAPL.load(args.checkpoint, "cpu")
    genuine = scene()
    panels = []
    for image in (genuine, manipulate(genuine, args.seed)):
        result = model.localize(image)
        heat = Image.fromarray((255 * result.map + 0.5).astype(np.uint8))
        panels += [image, infer.overlay(image, result, heat)]
        print(f"{result.decision}  {result.score:.3f}  {result.area:.3f}")
    W, H = genuine.size
    sheet = Image.new("RGB", (2 * W + 8, 2 * H + 8), "white")
    for i, panel in enumerate(panels):
        sheet.paste(panel, ((i % 2) * (W + 8), (i // 2) * (H + 8)))
    sheet.save(args.out)
    panels[2].save(Path(args.out).with_name("forged.png"))


if __name__ == "__main__":
    main()
