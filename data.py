"""Pictures and labels: reading data sets, making manipulated pictures, feeding the training.

Reading order: one picture -> a data set on disk -> synthesis -> training sets -> command line.
Label 1 and mask 1 = manipulated. The training sets hold paths and labels only: no way to a mask.
`python data.py` without arguments prints a short lesson on a picture that it draws itself.
"""
import argparse
import csv
import io
import json
import re
import sys
from collections import Counter, defaultdict, namedtuple
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter, ImageOps, ImageStat
from torch.utils.data import ConcatDataset, Dataset

EXTENSIONS = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp"}
MAX_PIXELS = 200_000_000      # ours: 600 MB decoded; a header that claims more is refused


# ---------------------------------------------------------------------------------- one picture

class BadPicture(ValueError):
    """A file that cannot be used as a picture; the message is "path: reason"."""


@contextmanager
def opened(path):
    """An image file, only its header read; every failure, in the body too, becomes BadPicture."""
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS              # by itself Pillow refuses from 179 million on
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"found {image.size} pixels, expected {MAX_PIXELS} at most")
            yield image
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise BadPicture(f"{path}: {error}".splitlines()[0]) from error


def to_rgb(image, background="white"):
    """PIL image of any mode -> RGB: deeper than 8 bits scaled down, what is transparent filled."""
    if image.mode[0] in "IF":                               # one channel: I;16, I, F
        values = np.asarray(image, dtype=np.float32)
        values = values / 257 if values.max() > 255 else values
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert("RGB")


def open_image(path):
    """Picture file -> PIL RGB: first frame, EXIF orientation applied; raises BadPicture."""
    with opened(path) as image:
        return to_rgb(ImageOps.exif_transpose(image))


def to_tensor(image):
    """PIL RGB image or (H, W, 3) uint8 array -> (3, H, W) float32 in [0, 1]."""
    array = np.asarray(image, dtype=np.float32).transpose(2, 0, 1)       # (3, H, W)
    return torch.from_numpy(np.divide(array, 255, order="C"))


def jpeg(image, quality, dx=0, dy=0, subsampling=0):
    """Encode and decode a PIL RGB image, its 8x8 grid shifted by (dx, dy) pixels."""
    padded, buffer = np.pad(image, ((dy, 0), (dx, 0), (0, 0)), mode="edge"), io.BytesIO()
    Image.fromarray(padded).save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    return Image.open(buffer).convert("RGB").crop((dx, dy, padded.shape[1], padded.shape[0]))


def add_noise(image, sigma, rng):
    """Gaussian noise of standard deviation sigma (levels of 0-255) on a PIL RGB image."""
    noise = rng.standard_normal((image.height, image.width, 3), dtype=np.float32) * sigma
    return Image.fromarray((np.asarray(image) + noise + 0.5).clip(0, 255).astype(np.uint8))


def attack(image, spec):
    """PIL RGB image after "jpeg:QUALITY", "blur:KERNEL" or "noise:VARIANCE", as in IMDL-BenCo."""
    if not (found := re.fullmatch("(jpeg|blur|noise):([1-9][0-9]?|100)", spec)):
        raise ValueError(f"found attack {spec!r}, expected jpeg:QUALITY, blur:KERNEL or "
                         "noise:VARIANCE with a number from 1 to 100, for example jpeg:70")
    value = int(found[2])
    if found[1] == "jpeg":
        return jpeg(image, value, subsampling=2)
    if found[1] == "noise":
        return add_noise(image, value ** 0.5, np.random.default_rng(0))
    return image.filter(ImageFilter.GaussianBlur(0.35 + 0.15 * value))     # OpenCV's for a kernel


# -------------------------------------------------------------------------- a data set on disk

class Picture(NamedTuple):
    """One entry of a data set: label 0 genuine, 1 manipulated, None unknown."""
    path: Path
    label: int | None
    mask: Path | None = None
    source: str = ""              # pictures of one scene share it: never split up by `split`
    inverted: bool = False        # the mask is black where manipulated


Report = namedtuple("Report", "layout ignored problems")      # ignored: number of other files


