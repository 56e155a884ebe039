"""Pictures and labels: one picture and its view, data sets on disk, windows for the training.

`python data.py SET` says what a set holds and what is wrong with it; without SET, a short lesson.
Label 0 = genuine, 1 = manipulated. Masks are only named here: tests/evaluate.py reads them.
"""
import argparse
import csv
import io
import json
import os
import re
import struct
import sys
import warnings
import zlib
from collections import Counter, defaultdict
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".tif", ".tiff", ".bmp", ".webp", ".gif",
              ".avif", ".jp2")
UNREADABLE = (".heic", ".heif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".psd", ".exr")
MAX_PIXELS = 200_000_000      # ours: 600 MB decoded; a header that claims more is refused
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, MemoryError, struct.error,
          zlib.error, Image.DecompressionBombError)          # what Pillow raises on bad files


class BadInput(ValueError):
    """What cannot be used, and why, in one line."""


# ---------------------------------------------------------------------------------- one picture

@contextmanager
def one_line():
    """Turn what Pillow and the file system raise into BadInput. No code of ours belongs inside."""
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except DAMAGE as error:
        text = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise BadInput(text.splitlines()[0]) from error


@contextmanager
def opened(path):
    """An image file, only its header read; BadInput, "path: reason", if damaged or too large.
    A BadInput from the body gets the path in front; any other error keeps its traceback."""
    try:
        with one_line():
            try:
                image = Image.open(path)
            except Image.DecompressionBombError:        # Pillow's limit is global and below ours
                start = Path(path).read_bytes()[:16]
                plugins = [opens for opens, fits in Image.OPEN.values() if fits and fits(start)]
                image = plugins[0](path)
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise BadInput(f"found {image.width} x {image.height} pixels, expected at most "
                               f"{MAX_PIXELS:,}: reduce it")
            yield image
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from error


def to_bytes(values):
    """Numbers from 0, black, -> uint8. White is the least of 1 (floats only), 255, 4095 (12 bits)
    and 65535 that no value exceeds [ours]; BadInput for negative, larger or non-finite values."""
    if values.dtype == np.uint8:
        return values
    low = float(values.min())                                # NaN if any value is
    high = float(values.max())
    if not (low >= 0 and high <= 65535):
        raise BadInput(f"found values from {low:g} to {high:g}, expected 0 to 65535: scale them")
    whites = (1, 255, 4095, 65535) if values.dtype.kind == "f" else (255, 4095, 65535)
    white = next(white for white in whites if high <= white)
    return np.round(values * np.float32(255 / white)).astype(np.uint8)


def to_rgb(image, background="white"):
    """PIL image of any mode -> RGB, not turned: numbers scaled by `to_bytes`, transparent parts on
    the background; BadInput if the pixels are damaged or cannot be converted."""
    deep = ";16" in str(getattr(image, "tile", ""))          # 16 bits a channel
    with one_line():
        image.load()
        numbers = image.mode.startswith(("I", "F"))          # one channel: I;16, I, F
        if not numbers:
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    if numbers:
        image = Image.fromarray(to_bytes(np.asarray(image)))                      # (H, W)
    elif deep and 0 < np.max(image.getextrema()[:3]) < 16:   # Pillow kept the upper 8 bits alone
        raise BadInput("found colours of 12 bits in 16, expected 16 bits: scale them")
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert("RGB")


def orientation(image):
    """EXIF orientation of a PIL image: 1 is upright, from 5 on it lies on its side."""
    with one_line():
        return Image.Image.getexif(image).get(0x0112, 1)     # PNG's own would decode the pixels


