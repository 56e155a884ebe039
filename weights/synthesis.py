"""Make manipulated pictures from genuine photos: paste, copy, remove or edit a part of each.

    python weights/synthesis.py PHOTOS --out DIR --count 200 [--size 256] [--seed 0]

train.py and weights/make.py call the same functions, on a CPU or a GPU. All of it is ours.
Reading order: tools -> JPEG -> edits and wear -> outlines and stamps -> splices -> command line.

Images are floats (n, 3, S, S) holding whole numbers of 0-255; regions are (n, S, S), internally
(n, 1, S, S), 1 = manipulated. A NumPy generator, rng, makes the choices; noise and colours come
from torch's own.
"""
import argparse
import csv
import math
import sys
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np                                              # noqa: E402 (path first)
import torch                                                    # noqa: E402
import torch.nn.functional as F                                 # noqa: E402
from PIL import Image, ImageDraw                                # noqa: E402

import data                                                     # noqa: E402

KINDS = {"splice": 0.5, "copy-move": 0.25, "removal": 0.13, "local edit": 0.12}      # their shares


# ----------------------------------------------------------------------------------------- tools

def column(numbers, images):
    """One number, or one per image -> float tensor (n, 1, 1, 1) on the device of the images."""
    numbers = torch.as_tensor(numbers, dtype=torch.float32, device=images.device)
    return numbers.view(-1, 1, 1, 1)


def either(chosen, first, second):
    """The first images where chosen, (n,) bool, is true, the second ones elsewhere."""
    return torch.where(column(chosen, first) > 0, first, second)


def rounded(images):
    return images.round().clamp(0, 255)


def apply(edit, images, chosen, *own):
    """Edit the chosen images, (n,) bool, in place. own: further arguments, tensors of n rows."""
    places = torch.as_tensor(np.flatnonzero(chosen), device=images.device)
    if len(places) > 0:
        own = [rows[places] for rows in own]
        edited = edit(images[places], *own)
        images[places] = rounded(edited)


def tell(words, chosen, word):
    """Add a word to the lists, n of them, of the chosen images."""
    for i in np.flatnonzero(chosen):
        words[i].append(word)


def blur(images, sigma):
    """Gaussian blur of square images; sigma: pixels, one number or one per image."""
    sigma = column(sigma, images)                                              # (n, 1, 1, 1)
    pixel = torch.arange(images.shape[-1], device=images.device)
    distance = pixel[:, None] - pixel                                          # (S, S)
    kernel = torch.exp(-0.5 * (distance / sigma) ** 2)                         # (n, 1, S, S)
    kernel = kernel / kernel.sum(dim=-1, keepdim=True)
    return kernel @ images @ kernel.mT


def sample(images, y, x, mode):
    """Interpolate images at y (n, h, 1 or w) and x (n, 1 or h, w) -> (n, C, h, w); pixel i covers
    i to i + 1, and outside the images lie zeros."""
    H, W = images.shape[-2:]
    y = 2 * y / H - 1
    x = 2 * x / W - 1
    grid = torch.stack(torch.broadcast_tensors(x, y), dim=-1)                  # (n, h, w, 2)
    return F.grid_sample(images, grid, mode, "zeros", align_corners=False)


# ------------------------------------------------------------------------------------------ JPEG

LUMINANCE = """
    16 11 10 16  24  40  51  61
    12 12 14 19  26  58  60  55
    14 13 16 24  40  57  69  56
    14 17 22 29  51  87  80  62
    18 22 37 56  68 109 103  77
    24 35 55 64  81 104 113  92
    49 64 78 87 103 121 120 101
    72 92 95 98 112 100 103  99"""       # at quality 50, from the standard's annex K
CHROMINANCE = """
    17 18 24 47 99 99 99 99
    18 21 26 66 99 99 99 99
    24 26 56 99 99 99 99 99
    47 66 99 99 99 99 99 99
    99 99 99 99 99 99 99 99
    99 99 99 99 99 99 99 99
    99 99 99 99 99 99 99 99
    99 99 99 99 99 99 99 99"""
YCC = torch.tensor([
    [0.299, 0.587, 0.114],
    [-0.168736, -0.331264, 0.5],
    [0.5, -0.418688, -0.081312]])        # RGB -> Y, Cb, Cr