# How the end of a path below the root looks, in lower case, without extension. A mask and its
# picture agree in the groups. The first row that fits half of the files is taken.
LAYOUTS = {   # name: (genuine, manipulated, mask, scene)
    "CASIA": ("au_[^/]*", "([st]p_[^/]*)", "([st]p_[^/]*)_gt",
              r"(?:(?:.*_)?([a-z]{3})_?(\d{4,5})[^a-z/]*|(.*))"),   # of two the last: background
    "Columbia": ("4cam_auth/[^/]*", "4cam_splc/([^/]*)", "4cam_splc/edgemask/(.*)_edgemask",
                 "([^/]*)"),
    "COVERAGE": (r"image/\d+", r"image/(\d+)t", r"mask/(\d+)forged", r"(\d+)t?"),
    "DSO-1": (r"normal-\d+", r"(splicing-\d+)", r"[^/]*mask[^/]*/(splicing-\d+)", "([^/]*)"),
    "folders": ("(?:au|authentic|genuine)/.*", "(.*/)?(?:tp|sp|manipulated|tampered)/(.*)",
                "(.*/)?(?:masks?|gt|groundtruth)/(.*?)(?:_gt|_mask)?", "([^/]*?)(?:_[of])?"),
    "IMD2020": ("[^/]*/[^/]*_orig", "([^/]*/[^/]*)", "([^/]*/[^/]*)_mask", "([^/]*)/[^/]*"),
}


def read_folder(root):
    """A folder in one of LAYOUTS -> (pictures, report); in none of them: pictures, no labels."""
    names = {file: "/" + file.relative_to(root).with_suffix("").as_posix().lower()
             for file in sorted(root.rglob("*")) if file.suffix.lower() in EXTENSIONS}
    names = {file: name for file, name in names.items() if "/." not in name}         # not hidden
    for layout, (*patterns, scene) in LAYOUTS.items():
        roles = {file: (role, match.groups())          # the last fitting role: a mask is no picture
                 for role in (1, 0, 2) for file, name in names.items()
                 if (match := re.search(f"/{patterns[role]}$", name))}
        count = Counter(role for role, _ in roles.values())
        if 2 * len(roles) >= len(names) > 0 and (layout != "IMD2020" or count[0] + count[2]):
            break
    else:
        return [Picture(file, None) for file in names], Report("no labels", 0, [])
    pictures, problems, first = [], [], {}
    for file, (role, key) in sorted(roles.items(), key=lambda item: -item[1][0]):    # masks first
        mask = first.get((2, key)) if role == 1 else None
        if role and first.setdefault((role, key), file) != file:
            problems.append(f"duplicate: {file} beside {first[role, key]}")
        if role == 1 and count[2] and not mask:
            problems.append(f"no mask: {file}")
        if role < 2:
            source = "".join(re.search(f"/{scene}$", names[file]).groups(""))
            pictures.append(Picture(file, role, mask, source))
    problems += [f"mask without picture: {file}" for (role, key), file in first.items()
                 if role == 2 and (1, key) not in first]
    return sorted(pictures), Report(layout, len(names) - len(roles), problems)


def read_list(file):
    """A list in one of the formats below -> (pictures, report); paths start at its folder."""
    pictures, problems, kind = {}, [], file.suffix.lower()
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
        if kind == ".csv":                                     # image,label[,mask]
            rows = [(row["image"], row.get("mask"), row["label"]) for row in csv.DictReader(lines)]
        elif kind != ".json":                                  # MVSS-Net: image mask label
            rows = [line.rsplit(maxsplit=2) for line in lines if line.strip()]
        elif isinstance(rows := json.loads("".join(lines)), list):         # IMDL-BenCo
            rows = [(image, mask, mask != "Negative") for image, mask in rows]
        else:                                                  # WSCL: {id: {path, label, mask}}
            rows = [(row["path"], row.get("mask"), row["label"]) for row in rows.values()]
        for name, mask, label in rows:
            path, label = file.parent / name, [0, 1].index(int(label))
            mask = file.parent / mask if label and mask not in ("", "None", None) else None
            if path in pictures:
                problems.append(f"duplicate: {path}")
            pictures.setdefault(path, Picture(path, label, mask, path.stem.lower()))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"found {file}, which cannot be read ({error!r}), expected CSV with the "
                         "header image,label,mask, text 'image mask label', or JSON") from None
    return list(pictures.values()), Report("list", 0, problems)


