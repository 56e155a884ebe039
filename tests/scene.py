"""The README's picture: a scene drawn here, manipulated here, and what SAPL answers. Run by hand.

    python tests/scene.py [--checkpoint FILE] [--out tests/scene.png]
"""
import argparse
import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import infer                                                    # noqa: E402 (path first)


def scene(seed=3, width=448, height=320):
    """A hilly landscape with a lake and trees, with grain -> PIL RGB."""
    rng = np.random.default_rng(seed)
    y = np.linspace(0, 1, height)[:, None, None]
    sky = (1 - y) * np.array([110, 150, 215]) + y * np.array([235, 215, 200])       # (height, 1, 3)
    image = Image.fromarray(np.broadcast_to(sky, (height, width, 3)).astype(np.uint8).copy())
    draw = ImageDraw.Draw(image)
    draw.ellipse((330, 30, 370, 70), fill=(255, 240, 200))
    x = np.arange(width)
    for level, colour in ((150, (120, 135, 150)), (180, (95, 120, 105)), (215, (80, 115, 70))):
        line = level + sum(rng.uniform(4, 16) * np.sin(x / rng.uniform(20, 90) + rng.uniform(0, 6))
                           for _ in range(4))
        draw.polygon([(0, height), *zip(x.tolist(), line.tolist()), (width, height)], fill=colour)
    draw.ellipse((40, 250, 260, 300), fill=(120, 160, 190))
    for _ in range(26):
        cx, cy = rng.uniform(0, width), rng.uniform(235, 300)
        size = (cy - 190) / 5
        draw.rectangle((cx - 1, cy - size / 2, cx + 1, cy + size / 2), fill=(70, 50, 35))
        shade = rng.uniform(0.7, 1.2)
        draw.polygon([(cx, cy - 2 * size), (cx - size * 0.6, cy), (cx + size * 0.6, cy)],
                     fill=tuple(int(v * shade) for v in (45, 85, 45)))
    texture = rng.normal(0, 9, (height // 2, width // 2, 1)).repeat(2, 0).repeat(2, 1)
    grain = rng.normal(0, 4, (height, width, 3))
    array = np.asarray(image.filter(ImageFilter.GaussianBlur(0.7))) + texture * (y > 0.5) + grain
    return Image.fromarray(array.clip(0, 255).astype(np.uint8))


def manipulate(image):
    """Paste a balloon from elsewhere: sharper, less grainy, another compression -> PIL RGB."""
    big = Image.new("RGBA", (240, 320))
    draw = ImageDraw.Draw(big)
    for i, colour in enumerate(((200, 60, 50), (240, 200, 90), (200, 60, 50), (60, 90, 160))):
        draw.ellipse((10 + 28 * i, 10, 230 - 28 * i, 230), fill=colour)
    draw.line((70, 215, 100, 280), fill=(60, 40, 30), width=4)
    draw.line((170, 215, 140, 280), fill=(60, 40, 30), width=4)
    draw.rectangle((98, 276, 142, 310), fill=(120, 80, 50))
    balloon = big.resize((90, 120), Image.Resampling.LANCZOS)
    forged = image.copy()
    forged.paste(balloon, (150, 60), balloon)
    buffer = io.BytesIO()
    forged.save(buffer, "JPEG", quality=92)
    return Image.open(buffer).convert("RGB")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint", help="default: the shipped model")
    parser.add_argument("--out", default=str(Path(__file__).with_name("scene.png")))
    args = parser.parse_args()
    model = infer.SAPL.load(args.checkpoint, "cpu")
    genuine = scene()
    panels = []
    for image in (genuine, manipulate(genuine)):
        result = model.localize(image)
        heat = Image.fromarray((255 * result.map + 0.5).astype(np.uint8))
        panels += [image, infer.overlay(image, result, heat)]
        print(f"{result.decision}  {result.score:.3f}  {result.area:.3f}")
    W, H = genuine.size
    sheet = Image.new("RGB", (2 * W + 8, 2 * H + 8), "white")
    for i, panel in enumerate(panels):
        sheet.paste(panel, ((i % 2) * (W + 8), (i // 2) * (H + 8)))
    sheet.save(args.out)


if __name__ == "__main__":
    main()