def to_picture(source):
    """PIL image of any mode, array or tensor -> PIL RGB, upright by its EXIF orientation.
    Arrays: (H, W), (H, W, 1), (H, W, 3) or, with alpha, (H, W, 4); uint8, or uint16 and floats in
    the ranges of `to_bytes`. BadInput for anything else."""
    if isinstance(source, Image.Image):
        picture = to_rgb(source)
        picture.info.clear()                                 # what is upright is not turned again
        picture.getexif()[0x0112] = orientation(source)
        ImageOps.exif_transpose(picture, in_place=True)
        return picture

    dtype = str(getattr(source, "dtype", type(source).__name__)).removeprefix("torch.")
    shape = tuple(getattr(source, "shape", ()))
    known = dtype in ("uint8", "uint16", "float16", "float32", "float64")
    if not known or len(shape) < 2 or 0 in shape or shape[2:] not in ((), (1,), (3,), (4,)):
        raise BadInput(f"found {dtype} of shape {shape}, expected a PIL image or uint8, uint16 or "
                       "float (H, W), (H, W, 3) or (H, W, 4): convert it")
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu().numpy()
    values = source[..., 0] if shape[2:] == (1,) else source                 # (H, W[, 3 or 4])
    return to_rgb(Image.fromarray(to_bytes(values)))


def open_image(path):
    """Picture file -> PIL RGB: first frame, EXIF orientation applied; or BadInput."""
    with opened(path) as image:
        return to_picture(image)


def picture_size(path):
    """(H, W) as `open_image` returns it, and the EXIF orientation, from the header alone."""
    with opened(path) as image:
        turn = orientation(image)
        W, H = image.size
    if turn in (5, 6, 7, 8) and image.format != "TIFF":      # Pillow turns TIFF itself
        return (W, H), turn
    return (H, W), turn


def to_tensor(image):
    """PIL RGB image or (H, W, 3) uint8 array -> (3, H, W) float32 in [0, 1]."""
    array = torch.from_numpy(np.array(image))                                     # (H, W, 3)
    return array.permute(2, 0, 1).contiguous() / 255                              # (3, H, W)


def reduced_size(size, max_side):
    """(W, H) -> (W', H') in proportion; unchanged unless a side is longer than max_side."""
    scale = min(1, max_side / max(size))
    return tuple(max(1, round(scale * side)) for side in size)


def view(picture, max_side, cell):
    """PIL RGB -> what the network sees, (3, H', W') float32 in [0, 1] [ours]: native pixels, as
    resampling erases traces. Only a picture longer than max_side is reduced, once. Reflection on
    the right and below pads it to multiples of cell."""
    W, H = reduced_size(picture.size, max_side)
    if (W, H) != picture.size:
        picture = picture.resize((W, H), Image.Resampling.BICUBIC, reducing_gap=3)
    missing = ((0, -H % cell), (0, -W % cell), (0, 0))
    return to_tensor(np.pad(picture, missing, mode="reflect"))                    # (3, H', W')


# -------------------------------------------------------------------------- a data set on disk

class Picture(NamedTuple):
    """One entry of a data set: label 0 genuine, 1 manipulated, None unknown."""
    path: Path
    label: int | None
    mask: Path | None = None
    source: str = ""              # pictures of one scene share it: `split` keeps them together
    inverted: bool = False        # the mask is black where manipulated


class Report(NamedTuple):
    """How a set was read: a key of LAYOUTS, "list" or "no labels"; one line a problem."""
    layout: str
    problems: list


# Patterns for paths below a set's folder, in lower case and without extension: see `matches`.
GENUINE = "(?:au|authentic|genuine|real|originals?|pristine|untouched)"
MANIPULATED = "(?:tp|sp|manipulated|tampered|fakes?|forged|forger(?:y|ies)|spliced|edited)"
MASKS = "(?:[^/]*mask[^/]*|gt|[^/]*ground_?-? ?truth[^/]*)"
LAYOUTS = {      # genuine and manipulated pictures; the first one that every picture fits is taken
    "folders": (f"{GENUINE}/.*", f"{MANIPULATED}/.*"),
    "CASIA": ("au_[^/]*", "[st]p_[^/]*"),
    "Columbia": ("4cam_auth/[^/]*", "4cam_splc/[^/]*"),
    "COVERAGE": (r"image/\d+", r"image/\d+t"),
    "DSO-1": (r"normal-\d+", r"splicing-\d+"),
    "IMD2020": ("[^/]*/[^/]*_orig", "[^/]*/[^/]*(?<!_orig)"),
}
SCENE = (r"(?:au|[st]p)_(?:.*_)?([a-z]{3})_?(\d{4,5})(?!\d)[^a-z]*"     # CASIA: background is last
         r"|(\d+)t|(.*?)(?:_[of])?")                                    # COVERAGE, CoMoFoD, others