def cosines():
    """The matrix (8, 8) of the discrete cosine transform."""
    frequency = torch.arange(8)[:, None]
    place = torch.arange(8) + 0.5
    matrix = torch.cos(frequency * place * math.pi / 8) / 2
    matrix[0] = 8 ** -0.5
    return matrix


def mixed(matrix, images):
    """Multiply the colours of each pixel by a matrix (k, 3)."""
    return torch.einsum("ij,njhw->nihw", matrix.to(images.device), images)


def quantized(planes, table, quality):
    """Round the cosine coefficients of planes (n, C, H, W), H and W multiples of 8, like JPEG."""
    quality = column(quality, planes).floor()                                  # (n, 1, 1, 1)
    percent = torch.where(quality < 50, (5000 / quality).floor(), 200 - 2 * quality)
    table = np.array(table.split(), dtype=int)
    table = column(table, planes).view(8, 8)
    steps = (table * percent / 100 + 0.5).floor().clamp(1, 255)                # (n, 1, 8, 8)
    steps = steps[:, :, None, None]                                            # (n, 1, 1, 1, 8, 8)
    dct = cosines().to(planes.device)
    blocks = planes.unflatten(2, (-1, 8))                                      # (n, C, h, 8, W)
    blocks = blocks.unflatten(4, (-1, 8))                                      # (n, C, h, 8, w, 8)
    blocks = blocks.transpose(3, 4)                                            # (n, C, h, w, 8, 8)
    coefficients = dct @ blocks @ dct.T
    coefficients = (coefficients / steps).round() * steps
    blocks = (dct.T @ coefficients @ dct).round()
    return blocks.transpose(3, 4).reshape(planes.shape)


def jpeg(images, quality, shift, subsampled):
    """Encode and decode images, within about a grey level of libjpeg.

    quality: n numbers in 1-100; shift: (y, x) of the 8x8 grid, pixels; subsampled: 4:2:0.
    """
    S = images.shape[-1]
    y, x = shift
    border = (x, -(S + x) % 16, y, -(S + y) % 16)            # to whole blocks of 16 x 16
    padded = F.pad(images, border, mode="replicate")                           # (n, 3, H', W')
    ycc = mixed(YCC, padded).round()
    light, colours = ycc.split([1, 2], dim=1)                # (n, 1, H', W'), (n, 2, H', W')
    light = quantized(light - 128, LUMINANCE, quality) + 128
    if subsampled:
        colours = F.avg_pool2d(colours, 2).round()
    colours = quantized(colours, CHROMINANCE, quality).clamp(-128, 127)
    if subsampled:
        colours = F.interpolate(colours, scale_factor=2, mode="bilinear").round()
    ycc = torch.cat([light.clamp(0, 255), colours], dim=1)                     # (n, 3, H', W')
    decoded = rounded(mixed(torch.linalg.inv(YCC), ycc))
    return decoded[:, :, y:y + S, x:x + S]


def compress(images, chosen, quality, rng):
    """JPEG-compress the chosen images in place: quality (n,), one random grid for all."""
    shift = rng.integers(0, 8, 2)
    subsampled = rng.random() < 0.5

    def edit(part, quality):
        return jpeg(part, quality, shift, subsampled)

    apply(edit, images, chosen, column(quality, images))


# -------------------------------------------------------------------------------- edits and wear

def grey(images):
    """Luminance, (n, 1, S, S)."""
    return mixed(YCC[:1], images)


def add_noise(images, sigma):
    return images + sigma * torch.randn_like(images)


def contrast(x, s):
    mean = grey(x).mean(dim=(2, 3), keepdim=True)
    return torch.lerp(mean, x, 0.55 + 1.1 * s)


def tinted(x, s):
    colour = 255 * torch.rand_like(x[:, :, :1, :1])
    return torch.lerp(x, colour, 0.08 + 0.12 * s)


def balanced(x, s):
    """Change the white balance: each channel gets its own gain."""
    gain = torch.randn_like(x[:, :, :1, :1])
    return x * torch.exp((0.05 + 0.15 * s) * gain)


