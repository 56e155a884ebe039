"""Manipulated pictures made from genuine photos: parts pasted, copied, removed or edited.

    python weights/synthesis.py PHOTOS --out DIR --count 200 [--size 256] [--seed 0] [--preview PNG]
    python train.py --synthesize PHOTOS          the same, made on the fly

All of it is ours. Reading order: edits -> shapes -> a manipulated picture -> training pairs.
A region or outline is an L image of 0 and 255, 255 = manipulated.
"""
import argparse
import csv
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np                                              # noqa: E402 (path first)
from PIL import (Image, ImageChops, ImageDraw, ImageEnhance,    # noqa: E402
                 ImageFilter, ImageOps, ImageStat)

import data                                                     # noqa: E402

HARD = [0] * 128 + [255] * 128                              # alpha of a half and more: the region
INNER = [max(0, 2 * value - 255) for value in range(256)]   # a border soft inside the region only


# ----------------------------------------------------------------------------------------- edits

def brighter(image, rng, strength):
    return ImageEnhance.Brightness(image).enhance(1.12 + 0.35 * strength)


def darker(image, rng, strength):
    return ImageEnhance.Brightness(image).enhance(0.88 - 0.3 * strength)


def contrast(image, rng, strength):
    return ImageEnhance.Contrast(image).enhance(0.55 + 1.1 * strength)


def paler(image, rng, strength):
    return ImageEnhance.Color(image).enhance(0.6 * strength)


def tinted(image, rng, strength):
    colour = tuple(rng.integers(0, 256, 3).tolist())
    return Image.blend(image, Image.new("RGB", image.size, colour), 0.08 + 0.12 * strength)


def blurred(image, rng, strength):
    return image.filter(ImageFilter.GaussianBlur(0.6 + 1.4 * strength))


def sharpened(image, rng, strength):
    return image.filter(ImageFilter.UnsharpMask(1.5, int(80 + 170 * strength), 0))


def noisy(image, rng, strength):
    return data.add_noise(image, 4 + 10 * strength, rng)


def recompressed(image, rng, strength):
    return data.jpeg(image, int(75 - 45 * strength), rng.integers(0, 8, 2))


EDITS = (brighter, darker, contrast, paler, tinted, blurred, sharpened, noisy, recompressed)


def random_edit(image, rng):
    """An image after one of EDITS, of random strength -> (image, its word)."""
    edit = rng.choice(EDITS)
    return edit(image, rng, rng.random()), edit.__name__


# ---------------------------------------------------------------------------------------- shapes

def cut(image, size, rng):
    """A random rectangle of the image, as large as 7-90 % of a picture of `size` (W, H)."""
    side = 0.27 * 3.7 ** rng.random()
    aspect = 2 ** rng.uniform(-0.5, 0.5)
    width = int(np.clip(size[0] * side * aspect, 5, min(image.width, 0.95 * size[0])))
    height = int(np.clip(size[1] * side / aspect, 5, min(image.height, 0.95 * size[1])))
    x = rng.integers(image.width - width + 1)
    y = rng.integers(image.height - height + 1)
    return image.crop((x, y, x + width, y + height))


def object_outline(image, rng):
    """The pixels nearest to a seed in colour and place: roughly what lies in the middle."""
    small = image.resize([max(8, min(side, 72)) for side in image.size])
    colour = np.asarray(small.filter(ImageFilter.BoxBlur(1)), dtype=np.float32)      # (h, w, 3)
    h, w, _ = colour.shape
    i, j = (rng.uniform(0.35, 0.65, 2) * (h, w)).astype(int)
    y = np.linspace(0, 1, h)
    x = np.linspace(0, 1, w)

    distance = ((colour - colour[i, j]) ** 2).sum(2) / (colour.var((0, 1)).sum() + 30)
    distance += 5 * ((y[:, None] - y[i]) ** 2 + (x - x[j]) ** 2)                     # (h, w)
    inside = distance < np.quantile(distance[::2, ::2], rng.uniform(0.35, 0.7))
    inside[[0, -1]] = False
    inside[:, [0, -1]] = False
    region = Image.fromarray(inside).convert("L").filter(ImageFilter.GaussianBlur(2.5))
    return region.resize(image.size, Image.Resampling.BICUBIC).point(HARD)


def polygon_outline(image, rng, corners):
    """A polygon around the middle that touches all four sides."""
    angle = np.sort(rng.uniform(0, 2 * np.pi, corners))
    radius = rng.uniform(0.4, 1, corners)
    points = np.stack([np.cos(angle) * radius, np.sin(angle) * radius], axis=1)      # (n, 2)
    points -= points.min(axis=0)
    points *= (np.array(image.size) - 3) / (points.max(axis=0) + 1e-6)
    region = Image.new("L", image.size)
    ImageDraw.Draw(region).polygon((points + 1).ravel().tolist(), fill=255)
    return region