def picture_size(path):
    """(H, W) as `open_image` returns it, and the EXIF orientation, from the header alone."""
    with opened(path) as image:
        turn = image.getexif().get(0x0112, 1)
        return (image.size if turn >= 5 else image.size[::-1]), turn


def read_set(path, masks=True, decode=False):
    """A folder or list -> (pictures, report) without bad files; ValueError if none is left.
    Reads headers and the first masks; masks=False: no mask; decode: every file to its end."""
    root = Path(path)
    if not root.exists():
        raise ValueError(f"found no {root}, expected a folder or list of pictures: check the path")
    entries, report = read_folder(root) if root.is_dir() else read_list(root)
    pictures, white = [], []                             # white: its share in the masks read
    for picture in entries if masks else [entry._replace(mask=None) for entry in entries]:
        try:
            size = picture_size(picture.path)[0]
            if decode:
                open_image(picture.path)
            if picture.mask and (found := picture_size(picture.mask)[0]) != size:
                change = "turned" if found == size[::-1] else "resized"
                report.problems.append(f"mask of another size, will be {change}: {picture.mask}")
            if picture.mask and (decode or len(white) < 16):
                white.append(read_mask(picture).mean())
            pictures.append(picture)
        except BadPicture as error:
            report.problems.append(f"bad file: {error}")
    if not pictures:
        raise ValueError(f"found no pictures in {root}, expected some: folders au/, tp/ or a list")
    if white and np.mean(white) > 0.5:         # NIST16 and DSO-1 are published black = manipulated
        paths = " ".join(str(picture.mask) for picture in pictures).lower()
        if re.search(r"(?<![a-z])(nist|nc2016|dso|splicing-)", paths):
            return [picture._replace(inverted=True) for picture in pictures], report
        report.problems.append(f"masks inverted? {np.mean(white):.0%} of their pixels are white")
    return pictures, report


def read_mask(picture, size=None):
    """Picture -> mask (H, W) uint8 {0, 1}, or ValueError; size (H, W), by default the picture's."""
    own_size, turn = picture_size(picture.path)
    if picture.label == 0:
        return np.zeros(size or own_size, np.uint8)
    if not picture.mask:
        raise ValueError(f"found no mask for {picture.path}, expected one to compare with")
    with opened(picture.mask) as image:
        mask = to_rgb(image, "black")
        if picture.mask.stem.endswith("_edgemask"):      # Columbia: green, bright or dark, and red
            red, green, _ = (np.asarray(band) for band in mask.split())
            mask = green > red
        else:                                            # 0 and 1, or a dark palette, also count
            values = np.asarray(mask.convert("L"))
            top = values.max()
            mask = values > (127 if top > 127 or image.format == "JPEG" else top / 2)
    mask = Image.fromarray(mask != picture.inverted)
    if mask.size == own_size != own_size[::-1]:        # on its side; ours: else anticlockwise
        mask.getexif()[0x0112] = turn if turn >= 5 else 8
        mask = ImageOps.exif_transpose(mask)
    mask = mask.resize((size or own_size)[::-1], Image.Resampling.NEAREST)
    return np.asarray(mask, dtype=np.uint8)


def split(pictures, fraction, seed):
    """Pictures -> (train, val): about `fraction` of the scenes go to val, no scene to both."""
    scenes = np.random.default_rng(seed).permutation(sorted({p.source for p in pictures}))
    held_out = set(scenes[:round(fraction * len(scenes))])
    return ([p for p in pictures if p.source not in held_out],
            [p for p in pictures if p.source in held_out])


# ----------------------------------------------------------------------------------- synthesis

TOUCHES = {   # word of the caption: (image, rng, u) -> image, u in [0, 1]
    "brighter": lambda im, rng, u: ImageEnhance.Brightness(im).enhance(1.12 + 0.35 * u),
    "darker": lambda im, rng, u: ImageEnhance.Brightness(im).enhance(0.88 - 0.3 * u),
    "contrast": lambda im, rng, u: ImageEnhance.Contrast(im).enhance(0.55 + 1.1 * u),
    "paler": lambda im, rng, u: ImageEnhance.Color(im).enhance(0.6 * u),
    "tinted": lambda im, rng, u: Image.blend(
        im, Image.new("RGB", im.size, tuple(rng.integers(0, 256, 3).tolist())), 0.08 + 0.12 * u),
    "blurred": lambda im, rng, u: im.filter(ImageFilter.GaussianBlur(0.6 + 1.4 * u)),
    "sharpened": lambda im, rng, u: im.filter(ImageFilter.UnsharpMask(1.5, int(80 + 170 * u), 0)),
    "noisy": lambda im, rng, u: add_noise(im, 4 + 10 * u, rng),
    "recompressed": lambda im, rng, u: jpeg(im, int(75 - 45 * u), *rng.integers(0, 8, 2)),
}
KINDS = {"splice": 0.5, "copy-move": 0.25, "removal": 0.13, "local edit": 0.12}     # ours: shares
HARD = [0] * 128 + [255] * 128                              # alpha of a half and more: the region
INNER = [max(0, 2 * value - 255) for value in range(256)]   # a border soft inside the region only