EDITS = {                                # x: images, s: strengths (n, 1, 1, 1) in [0, 1]
    "brighter": lambda x, s: x * (1.12 + 0.35 * s),
    "darker": lambda x, s: x * (0.88 - 0.3 * s),
    "contrast": contrast,
    "paler": lambda x, s: torch.lerp(grey(x), x, 0.6 * s),
    "tinted": tinted,
    "balanced": balanced,
    "blurred": lambda x, s: blur(x, 0.6 + 1.4 * s),
    "sharpened": lambda x, s: torch.lerp(blur(x, 1.5), x, 1.8 + 1.7 * s),
    "noisy": lambda x, s: add_noise(x, 4 + 10 * s),
    "recompressed": lambda x, s: jpeg(x, 75 - 45 * s, shift=(0, 0), subsampled=True)}


def random_edits(images, chosen, rng, words):
    """Apply one of EDITS to each of the chosen images, in place, and note it in their words."""
    names = rng.choice(list(EDITS), len(images))
    strength = column(rng.random(len(images)), images)
    for name, edit in EDITS.items():
        ours = chosen & (names == name)
        apply(edit, images, ours, strength)
        tell(words, ours, name)


def edit_history(images, chosen, rng, words):
    """JPEG-compress and edit the chosen images, in place, and note it in their words."""
    n = len(images)
    coded = chosen & (rng.random(n) < 0.6)
    quality = rng.integers(50, 99, n)
    compress(images, coded, quality, rng)
    for i in np.flatnonzero(coded):
        words[i].append(f"quality {quality[i] // 10 * 10}")
    steps = rng.integers(0, 3, n)
    random_edits(images, chosen & (steps > 0), rng, words)
    random_edits(images, chosen & (steps > 1), rng, words)


@torch.no_grad()
def older_jpeg(images, rng):
    """Copies of the images, 40 % of them compressed with quality 60-98."""
    n = len(images)
    images = images.clone()
    chosen = rng.random(n) < 0.4
    quality = rng.integers(60, 99, n)
    compress(images, chosen, quality, rng)
    return images


def rescale(images, rng):
    """Reduce images to 44-87 % and enlarge them again, for the traces of resampling."""
    S = images.shape[-1]
    small = round(S / 2 ** rng.uniform(0.2, 1.2))
    images = F.interpolate(images, small, mode="bicubic", antialias=True)
    return F.interpolate(rounded(images), S, mode="bicubic", antialias=True)


@torch.no_grad()
def wear(images, rng):
    """Simulate re-shared pictures: copies of the images, nearly half of them rescaled, blurred,
    noisy or compressed. Except for the noise, the same rng state gives the same treatment."""
    images = images.clone()
    n = len(images)
    worn = rng.random(n) < 0.5
    rescaled = worn & (rng.random(n) < 0.1)
    apply(lambda part: rescale(part, rng), images, rescaled)
    sigma = column(0.3 * 13 ** rng.random(n), images)
    apply(blur, images, worn & (rng.random(n) < 0.3), sigma)
    sigma = column(rng.uniform(1, 6, n), images)
    apply(add_noise, images, worn & (rng.random(n) < 0.3), sigma)
    quality = rng.integers(45, 101, n)
    compress(images, worn & (rng.random(n) < 0.8), quality, rng)
    return images


# ---------------------------------------------------------------------------- outlines and stamps

GRID = 64                                # every outline has GRID x GRID points


def object_outlines(guide, rng):
    """Outline what lies in the middle: the 35-70 % of points nearest to it in colour and place.
    guide (n, 3, GRID, GRID): the parts to outline -> (n, 1, GRID, GRID), 0 or 1."""
    guide = F.avg_pool2d(guide, 3, stride=1, padding=1, count_include_pad=False)
    middle = GRID // 2
    colour = guide[:, :, middle:middle + 1, middle:middle + 1]                 # (n, 3, 1, 1)
    spread = guide.var(dim=(2, 3), keepdim=True) + 10                          # (n, 3, 1, 1)
    distance = (guide - colour).square().sum(dim=1, keepdim=True)              # (n, 1, GRID, GRID)
    distance = distance / spread.sum(dim=1, keepdim=True)
    point = torch.linspace(-0.5, 0.5, GRID, device=guide.device)
    distance = distance + 5 * (point[:, None] ** 2 + point ** 2)
    fraction = rng.uniform(0.35, 0.7)
    limit = distance.flatten(1).quantile(fraction, dim=1)                      # (n,)
    return (distance < column(limit, guide)).float()