def matches(pattern, name):
    """Whether a pattern fits a whole path, or its end from some folder on."""
    return re.fullmatch(f"(?:.*/)?(?:{pattern})", name) is not None


def scene_of(path):
    """What the file names of one scene share."""
    return "".join(group for group in re.fullmatch(SCENE, path.stem.lower()).groups() if group)


def files_in(folder):
    """A folder -> (sorted picture files below it, Counter of the endings of unreadable ones).
    Links are followed, each real file and folder counts once, hidden ones are skipped."""
    files = []
    left_out = Counter()
    seen = set()
    paths = [Path(folder)]
    for path in paths:                                       # the list grows on the way
        real = os.path.realpath(path)
        if real in seen:
            continue
        seen.add(real)
        if path.is_dir():
            inside = [each for each in path.iterdir() if not each.name.startswith(".")]
            paths += sorted(inside, key=lambda each: (each.is_symlink(), each))
        elif path.suffix.lower() in EXTENSIONS:
            files.append(path)
        elif path.suffix.lower() in UNREADABLE:
            left_out[path.suffix.lower()] += 1
    return sorted(files), left_out


def find_layout(root, names, masks):
    """(layout, {picture: label}) by the first of LAYOUTS that fits the names of the pictures; "no
    labels" if no folder is named like a class and there are no masks; else BadInput."""
    twins = len({Path(name).name for name in names.values()}) < len(set(names.values()))
    odd = []
    for layout, (genuine, manipulated) in LAYOUTS.items():
        labels = {file: int(matches(manipulated, name)) for file, name in names.items()
                  if matches(manipulated, name) != matches(genuine, name)}
        # by names alone, masks of equal name look like pictures; IMD2020 fits any two levels
        clear = {"folders": True, "IMD2020": masks and 0 in labels.values()}.get(layout, not twins)
        if names and clear and len(labels) == len(names):
            return layout, labels
        odd += [file for file in names if file not in labels]
    classes = f"(?:{GENUINE}|{MANIPULATED})/.*"
    if not masks and not any(matches(classes, name) for name in names.values()):
        return "no labels", dict.fromkeys(names)
    raise BadInput(f"found {[*odd, *masks][0]}, which fits no layout, expected {root} to hold only "
                   "genuine pictures (au, real, ..), manipulated ones (tp, fake, ..) and masks: "
                   "rename or move it, or write a list image,label,mask")


def read_folder(root):
    """A folder in one of LAYOUTS, or of photos without labels -> (pictures, Report)."""
    files, left_out = files_in(root)
    counts = ", ".join(f"{count} {ending}" for ending, count in left_out.items())
    problems = [f"left out: {counts}, which Pillow cannot open"] if counts else []
    names = {file: file.relative_to(root).with_suffix("").as_posix().lower() for file in files}

    # masks lie in folders named like masks, or are named as another picture plus _gt or _mask
    stems = {Path(name).name for name in names.values()}
    ends = tuple(end for end in ("_gt", "_mask") if any(stem + end in stems for stem in stems))
    masks = {file: names.pop(file) for file in files
             if matches(f"{MASKS}/.*", names[file]) or names[file].endswith(ends)}
    layout, labels = find_layout(root, names, masks)

    def key(name):
        """What a picture and its mask share: the path below their class folder, or the stem."""
        name = re.sub(r"_(gt|mask|edgemask)$|(?<=\d)(copy|paste)$", "", name)
        name = re.sub(r"(?<=\d)forged$", "t", name)          # COVERAGE
        below = re.sub(f"^(?:.*/)?(?:{GENUINE}|{MANIPULATED}|{MASKS})/", "", name)
        return below if layout in ("folders", "IMD2020") else Path(name).name

    masks_of = defaultdict(list)
    for mask, name in masks.items():
        masks_of[key(name)].append(mask)
    uses = Counter(key(name) for file, name in names.items() if labels[file] == 1)
    pictures = []
    for file, name in names.items():
        found = masks_of[key(name)] if labels[file] == 1 else []
        mask = found[0] if len(found) == uses[key(name)] == 1 else None      # of two, neither
        if labels[file] == 1 and masks and not mask:
            problems.append(f"no mask of its own: {file}")
        scene = file.parent.name if layout == "IMD2020" else scene_of(file)
        pictures.append(Picture(file, labels[file], mask, scene))
    known = {key(name) for name in names.values()}
    problems += [f"mask without picture: {file}" for file in masks if key(masks[file]) not in known]
    return pictures, Report(layout, problems)