def touch(image, rng, words):
    """The image after one random entry of TOUCHES; its word is appended to words."""
    words.append(str(rng.choice(list(TOUCHES))))
    return TOUCHES[words[-1]](image, rng, rng.random())


def cut(image, size, rng):
    """A random rectangle of the image, as large as 7-90 % of a picture of `size` (W, H)."""
    side, aspect = 0.27 * 3.7 ** rng.random(), 2 ** rng.uniform(-0.5, 0.5)
    width = int(np.clip(size[0] * side * aspect, 5, min(image.width, 0.95 * size[0])))
    height = int(np.clip(size[1] * side / aspect, 5, min(image.height, 0.95 * size[1])))
    x, y = rng.integers(image.width - width + 1), rng.integers(image.height - height + 1)
    return image.crop((x, y, x + width, y + height))


def shape(image, rng):
    """A region in an image -> (L of 0 and 255, word): "polygon", smooth "blob" or "object"."""
    word = str(rng.choice(["object", "blob", "polygon"], p=[0.5, 0.3, 0.2]))
    if word == "object":                  # the pixels nearest to a seed in colour and place
        small = image.resize([max(8, min(side, 72)) for side in image.size])
        colour = np.asarray(small.filter(ImageFilter.BoxBlur(1)), dtype=np.float32)  # (h, w, 3)
        i, j = (rng.uniform(0.35, 0.65, 2) * colour.shape[:2]).astype(int)
        y, x = (np.linspace(0, 1, side) for side in colour.shape[:2])
        distance = ((colour - colour[i, j]) ** 2).sum(2) / (colour.var((0, 1)).sum() + 30)
        distance += 5 * ((y[:, None] - y[i]) ** 2 + (x - x[j]) ** 2)                 # (h, w)
        inside = distance < np.quantile(distance[::2, ::2], rng.uniform(0.35, 0.7))
        inside[[0, -1]] = inside[:, [0, -1]] = False
        region = Image.fromarray(inside).convert("L").filter(ImageFilter.GaussianBlur(2.5))
        return region.resize(image.size, Image.Resampling.BICUBIC).point(HARD), word
    angle = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(4, 9) + 6 * (word == "blob")))
    corners = np.stack([np.cos(angle), np.sin(angle)], 1) * rng.uniform(0.4, 1, (len(angle), 1))
    corners -= corners.min(0)                                                        # (n, 2)
    corners *= (np.array(image.size) - 3) / (corners.max(0) + 1e-6)
    region = Image.new("L", image.size)
    ImageDraw.Draw(region).polygon((corners + 1).ravel().tolist(), fill=255)
    if word == "blob":
        region = region.filter(ImageFilter.GaussianBlur(min(image.size) / 16)).point(HARD)
    return region, word


def place(stamp, size, rng):
    """An RGBA stamp anywhere on an empty frame, partly outside too, so that all places are equally
    likely -> (layer RGB, region L of 0 and 255, whether it covers 1-50 %)."""
    for _ in range(10):
        frame = Image.new("RGBA", size)
        x, y = (int(rng.integers(1 - own, full)) for own, full in zip(stamp.size, size))
        frame.paste(stamp, (x, y))
        region = frame.getchannel("A").point(HARD)
        if fits := 0.01 <= region.histogram()[255] / (size[0] * size[1]) <= 0.5:
            break
    return frame.convert("RGB"), region, fits