def polygon_outline(corners, rng):
    """A polygon around the middle that touches all four sides: (1, GRID, GRID), 0 or 1."""
    angle = np.sort(rng.uniform(0, 2 * np.pi, corners))
    points = rng.uniform(0.4, 1, (corners, 1))
    points = points * np.stack([np.cos(angle), np.sin(angle)], axis=1)         # (corners, 2)
    points -= points.min(axis=0)
    points *= (GRID - 3) / points.max(axis=0)
    points += 1
    region = Image.new("L", (GRID, GRID))
    ImageDraw.Draw(region).polygon(points.flatten().tolist(), fill=1)
    return np.array(region)[None]


def outlines(guide, rng):
    """Objects, blobs and polygons: (n, 1, GRID, GRID), above 0.5 inside."""
    n = len(guide)
    kind = rng.choice(["object", "blob", "polygon"], n, p=[0.5, 0.3, 0.2])
    corners = rng.integers(4, 9, n)
    corners[kind == "blob"] += 6
    polygons = np.stack([polygon_outline(number, rng) for number in corners])
    polygons = torch.as_tensor(polygons, device=guide.device).float()          # (n, 1, GRID, GRID)
    objects = object_outlines(guide, rng)
    region = either(kind == "object", objects, polygons)
    # a blob is a polygon blurred until its corners are round
    sigma = np.select([kind == "object", kind == "blob"], [2.2, 4.0], 1.0)
    region = blur(region, sigma)
    region = region[:, :, 1:-1, 1:-1]
    return F.pad(region, (1, 1, 1, 1))                       # nothing touches the border


class Stamps(NamedTuple):
    """n rectangles of n pictures, and where they are pasted; lengths in pixels."""
    y: np.ndarray            # centre of the rectangle
    x: np.ndarray
    height: np.ndarray       # its sides
    width: np.ndarray
    sign: np.ndarray         # -1 mirrors, 1 does not
    factor: np.ndarray       # by which it is scaled
    angle: np.ndarray        # radians
    there_y: np.ndarray      # centre after pasting
    there_x: np.ndarray


def sometimes(values, otherwise, rng):
    """Keep each value with probability 0.4."""
    return np.where(rng.random(len(values)) < 0.4, values, otherwise)