def read_list(file):
    """A list as CSV or IMDL-BenCo's JSON -> (pictures, Report); paths start at its folder."""
    try:
        text = file.read_text(encoding="utf-8-sig")
        is_json = file.suffix.lower() == ".json"
        rows = json.loads(text) if is_json else list(csv.DictReader(text.splitlines()))
    except (OSError, ValueError, csv.Error) as error:
        raise BadInput(f"found {file}, which cannot be read ({error}), expected a folder, CSV or "
                       "JSON: check the path") from error

    found = {}                                               # {real path: Picture}
    problems = []
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], start=1):
        if isinstance(row, list) and len(row) == 2:          # IMDL-BenCo
            row = {"image": row[0], "mask": row[1], "label": int(row[1] != "Negative")}
        entry = row if isinstance(row, dict) else {}
        entry = {str(key).strip(): str(value).strip() for key, value in entry.items()}
        if entry.get("label") not in ("0", "1") or not entry.get("image"):
            raise BadInput(f"found {row!s:.99} as row {number} of {file}, expected a header "
                           "image,label,mask and label 0 (genuine) or 1 (manipulated): correct it")
        path = file.parent / entry["image"]
        has_mask = entry["label"] == "1" and entry.get("mask", "") not in ("", "None")
        mask = file.parent / entry["mask"] if has_mask else None
        picture = Picture(path, int(entry["label"]), mask, scene_of(path))

        first = found.setdefault(os.path.realpath(path), picture)
        if first.label != picture.label:
            problems.append(f"contradiction: {path} has label 0 and label 1: not used")
            found[os.path.realpath(path)] = first._replace(label=None)
        elif first is not picture:
            problems.append(f"duplicate: {path}, row {number}")
    return [p for p in found.values() if p.label is not None], Report("list", problems)


def read_set(path, masks=True, decode=False):
    """A folder or list -> (pictures, Report), without unusable files, which the report names;
    BadInput if nothing is left or the layout is unclear. masks=False: no mask is opened, nor kept.
    decode: reads every picture, not only its header."""
    root = Path(path)
    entries, report = read_folder(root) if root.is_dir() else read_list(root)
    problems = report.problems
    pictures = []
    for picture in entries:
        try:
            size = open_image(picture.path).size[::-1] if decode else picture_size(picture.path)[0]
        except BadInput as error:
            problems.append(f"bad file: {error}")
            continue
        mask = picture.mask if masks else None
        try:
            if mask and picture_size(mask)[0] != size:
                problems.append(f"mask of another size than its picture: {mask}")
        except BadInput as error:
            problems.append(f"bad mask: {error}")
            mask = None
        pictures.append(picture._replace(mask=mask))

    labels = {picture.label for picture in pictures}
    if not labels:
        raise BadInput(f"found no usable picture in {root} ({', '.join(problems[:1]) or 'empty'}), "
                       f"expected {', '.join(EXTENSIONS)}: check the path and the files")
    wrong = {0: "one class only: no manipulated pictures", 1: "one class only: no genuine pictures",
             None: "no labels: no folder is named au, tp or alike"}
    problems += [wrong[label] for label in labels if len(labels) == 1]
    return pictures, report


def split(pictures, fraction, seed):
    """Pictures -> (train, held_out): about `fraction` of each class is held out, no scene is in
    both, and both have both classes if that is possible. The same seed gives the same split."""
    scenes = defaultdict(Counter)                            # {scene: {label: pictures}}
    for picture in pictures:
        scenes[picture.source or str(picture.path)][picture.label] += 1
    order = np.random.default_rng(seed).permutation(sorted(scenes)).tolist()
    total = sum(scenes.values(), Counter())

    held = Counter()
    chosen = set()
    for label in sorted(total, key=total.get):               # the rarest class first
        goal = max(1, round(fraction * total[label])) if fraction > 0 else 0
        order.sort(key=lambda scene: scenes[scene][label] > goal)       # large scenes last
        for scene in order:
            more = held + scenes[scene]
            leaves_all = all(more[label] < total[label] for label in total)
            if held[label] < goal and scenes[scene][label] and scene not in chosen and leaves_all:
                chosen.add(scene)
                held = more
    held_out = [p for p in pictures if (p.source or str(p.path)) in chosen]
    return [p for p in pictures if (p.source or str(p.path)) not in chosen], held_out