def random_outline(image, rng):
    """A region inside an image: an object, a blob or a polygon."""
    kind = rng.choice(["object", "blob", "polygon"], p=[0.5, 0.3, 0.2])
    if kind == "object":
        return object_outline(image, rng)
    corners = rng.integers(4, 9)
    if kind == "polygon":
        return polygon_outline(image, rng, corners)
    region = polygon_outline(image, rng, corners + 6)
    return region.filter(ImageFilter.GaussianBlur(min(image.size) / 16)).point(HARD)


def place(stamp, size, rng):
    """An RGBA stamp anywhere on an empty frame of `size` (W, H), partly outside too, so that all
    places are equally likely -> RGBA frame. Tries ten times for 1-50 % of its area."""
    W, H = size
    for _ in range(10):
        frame = Image.new("RGBA", size)
        x = int(rng.integers(1 - stamp.width, W))
        y = int(rng.integers(1 - stamp.height, H))
        frame.paste(stamp, (x, y))
        if 0.01 <= share(frame.getchannel("A").point(HARD)) <= 0.5:
            break
    return frame


def share(region):
    """The share of a region in its frame, in [0, 1]."""
    return region.histogram()[255] / (region.width * region.height)


def fill(photo, region):
    """The photo with the region filled by the colours around it: a pyramid of halved pictures."""
    known = photo.copy()
    known.putalpha(ImageChops.invert(region))        # alpha 0, unknown: does not count in resize
    levels = [known]
    while max(levels[-1].size) > 1:
        half = [(side + 1) // 2 for side in levels[-1].size]
        levels.append(levels[-1].resize(half, Image.Resampling.BOX))

    smooth = levels.pop()
    for known in reversed(levels):
        smooth = smooth.resize(known.size, Image.Resampling.BILINEAR)
        smooth = Image.alpha_composite(smooth, known)
    return smooth.convert("RGB")


# ------------------------------------------------------------------------- a manipulated picture

KINDS = {"splice": 0.5, "copy-move": 0.25, "removal": 0.13, "local edit": 0.12}      # their shares


class Manipulated(NamedTuple):
    """What `synthesize` makes."""
    image: Image.Image       # RGB
    region: Image.Image      # L, 255 = manipulated
    kind: str                # a key of KINDS
    words: list              # what happened to the region beside that


def make_stamp(photo, donor, kind, rng, words):
    """What is pasted: RGBA, cut out of the donor (splice) or of the photo itself."""
    source = donor if kind == "splice" else photo
    stamp = cut(source, photo.size, rng)
    outline = random_outline(stamp, rng)
    if kind == "splice":
        if rng.random() < 0.6:                               # the donor's own JPEG history
            stamp = data.jpeg(stamp, int(rng.integers(50, 99)), rng.integers(0, 8, 2))
        for _ in range(rng.integers(0, 3)):
            stamp, word = random_edit(stamp, rng)
            words.append(word)

    # colours and outline one by one: together, their bicubic overshoot would leave a bright rim
    if rng.random() < 0.4:
        stamp = ImageOps.mirror(stamp)
        outline = ImageOps.mirror(outline)
    if rng.random() < 0.4:
        factor = 2 ** rng.uniform(-0.5, 0.5)
        stamp = ImageOps.scale(stamp, factor)
        outline = ImageOps.scale(outline, factor)
        words.append("enlarged" if factor > 1 else "reduced")
    if rng.random() < 0.4:
        angle = rng.uniform(-60, 60)
        stamp = stamp.rotate(angle, Image.Resampling.BICUBIC, expand=True)
        outline = outline.rotate(angle, Image.Resampling.BICUBIC, expand=True)
        words.append("rotated")
    stamp.putalpha(outline)
    return stamp


def replacement(photo, frame, region, kind, rng, words):
    """What shows inside the region: RGB of the photo's size."""
    if kind == "local edit":
        words.clear()                                        # the stamp only gave its shape
        edited, word = random_edit(photo, rng)
        words.append(word)
        return edited
    if kind == "removal" and rng.random() < 0.5:
        words[:] = ["smooth"]
        return data.add_noise(fill(photo, region), rng.uniform(0, 5), rng)
    if kind == "removal":
        words[:] = ["shifted"]
        left, top, right, bottom = region.getbbox() or (0, 0, 1, 1)
        step = (right - left, 0) if rng.random() < 0.5 else (0, bottom - top)
        return ImageChops.offset(photo, *step)
    return frame.convert("RGB")


def soft_border(region, rng):
    """Half of the regions get a border of 0.5-3 pixels that is soft on its inside -> alpha, L."""
    width = min(rng.uniform(0.5, 3), region.histogram()[255] ** 0.5 / 10)
    if rng.random() < 0.5:
        width = 0
    alpha = region.filter(ImageFilter.GaussianBlur(width)).point(INNER)
    return ImageChops.darker(alpha, region)                  # nothing leaks into its notches


def synthesize(photo, donor, rng, kind=None):
    """Manipulate a photo -> Manipulated; kind: a key of KINDS, None = by chance.

    photo, donor: PIL RGB of any sizes. 1-50 % of the picture change visibly; outside the region
    every pixel stays as it was.
    """
    kind = kind or str(rng.choice(list(KINDS), p=list(KINDS.values())))
    for _ in range(6):
        words = []
        frame = place(make_stamp(photo, donor, kind, rng, words), photo.size, rng)
        region = frame.getchannel("A").point(HARD)
        layer = replacement(photo, frame, region, kind, rng, words)
        image = Image.composite(layer, photo, soft_border(region, rng))
        difference = ImageChops.difference(image, photo).convert("L")
        visible = ImageStat.Stat(difference, region).mean[0] > 3     # less, and nobody could see it
        if visible and 0.01 <= share(region) <= 0.5:
            return Manipulated(image, region, kind, words)

    # a flat picture: make it plain
    other = photo.point([(value + 128) % 256 for value in range(256)] * 3)
    image = Image.composite(other, photo, region)
    return Manipulated(image, region, "local edit", ["inverted"])


# -------------------------------------------------------------------------------- training pairs

class PairSet(data.TrainingSet):
    """Items 2i and 2i + 1 are a crop of a genuine photo and its manipulation, post-processed alike:
    item -> (image (3, size, size) in [0, 1], label, index), as data.TrainingSet gives them.

    count: how many items, an even number. New ones every epoch.
    """

    def __init__(self, photos, *, size, count, seed):
        super().__init__([(photo, 0) for photo in photos], size=size, seed=seed)
        self.labels = [0, 1] * (count // 2)

    def __getitem__(self, index):
        image, _, _ = self.make(index // 2, index % 2)
        return data.to_tensor(image), self.labels[index], index

    def make(self, number, label):
        """One of a pair -> (image PIL RGB, region PIL L of the same size, what was done, words)."""
        rng = self.rng(number)
        size = (self.size, self.size)
        work = self.work_size(rng)                           # `degrade` rescales to self.size
        image, donor = self.windows(work, rng)
        if rng.random() < 0.4:                               # an older JPEG history
            image = data.jpeg(image, int(rng.integers(60, 99)), rng.integers(0, 8, 2))

        region = Image.new("L", size)
        words = []
        if label:
            image, region, kind, words = synthesize(image, donor, rng)
            region = region.resize(size, Image.Resampling.NEAREST)
            words = [kind, *words]
        image = data.degrade(image, size, self.rng(number, 1))       # equal chance for both
        return image, region, words

    def windows(self, work, rng):
        """Random squares of two random photos, resampled to `work` pixels -> two PIL RGB images."""
        images = []
        for i in rng.integers(len(self.photos), size=2):
            side = work
            if rng.random() < 0.5:                           # the other half: no resampling
                side = work * 3 ** rng.random()
            images.append(self.window(self.photo(i), side, work, rng))
        return images


# ---------------------------------------------------------------------------------- command line

def write(pairs, out):
    """Write a PairSet as out/au, out/tp, out/mask and out/list.csv."""
    rows = [("image", "label", "mask", "caption")]
    for folder in ("au", "tp", "mask"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for i in range(len(pairs) // 2):
        name = f"{i:06}.png"
        original, _, _ = pairs.make(i, 0)
        changed, region, words = pairs.make(i, 1)
        for folder, image in (("au", original), ("tp", changed), ("mask", region)):
            image.save(out / folder / name, compress_level=1)
        rows.append((f"au/{name}", 0, "", ""))
        rows.append((f"tp/{name}", 1, f"mask/{name}", ", ".join(words)))
    with open(out / "list.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def main(arguments=None):
    """The command line; returns the exit status: 0 done, 2 wrong call."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("photos", help="folder of genuine photos")
    parser.add_argument("--out", required=True, metavar="DIR", help="new folder for the set")
    parser.add_argument("--count", type=int, default=100, help="pairs (default 100)")
    parser.add_argument("--size", type=int, default=256, help="pixels (default 256)")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--preview", metavar="PNG", help="draw a contact sheet")
    args = parser.parse_args(arguments)
    out = Path(args.out)
    try:
        if args.count < 1 or args.size < 32:
            raise ValueError(f"found --count {args.count} --size {args.size}, expected at least "
                             "1 pair of 32 pixels")
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"found something at {out}, expected a new folder: choose another "
                             "--out")
        pictures, _ = data.read_set(args.photos, masks=False)
        photos = [picture.path for picture in pictures if picture.label != 1]
        if not photos:
            raise ValueError(f"found only manipulated pictures in {args.photos}, expected genuine "
                             "ones: name a folder of photos")
        write(PairSet(photos, size=args.size, count=2 * args.count, seed=args.seed), out)
        if args.preview:
            data.contact_sheet(data.read_set(out)[0], args.preview)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.count} pairs in {out}: au/, tp/, mask/, list.csv")
    return 0


if __name__ == "__main__":
    sys.exit(main())