def random_stamps(n, S, rng):
    """Stamps of 7-90 % of a picture of S x S pixels, anywhere, also partly outside."""
    side = 0.27 * 3.7 ** rng.random(n) * S
    aspect = 2 ** rng.uniform(-0.5, 0.5, n)
    height = np.clip(side / aspect, 5, 0.95 * S).astype(int)
    width = np.clip(side * aspect, 5, 0.95 * S).astype(int)
    y = rng.integers(S - height + 1) + height / 2
    x = rng.integers(S - width + 1) + width / 2
    sign = sometimes(-np.ones(n), 1, rng)
    factor = sometimes(2 ** rng.uniform(-0.5, 0.5, n), 1, rng)
    angle = sometimes(rng.uniform(-np.pi / 3, np.pi / 3, n), 0, rng)
    # at least a fifth of both sides stays inside the picture
    high = (factor * height).astype(int)
    wide = (factor * width).astype(int)
    top = rng.integers(-4 * high // 5, S - high // 5)
    left = rng.integers(-4 * wide // 5, S - wide // 5)
    there_y = top + high / 2
    there_x = left + wide / 2
    return Stamps(y, x, height, width, sign, factor, angle, there_y, there_x)


def stamped(source, stamps, rng):
    """Cut stamps out of the source images, mirror, scale, rotate and place them.

    -> (layer (n, 3, S, S), region (n, 1, S, S), 1 where the layer shows a stamp)
    """
    S = source.shape[-1]
    s = Stamps(*[column(numbers, source)[:, 0] for numbers in stamps])         # (n, 1, 1) each
    # outline the rectangles
    point = torch.linspace(-0.5, 0.5, 2 * GRID, device=source.device)
    rows = s.y + s.height * point[:, None]                                     # (n, 2 * GRID, 1)
    columns = s.x + s.width * point                                            # (n, 1, 2 * GRID)
    guide = sample(source, rows, columns, "bilinear")
    guide = F.avg_pool2d(guide, 2)                                             # (n, 3, GRID, GRID)
    outline = outlines(guide, rng)
    # what each pixel shows, relative to the centre of the rectangle
    pixel = torch.arange(S, device=source.device) + 0.5
    far_y = (pixel[:, None] - s.there_y) / s.factor                            # (n, S, 1)
    far_x = (pixel - s.there_x) / s.factor                                     # (n, 1, S)
    sin = s.angle.sin()
    cos = s.angle.cos()
    y = far_y * cos - far_x * sin                                              # (n, S, S)
    x = (far_y * sin + far_x * cos) * s.sign

    layer = sample(source, s.y + y, s.x + x, "bicubic")                        # (n, 3, S, S)
    rows = GRID * (y / s.height + 0.5)                                         # (n, S, S)
    columns = GRID * (x / s.width + 0.5)
    region = sample(outline, rows, columns, "bilinear")                        # (n, 1, S, S)
    return rounded(layer), (region > 0.5).float()


# --------------------------------------------------------------------------------------- splices

class Splices(NamedTuple):
    """n manipulated pictures."""
    image: torch.Tensor      # (n, 3, S, S)
    region: torch.Tensor     # (n, S, S), 1 = manipulated
    seen: torch.Tensor       # (n,) bool; False: too small, too large or invisible: leave it out
    kind: list               # n keys of KINDS
    words: list              # n lists: what else was done to each region


def random_kinds(n, rng):
    return rng.choice(list(KINDS), n, p=list(KINDS.values()))


@torch.no_grad()
def splice(photo, donor, rng, kind=None):
    """Manipulate photos (n, 3, S, S) -> Splices. Donors, of the same shape, serve splices; other
    kinds take their parts from the photo itself.

    kind: a key of KINDS for all; None draws one for each. No pixel outside of `region` changes;
    where `seen`, it covers 1-50 % of the picture.
    """
    n = len(photo)
    kinds = random_kinds(n, rng)
    if kind is not None:
        kinds = np.full(n, kind)
    words = [[] for _ in range(n)]
    donor = donor.clone()
    edit_history(donor, kinds == "splice", rng, words)
    return paste(photo, donor, kinds, rng, words)


@torch.no_grad()
def paste(photo, donor, kinds, rng, words):
    """`splice` with given kinds, (n,), and donors as they are; words: n lists to continue."""
    n = len(photo)
    S = photo.shape[-1]
    stamps = random_stamps(n, S, rng)
    source = either(kinds == "splice", donor, photo)
    layer, region = stamped(source, stamps, rng)
    # of the removals, half are filled and half covered by a stamp
    smooth = (kinds == "removal") & (rng.random(n) < 0.5)
    edited = kinds == "local edit"
    moved = ~smooth & ~edited
    resampled = (stamps.factor != 1) | (stamps.angle != 0)
    tell(words, moved & resampled, "resampled")
    tell(words, smooth, "smooth")
    layer = either(moved, layer, photo)                      # the others use only its region
    apply(fill, layer, smooth, region)
    random_edits(layer, edited, rng, words)
    # half of the borders are soft, over 0.5-3 pixels inside the region
    share = region.mean(dim=(1, 2, 3), keepdim=True)                           # (n, 1, 1, 1)
    width = rng.uniform(0.5, 3, n) * (rng.random(n) < 0.5)
    widest = S * share.sqrt() / 10
    width = torch.minimum(column(width, photo), widest)
    soft = blur(region, width.clamp(min=0.01))                                 # (n, 1, S, S)
    alpha = (2 * soft - 1).clamp(min=0) * region
    image = torch.lerp(photo, layer, alpha).round()
    change = (image - photo).abs().mean(dim=(1, 2, 3), keepdim=True)
    visible = change > 3 * share                             # grey levels inside the region
    seen = visible & (share >= 0.01) & (share <= 0.5)
    return Splices(image, region[:, 0], seen.flatten(), kinds.tolist(), words)


def fill(images, region):
    """Fill the region, (n, 1, S, S), with the colours around it and some noise."""
    known = 1 - region                                                         # (n, 1, S, S)
    filled = images.mean(dim=(2, 3), keepdim=True)
    sigma = images.shape[-1] / 2
    while sigma > 0.5:                                       # coarse to fine
        weight = blur(known, sigma)                                            # (n, 1, S, S)
        around = blur(images * known, sigma) / weight.clamp(min=1e-6)
        filled = torch.lerp(filled, around, weight)                            # (n, 3, S, S)
        sigma = sigma / 2

    sigma = 5 * torch.rand_like(known[:, :, :1, :1])                           # (n, 1, 1, 1)
    return torch.where(known > 0, images, add_noise(filled, sigma))


# ---------------------------------------------------------------------------------- command line

def make_pairs(windows, count, rng):
    """Yield `count` tuples (genuine, manipulated, region, words); windows: a data.TrainingSet."""
    while count > 0:
        index = rng.integers(2 ** 31, size=32)
        images = torch.stack([windows[i][0] for i in index]).float()           # (32, 3, S, S)
        photo = older_jpeg(images[:16], rng)
        made = splice(photo, images[16:], rng)
        seed = rng.integers(2 ** 31)                         # both of a pair are worn alike
        genuine = wear(photo, np.random.default_rng(seed))
        manipulated = wear(made.image, np.random.default_rng(seed))
        seen = made.seen.nonzero().flatten().tolist()
        for i in seen[:count]:
            words = [made.kind[i], *made.words[i]]
            yield genuine[i], manipulated[i], 255 * made.region[i, None], words
        count -= len(seen)


def write(pairs, out):
    """Write what `make_pairs` yields as out/au, out/tp, out/mask and out/list.csv."""
    rows = [("image", "label", "mask", "caption")]
    for folder in ("au", "tp", "mask"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for number, (*images, words) in enumerate(pairs):
        name = f"{number:06}.png"
        for folder, image in zip(("au", "tp", "mask"), images):
            pixels = image.byte().movedim(0, -1)                               # (S, S, 3 or 1)
            picture = Image.fromarray(pixels.numpy().squeeze())
            picture.save(out / folder / name, compress_level=1)
        rows.append((f"au/{name}", 0, "", ""))
        rows.append((f"tp/{name}", 1, f"mask/{name}", ", ".join(words)))
    with open(out / "list.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def genuine_pictures(path):
    """The pictures of a folder or list not labelled manipulated, with label 0, or ValueError."""
    pictures, _, problems = data.read_set(path, masks=False)
    bad = [f"note: {line}\n" for line in problems if line.startswith("bad ")]
    print(*bad, sep="", end="", file=sys.stderr)
    genuine = [picture._replace(label=0) for picture in pictures if picture.label != 1]
    if not genuine:
        raise ValueError(f"found only manipulated pictures in {path}, expected genuine ones: name "
                         "a folder of photos")
    return genuine


def main(arguments=None):
    """The command line; returns the exit status: 0 done, 2 wrong call."""
    about = __doc__.partition("\n")[0]
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False)
    parser.add_argument("photos", help="folder of genuine photos")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the set")
    parser.add_argument("--count", type=int, default=100, help="pairs (default 100)")
    parser.add_argument("--size", type=int, default=256, help="pixels (default 256)")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    args = parser.parse_args(arguments)
    try:
        if args.count < 1 or args.size < 32:
            raise ValueError(f"found --count {args.count} --size {args.size}, expected at least 1 "
                             "and 32")
        if args.out.is_file() or args.out.is_dir() and any(args.out.iterdir()):
            raise ValueError(f"found something at {args.out}, expected a new folder: choose "
                             "another --out")
        photos = genuine_pictures(args.photos)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    torch.manual_seed(args.seed)
    windows = data.TrainingSet(photos, max_side=10 ** 9, cell=1, window=args.size, seed=args.seed)
    rng = np.random.default_rng(args.seed)
    write(make_pairs(windows, args.count, rng), args.out)
    print(f"{args.count} pairs in {args.out}: au/, tp/, mask/, list.csv")
    return 0


if __name__ == "__main__":
    sys.exit(main())