class TrainingSet(Dataset):
    """Labelled pictures: item i -> (a random window of the view, mirrored in half of the cases,
    uint8 (3, window, window); label). Seeded by (seed, epoch, i), whatever the worker; from
    len(self) on, i means picture i % len(self), in another window.

    aims: {path: (y, x)}, a pixel of the view that the window of item i must contain (train.aim)."""

    def __init__(self, pictures, *, max_side, cell, window, seed):
        self.pictures = pictures
        self.max_side = max_side
        self.cell = cell
        self.window = window
        self.seed = seed
        self.epoch = 0
        self.aims = {}

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, index):
        rng = np.random.default_rng((self.seed, self.epoch, index))
        picture = self.pictures[index % len(self)]
        image = view(open_image(picture.path), self.max_side, self.cell)       # (3, H', W')
        aim = (None, None)
        if index < len(self):
            aim = self.aims.get(str(picture.path), aim)
        top, left = (self.start(side, at, rng) for side, at in zip(image.shape[1:], aim))
        image = image[:, top:top + self.window, left:left + self.window]       # (3, h, w)
        missing = [(0, self.window - side) for side in image.shape[1:]]
        pixels = np.pad((255 * image).round().byte(), [(0, 0), *missing], mode="reflect")
        window = torch.from_numpy(pixels)                                      # (3, window, window)
        if rng.random() < 0.5:
            window = window.flip(2)
        return window, picture.label

    def start(self, side, at, rng):
        """Where a window begins along a side: anywhere, or so that it contains the pixel `at`."""
        last = max(0, side - self.window)
        first = 0
        if at is not None:
            first = min(last, max(0, at - self.window + 1))
            last = min(last, at)
        return rng.integers(first, last + 1)


# ---------------------------------------------------------------------------------- the command

def demo():
    """From a file to training windows, on a picture drawn here: what each step makes."""
    colours = np.random.default_rng(1).integers(0, 256, (6, 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(colours).resize((700, 500)).save(file, "JPEG")
    picture = open_image(file)
    print(f"open_image() {picture.width} x {picture.height} pixels, {picture.mode}, of a JPEG file")
    for max_side in (1024, 512):
        shape = tuple(view(picture, max_side, cell=16).shape)
        print(f"view()       {shape} float32 in [0, 1] with max_side={max_side}, cell=16")
    items = TrainingSet([Picture(file, 0)], max_side=1024, cell=16, window=256, seed=0)
    for items.epoch in (0, 1):
        window, label = items[0]
        print(f"TrainingSet  {tuple(window.shape)} {window.dtype}, label {label}, in epoch "
              f"{items.epoch} with mean {window.float().mean():.1f}")


def main(arguments=None):
    """The command line; returns the exit status: 0 fine, 1 something is wrong, 2 wrong call."""
    parser = argparse.ArgumentParser(description="What a data set holds, and what is wrong in it.")
    parser.add_argument("path", help="folder or list of labelled pictures")
    path = parser.parse_args(arguments).path
    try:
        pictures, report = read_set(path, decode=True)
    except (BadInput, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    count = Counter(picture.label for picture in pictures)
    masks = sum(picture.mask is not None for picture in pictures)
    sizes = sorted(picture_size(picture.path)[0] for picture in pictures)
    print(f"{path}: {report.layout}; {count[0]} genuine, {count[1]} manipulated, {count[None]} "
          f"without label, {masks} masks; sizes (H, W) from {sizes[0]} to {sizes[-1]}")
    print("\n".join(report.problems) or "nothing wrong")
    return 1 if report.problems else 0


if __name__ == "__main__":
    if len(sys.argv) == 1:
        demo()
    else:
        sys.exit(main())