def fill(photo, region):
    """The photo with the region filled by the colours around it: a pyramid. Source: ours."""
    levels = [photo.copy()]
    levels[0].putalpha(ImageChops.invert(region))      # alpha 0, unknown: does not count in resize
    while max(levels[-1].size) > 1:
        half = [(side + 1) // 2 for side in levels[-1].size]
        levels.append(levels[-1].resize(half, Image.Resampling.BOX))
    smooth = levels.pop()
    for known in reversed(levels):
        smooth = Image.alpha_composite(smooth.resize(known.size, Image.Resampling.BILINEAR), known)
    return smooth.convert("RGB")


def synthesize(photo, donor, rng, kind=None):
    """Manipulate a photo -> (manipulated (H, W, 3) uint8, mask (H, W) uint8 {0, 1}, caption).

    photo, donor (H, W, 3) uint8, any sizes; rng np.random.Generator; kind a key of KINDS or None.
    1-50 % of the picture change; outside the mask every pixel stays as it was. Source: ours.
    """
    kind = kind or str(rng.choice(list(KINDS), p=list(KINDS.values())))
    photo, donor = Image.fromarray(photo), Image.fromarray(donor)
    for _ in range(6):
        stamp = cut(donor if kind == "splice" else photo, photo.size, rng)
        outline, *words = shape(stamp, rng)
        if kind == "splice" and rng.random() < 0.6:              # the donor's own JPEG history
            stamp = jpeg(stamp, int(rng.integers(50, 99)), *rng.integers(0, 8, 2))
        for _ in range(rng.integers(0, 3) if kind == "splice" else 0):
            stamp = touch(stamp, rng, words)
        stamp.putalpha(outline)
        stamp = ImageOps.mirror(stamp) if rng.random() < 0.4 else stamp
        if rng.random() < 0.4:
            stamp = ImageOps.scale(stamp, 2 ** rng.uniform(-0.5, 0.5))
        if rng.random() < 0.4:
            stamp = stamp.rotate(rng.uniform(-60, 60), Image.Resampling.BICUBIC, expand=True)
        layer, region, fits = place(stamp, photo.size, rng)
        if kind == "local edit":
            layer = touch(photo, rng, words)
        elif kind == "removal" and rng.random() < 0.5:
            layer = add_noise(fill(photo, region), rng.uniform(0, 5), rng)
            words.append("smooth fill")
        elif kind == "removal":
            left, top, right, bottom = region.getbbox() or (0, 0, 1, 1)
            step = (right - left, 0) if rng.random() < 0.5 else (0, bottom - top)
            layer = ImageChops.offset(photo, *step)
            words.append("fill from beside")
        feather = min(rng.uniform(0.5, 3), region.histogram()[255] ** 0.5 / 10)      # pixels
        feather = feather if rng.random() < 0.5 else 0
        alpha = region.filter(ImageFilter.GaussianBlur(feather)).point(INNER)
        alpha = ImageChops.darker(alpha, region)                 # nothing leaks into its notches
        result = Image.composite(layer, photo, alpha)
        change = ImageStat.Stat(ImageChops.difference(result, photo).convert("L"), region)
        if fits and change.mean[0] > 3:                          # less, and nobody could see it
            break
    else:                                                        # a flat picture: make it plain
        kind, words, feather = "local edit", ["inverted"], 0
        result = Image.composite(ImageOps.invert(photo), photo, region)
    caption = ", ".join([kind, *dict.fromkeys(words), *(["soft border"] if feather else [])])
    return np.asarray(result), np.asarray(region) // 255, caption


def degrade(image, rng, size=None):
    """Rescale, blur, noise and JPEG, each sometimes; image (H, W, 3) uint8 -> (the same, words).

    size (W, H), by default 0.5-1.25 times the image's. Equal rng: equal treatment. Source: ours.
    """
    image, words = Image.fromarray(image), []
    scale, sampling = rng.uniform(0.5, 1.25), rng.choice([1, 2, 3])      # Lanczos, linear, cubic
    size = size or tuple(max(1, round(side * scale)) for side in image.size)
    if image.size != size:
        words.append(f"scale {size[0] / image.width:.2f}")
        image = image.resize(size, Image.Resampling(sampling))
    if rng.random() < 0.15:
        image = image.filter(ImageFilter.GaussianBlur(0.3 * 13 ** rng.random()))
        words.append("blur")
    if rng.random() < 0.15:
        image = add_noise(image, rng.uniform(1, 6), rng)
        words.append("noise")
    if rng.random() < 0.65:
        quality = int(rng.integers(45, 101))
        image = jpeg(image, quality, *rng.integers(0, 8, 2), int(rng.choice([0, 2])))
        words.append(f"quality {quality}")
    return np.asarray(image), ", ".join(words) or "untouched"


# ------------------------------------------------------------------------------- training sets

class TrainingSet(Dataset):
    """Labelled pictures [(path, label)]: item -> (image (3, size, size) in [0, 1], label, index).

    Chance comes from (seed, epoch, index), whatever the worker. reencode: `degrade` for both
    classes, so that compression does not tell them apart. augment: random squares and flips.
    cache: megabytes of pictures that stay decoded. Arrays (H, W, 3) uint8 may stand for paths.
    """

    def __init__(self, pairs, *, size, seed, reencode=True, augment=True, cache=1000):
        self.photos, self.labels = [photo for photo, _ in pairs], [int(label) for _, label in pairs]
        self.size, self.seed, self.reencode, self.augment = size, seed, reencode, augment
        self.pairs = 0                                    # how many, at the end, are synthetic
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()      # seen by live workers
        for i in range(len(self.photos)):
            with suppress(BadPicture):                                       # raised when asked for
                if cache > 0:
                    self.photos[i] = self.photo(i)
                    cache -= self.photos[i].nbytes / 1e6

    def __len__(self):
        return len(self.labels)

    def set_epoch(self, epoch):
        self.epoch.fill_(epoch)

    def rng(self, *numbers):
        return np.random.default_rng((self.seed, int(self.epoch), *numbers))

    def photo(self, i):
        photo = self.photos[i]
        return photo if isinstance(photo, np.ndarray) else np.asarray(open_image(photo))

    def work_size(self, rng):
        """The side to work at; `degrade` to self.size then rescales by 0.5-1.25, often by 1."""
        return round(self.size / (rng.uniform(0.5, 1.25) if rng.random() < 0.35 else 1))

    def window(self, photo, side, work, rng):
        """A random square, `side` pixels at most, flipped or not, resampled to `work` -> RGB."""
        side = max(1, min(round(side), *photo.shape[:2]))
        y, x = (rng.integers(0, full - side + 1) for full in photo.shape[:2])
        window = Image.fromarray(photo[y:y + side, x:x + side])
        window = ImageOps.mirror(window) if rng.random() < 0.5 else window
        return window.resize((work, work), Image.Resampling.BICUBIC)

    def __getitem__(self, index):
        rng, image = self.rng(index), self.photo(index)
        work = self.work_size(rng) if self.reencode else self.size
        if self.augment:
            image = self.window(image, rng.uniform(0.6, 1) * min(image.shape[:2]), work, rng)
        else:
            image = ImageOps.fit(Image.fromarray(image), (work, work))
        if self.reencode:
            image, _ = degrade(np.asarray(image), rng, (self.size, self.size))
        return to_tensor(image), self.labels[index], index


class SynthesisSet(TrainingSet):
    """The same from genuine photos alone: items 2i and 2i + 1 are a crop and its manipulation,
    post-processed alike. Source: ours."""

    def __init__(self, photos, *, size, count, seed, cache=1000):
        super().__init__([(photo, 0) for photo in photos], size=size, seed=seed, cache=cache)
        self.labels, self.pairs = [i % 2 for i in range(count)], count

    def __getitem__(self, index):
        return to_tensor(self.make(index // 2, index % 2)[0]), self.labels[index], index

    def make(self, number, label):
        """One picture of a pair -> (image (H, W, 3) uint8, mask (H, W) uint8 {0, 1}, caption)."""
        rng, size = self.rng(number), (self.size, self.size)
        work = self.work_size(rng)
        photo, donor = (self.photo(i) for i in rng.integers(len(self.photos), size=2))
        sides = work * 3 ** (rng.random(2) * rng.integers(0, 2, 2))      # half of them: as they are
        image = self.window(photo, sides[0], work, rng)
        if rng.random() < 0.4:                                           # an older JPEG history
            image = jpeg(image, int(rng.integers(60, 99)), *rng.integers(0, 8, 2))
        image, mask, caption = np.asarray(image), np.zeros(size, np.uint8), ""
        if label:
            donor = np.asarray(self.window(donor, sides[1], work, rng))
            image, mask, caption = synthesize(image, donor, rng)
            mask = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
        image, words = degrade(image, self.rng(number, 1), size)         # equal chance for both
        return image, mask, caption or words


class Mixture(ConcatDataset):
    """A TrainingSet and after its pictures synthetic pairs of the genuine ones. Source: ours."""

    def __init__(self, pictures, count):
        genuine = [photo for photo, label in zip(pictures.photos, pictures.labels) if label == 0]
        made = SynthesisSet(genuine, size=pictures.size, seed=pictures.seed, count=count, cache=0)
        super().__init__([pictures, made])
        self.labels, self.pairs = pictures.labels + made.labels, count

    def set_epoch(self, epoch):
        for part in self.datasets:
            part.set_epoch(epoch)

    def __getitem__(self, index):
        image, label, _ = super().__getitem__(index)
        return image, label, index


# -------------------------------------------------------------------------------- command line

def accuracy_from(values, labels):
    """Balanced accuracy of guessing n labels (0, 1) from n values; 0.5 is chance. Source: ours.
    Each is guessed from those of the same value in another half of the pictures, ten times."""
    right = {0: [], 1: []}
    for seed in range(10):
        half = np.random.default_rng(seed).permutation(len(labels)) % 2
        total, seen = Counter(zip(half, labels)), Counter(zip(half, labels, values))
        for other, value, label in zip(1 - half, values, labels):
            own, wrong = (seen[other, c, value] / max(1, total[other, c])
                          for c in (label, 1 - label))
            right[label].append(0.5 + 0.5 * np.sign(own - wrong))            # a draw: half right
    return np.mean([np.mean(right[0]), np.mean(right[1])])


def leaks(pictures):
    """How well trivial cues in the files' headers tell the class -> {cue: `accuracy_from`}."""
    cues = defaultdict(list)
    for path, *_ in pictures:
        with opened(path) as image:
            density = path.stat().st_size / (image.width * image.height)
            cues["format"].append(image.format)
            cues["size"].append(image.size)
            cues["aspect"].append(round(8 * np.log2(image.width / image.height)))
            cues["JPEG tables"].append(str(getattr(image, "quantization", "")))
            cues["bytes per pixel"].append(round(8 * np.log2(density)))
    return {cue: accuracy_from(values, [p.label for p in pictures]) for cue, values in cues.items()}


def contact_sheet(rows, path, cell=128):
    """Rows of (list of (H, W, 3) or (H, W) uint8 arrays, caption), three abreast -> a picture."""
    width, height = max(len(images) for images, _ in rows) * cell + 8, cell + 16
    sheet = Image.new("RGB", (3 * width, -(-len(rows) // 3) * height), "white")
    for i, (images, caption) in enumerate(rows):
        x, y = i % 3 * width, i // 3 * height
        for k, image in enumerate(images):
            sheet.paste(ImageOps.contain(Image.fromarray(image), (cell, cell)), (x + k * cell, y))
        ImageDraw.Draw(sheet).text((x, y + cell), caption, fill="black")
    sheet.save(path)


def describe(path, cues):
    """Print what a data set holds and what is wrong -> (rows for `contact_sheet`, problems)."""
    pictures, (layout, ignored, problems) = read_set(path, decode=True)
    count, formats = Counter(p.label for p in pictures), Counter(p.path.suffix for p in pictures)
    sizes = {picture_size(p.path)[0] for p in pictures}
    print(f"{path}: {layout}; {count[0]} genuine, {count[1]} manipulated, {count[None]} without "
          f"label, {sum(p.mask is not None for p in pictures)} masks, {ignored} others\n"
          f"{dict(formats)}, {len(sizes)} sizes (H, W) from {min(sizes)} to {max(sizes)}")
    for cue, accuracy in leaks(pictures).items() if cues and count[0] and count[1] else ():
        print(f"{cue:16} tells the class with balanced accuracy {accuracy:.2f} (chance 0.50)")
        if accuracy > 0.5 + max(0.1, len(pictures) ** -0.5):
            problems.append(f"leak: {cue} alone tells the class")
    print("\n".join(problems) or "nothing wrong")
    shown = pictures[::len(pictures) // 24 + 1]
    return [([np.asarray(open_image(p.path)), *([read_mask(p) * 255] if p.mask else [])],
             p.path.name) for p in shown], problems


def write_synthesis(pairs, out):
    """Write a SynthesisSet as out/au, tp, mask and list.csv -> rows for `contact_sheet`."""
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"found files in {out}, expected an empty folder: choose another --out")
    rows, lines = [], ["image,label,mask,caption"]
    for i in range(len(pairs) // 2):
        (original, _, words), (changed, mask, caption) = pairs.make(i, 0), pairs.make(i, 1)
        images = {"au": original, "tp": changed, "mask": mask * 255}
        for folder, image in images.items():
            (out / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(out / folder / f"{i:06}.png", compress_level=1)
        lines += [f'au/{i:06}.png,0,,"{words}"', f'tp/{i:06}.png,1,mask/{i:06}.png,"{caption}"']
        rows += [(list(images.values()), caption)] if i < 24 else []
    (out / "list.csv").write_text("\n".join(lines) + "\n")
    return rows


def demo():
    """From a photo to a training item, on two pictures drawn here: what each step makes."""
    rng = np.random.default_rng(1)
    colours = [Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)) for _ in range(2)]
    photo, donor = (np.asarray(add_noise(image.resize((128, 96)), 4, rng)) for image in colours)
    print(f"photo         {photo.shape} {photo.dtype}: soft colours and a camera's noise\n"
          "synthesize()  a picture of the same shape, a mask (96, 128) of 0 and 1, a caption:")
    for kind in reversed(KINDS):
        changed, mask, caption = synthesize(photo, donor, rng, kind)
        differs = (changed != photo).any(2)                              # (H, W)
        print(f"    mask {mask.mean():3.0%}, in it {differs[mask == 1].mean():4.0%} of the pixels "
              f"differ, outside {differs[mask == 0].sum()}: {caption}")
    print("the last mask in 8 x 8 blocks, in percent:")
    for row in mask.reshape(8, 12, 8, 16).mean((1, 3)):                  # (8, 8), row by row
        print("   ", " ".join(f"{100 * share:3.0f}" for share in row))
    for name, image in (("genuine", photo), ("manipulated", changed)):
        result, words = degrade(image, np.random.default_rng(1))
        print(f"degrade()     {name:11} -> {result.shape}, by the same chance: {words}")
    labels, small = [0, 1] * 1000, Image.fromarray(photo[:16, :16])
    files = [90 - 20 * label for label in labels]                        # their JPEG quality
    words = [degrade(np.asarray(jpeg(small, quality)), rng)[1] for quality in files]
    again = [line.partition("quality")[2] for line in words]
    print("leaks()       genuine files of JPEG quality 90, manipulated ones of 70: this tells the "
          f"class\n    with accuracy {accuracy_from(files, labels):.2f}, after degrade() with "
          f"{accuracy_from(again, labels):.2f}; chance is 0.50")
    items = SynthesisSet([photo, donor], size=64, count=2, seed=0)
    for image, label, index in (items[0], items[1]):
        print(f"training      item {index}: {tuple(image.shape)} in [0, 1], label {label}, no mask")


def main(words=None):
    """The command line; returns the exit status: 0 fine, 1 something is wrong, 2 wrong call."""
    parser = argparse.ArgumentParser(description="What is in a data set, or make one from photos.")
    parser.add_argument("path", nargs="?", help="folder or list of labelled pictures")
    parser.add_argument("--leaks", action="store_true", help="do trivial cues tell the class?")
    parser.add_argument("--synthesize", metavar="PHOTOS", help="folder of genuine photos")
    parser.add_argument("--out", metavar="DIR", help="new folder for the synthesised set")
    parser.add_argument("--preview", metavar="PNG", help="draw a contact sheet")
    for name, default in (("count", 100), ("size", 256), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    args = parser.parse_args(words)
    try:
        if bool(args.path) == bool(args.synthesize) or bool(args.synthesize) != bool(args.out):
            raise ValueError("expected either a PATH, or --synthesize PHOTOS --out DIR")
        if args.synthesize:
            photos = [p.path for p in read_set(args.synthesize, masks=False)[0] if p.label != 1]
            pairs = SynthesisSet(photos, size=args.size, count=2 * args.count, seed=args.seed)
            rows, problems = write_synthesis(pairs, Path(args.out)), []
        else:
            rows, problems = describe(args.path, args.leaks)
        if args.preview:
            contact_sheet(rows, args.preview)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main() if sys.argv[1:] else demo())
