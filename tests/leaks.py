"""Do trivial cues of the files tell genuine from manipulated pictures, before any model looks?

    python tests/leaks.py SET [--preview PNG]      SET: a folder or list as data.py reads it

A set whose classes differ in JPEG tables or size teaches a model just that. Exit status: 0 no leak,
1 a leak was found, 2 wrong call.
"""
import argparse
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import data                                                     # noqa: E402 (path first)


def accuracy_from(values, labels):
    """Balanced accuracy of guessing n labels (0, 1) from n values; 0.5 is chance [ours]. Ten times,
    each label is guessed from pictures of the same value in the other half of a random split."""
    right = {0: [], 1: []}
    for seed in range(10):
        half = np.random.default_rng(seed).permutation(len(labels)) % 2
        total = Counter(zip(half, labels))
        seen = Counter(zip(half, labels, values))

        for own_half, value, label in zip(half, values, labels):
            other = 1 - own_half
            support = seen[other, label, value] / max(1, total[other, label])
            against = seen[other, 1 - label, value] / max(1, total[other, 1 - label])
            right[label].append(0.5 + 0.5 * np.sign(support - against))         # a tie: half right
    return np.mean([np.mean(right[0]), np.mean(right[1])])


def leaks(pictures):
    """How well cues of the files, without pixels, reveal the class -> {cue: `accuracy_from`}."""
    cues = defaultdict(list)
    for picture in pictures:
        with Image.open(picture.path) as image:
            density = picture.path.stat().st_size / (image.width * image.height)
            cues["format"].append(image.format)
            cues["size"].append(image.size)
            cues["aspect"].append(round(8 * np.log2(image.width / image.height)))
            cues["JPEG tables"].append(str(getattr(image, "quantization", "")))
            cues["bytes per pixel"].append(round(8 * np.log2(density)))
    labels = [picture.label for picture in pictures]
    return {cue: accuracy_from(values, labels) for cue, values in cues.items()}


def contact_sheet(pictures, path, cell=128):
    """Write up to 24 pictures, each beside its mask and above its name, as one image file."""
    shown = pictures[::len(pictures) // 24 + 1]
    width = 2 * cell + 8
    height = cell + 16
    rows = (len(shown) + 2) // 3
    sheet = Image.new("RGB", (3 * width, rows * height), "white")
    draw = ImageDraw.Draw(sheet)

    for i, picture in enumerate(shown):
        x = i % 3 * width
        y = i // 3 * height
        draw.text((x, y + cell), picture.path.name, fill="black")
        sheet.paste(ImageOps.contain(data.open_image(picture.path), (cell, cell)), (x, y))
        if picture.mask:
            mask = ImageOps.contain(data.open_image(picture.mask), (cell, cell))
            sheet.paste(mask, (x + cell, y))
    sheet.save(path)


def run(name, preview):
    """Print how much each cue reveals; draw the preview, if any -> number of leaks."""
    pictures, _, _ = data.read_set(name)
    if preview:
        contact_sheet(pictures, preview)
    pictures = [picture for picture in pictures if picture.label is not None]
    if {picture.label for picture in pictures} != {0, 1}:
        raise data.BadInput(f"found one class or no labels in {name}, expected both classes: there "
                            "is nothing to tell apart")

    found = 0
    for cue, accuracy in leaks(pictures).items():
        verdict = ""
        if accuracy > 0.5 + max(0.1, len(pictures) ** -0.5):
            verdict = ": leak"
            found += 1
        print(f"{cue:16} reveals the class with balanced accuracy {accuracy:.2f} (chance 0.50)"
              f"{verdict}")
    return found


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("set", metavar="SET", help="folder or list of labelled pictures")
    parser.add_argument("--preview", metavar="PNG", help="draw a contact sheet")
    args = parser.parse_args(arguments)
    try:
        return 1 if run(args.set, args.preview) else 0
    except (data.BadInput, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
