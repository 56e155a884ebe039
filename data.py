"""Pictures and labels (0 genuine, 1 manipulated): views, data sets on disk, windows for training.

`python data.py SET` lists what a set holds and what is wrong with it; without SET, a short lesson.
"""
import argparse
import csv
import io
import json
import os
import re
import sys
import warnings
from collections import Counter, defaultdict
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

# .heic, .heif and .jxl need more than Pillow: they are reported as bad files, not passed over
EXTENSIONS = tuple(".jpg .jpeg .jpe .jfif .png .tif .tiff .bmp .webp .gif .avif .jp2 "
                   ".heic .heif .jxl".split())
DAMAGE = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, RuntimeError,
          MemoryError, Image.DecompressionBombError)         # what Pillow raises on bad files


class BadInput(ValueError):
    """Input that cannot be used, and why, in one line."""


# ---------------------------------------------------------------------------------- one picture

@contextmanager
def one_line():
    """Turn what Pillow and the file system raise into BadInput; only their calls belong inside."""
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except DAMAGE as error:
        text = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise BadInput(text.splitlines()[0]) from error


def to_bytes(values):
    """Numbers (0 is black) -> uint8. White is the smallest of 1, 255, 4095 (12 bits) and 65535 that
    no value exceeds [ours]; BadInput for negative, larger or non-finite values."""
    low, high = values.min(), values.max()
    if not 0 <= low <= high <= 65535:                        # NaN fits nowhere
        raise BadInput(f"found values from {low:g} to {high:g}, expected 0 to 65535: scale them")
    white = next(white for white in (1, 255, 4095, 65535) if high <= white)
    return np.round(values * np.float32(255 / white)).astype(np.uint8)


def to_rgb(image, background="white"):
    """PIL image of any mode -> RGB, upright by its EXIF orientation: numbers scaled by `to_bytes`,
    transparency laid over the background; BadInput if it is damaged or cannot be converted."""
    with one_line():
        image.load()
        turn = image.getexif().get(0x0112, 1)
    if image.mode.startswith(("I", "F")):                    # one channel: I;16, I, F
        image = Image.fromarray(to_bytes(np.asarray(image)))                      # (H, W)
    with one_line():
        if image.has_transparency_data:
            canvas = Image.new("RGBA", image.size, background)
            image = Image.alpha_composite(canvas, image.convert("RGBA"))
        image = image.convert("RGB")
    image.info.clear()                                       # Pillow cannot rewrite odd EXIF data
    image.getexif()[0x0112] = turn
    ImageOps.exif_transpose(image, in_place=True)
    return image


def open_image(path, background="white"):
    """Picture file -> `to_rgb` of its first frame; BadInput begins with the path."""
    try:
        with one_line():
            image = Image.open(path)
        with image:
            return to_rgb(image, background)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from error


def to_tensor(image):
    """PIL RGB image or (H, W, 3) uint8 array -> (3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous() / 255  # (3, H, W)


def reduced_size(size, max_side):
    """(W, H) -> (W', H') in proportion; unchanged unless a side is longer than max_side."""
    scale = min(1, max_side / max(size))
    return tuple(max(1, round(scale * side)) for side in size)


def view(picture, max_side, cell, least=1):
    """PIL RGB -> what the network sees, (3, H', W') float32 in [0, 1] [ours]: native pixels,
    because resampling erases traces. Only a picture with a side above max_side is reduced, once.
    Reflection pads right and bottom to multiples of cell, at least `least` (itself a multiple)."""
    W, H = reduced_size(picture.size, max_side)
    if (W, H) != picture.size:
        picture = picture.resize((W, H), Image.Resampling.BICUBIC, reducing_gap=3)
    missing = [(0, max(least - side, -side % cell)) for side in (H, W)]
    return to_tensor(np.pad(picture, [*missing, (0, 0)], mode="reflect"))         # (3, H', W')


# -------------------------------------------------------------------------- a data set on disk

class Picture(NamedTuple):
    """One entry of a data set: label 0 genuine, 1 manipulated, None unknown."""
    path: Path
    label: int | None
    mask: Path | None = None
    scene: str = ""               # `split` keeps the pictures of a scene together


# Patterns in the path of a picture below its set's folder, in lower case, without extension.
GENUINE = "/(?:au|authentic|genuine|real|originals?|pristine|untouched)/"
MANIPULATED = "/(?:tp|sp|manipulated|tampered|fakes?|forged|forger(?:y|ies)|spliced|edited)/"
MASKS = "/(?:[^/]*mask[^/]*|gt|[^/]*ground_?-? ?truth[^/]*)/"
LAYOUTS = {      # genuine, manipulated pictures; the first layout that fits every picture is taken
    "folders": (GENUINE, MANIPULATED),
    "CASIA": ("/au_[^/]*$", "/[st]p_[^/]*$"),
    "Columbia": ("/4cam_auth/[^/]*$", "/4cam_splc/[^/]*$"),
    "COVERAGE": (r"/image/\d+$", r"/image/\d+t$"),
    "DSO-1": (r"/normal-\d+$", r"/splicing-\d+$"),
    "IMD2020": ("/[^/]*/[^/]*_orig$", "/[^/]*/[^/]*(?<!_orig)$"),
}
SCENE = (r"(?:au|[st]p)_(?:.*_)?([a-z]{3})_?(\d{4,5})(?!\d)[^a-z]*"     # CASIA: background is last
         r"|(\d+)t|(.*?)(?:_[of])?")                                    # COVERAGE, CoMoFoD, others


def files_in(folder):
    """The picture files below a folder, sorted. Links are followed, each real file and folder
    counts once, hidden ones are skipped."""
    found = {}                                               # {real path: path}
    paths = [Path(folder)]
    for path in paths:                                       # the list grows on the way
        if os.path.realpath(path) in found:
            continue
        found[os.path.realpath(path)] = path
        if path.is_dir():
            inside = [each for each in path.iterdir() if not each.name.startswith(".")]
            paths += sorted(inside, key=lambda each: (each.is_symlink(), each))
    return sorted(path for path in found.values() if path.suffix.lower() in EXTENSIONS)


def find_layout(root, names, masks):
    """(layout, {picture: label}) by the first of LAYOUTS that fits the names of all pictures; "no
    labels" if no folder is named like a class and there are no masks; else BadInput."""
    names = {file: name for file, name in names.items() if file not in masks}
    stems = {Path(name).name for name in names.values()}
    twins = len(stems) < len(set(names.values()))
    odd = []
    for layout, patterns in LAYOUTS.items():
        genuine, manipulated = [{file for file in names if re.search(pattern, names[file])}
                                for pattern in patterns]
        odd += [file for file in names if (file in genuine) == (file in manipulated)]
        clear = layout == "folders" or not twins             # of equal names, one may be a mask
        if layout == "IMD2020":                              # fits any two levels of folders
            clear = masks and genuine
        if clear and names and genuine ^ manipulated == set(names):
            return layout, {file: int(file in manipulated) for file in names}

    if not masks and not re.search(f"{GENUINE}|{MANIPULATED}", " ".join(names.values())):
        return "no labels", dict.fromkeys(names)
    raise BadInput(f"found {[*odd, *sorted(masks)][0]}, which fits no layout, expected {root} to "
                   "hold only genuine pictures (au, real, ..), manipulated ones (tp, fake, ..) and "
                   "masks: rename or move it, or write a list image,label,mask")


def read_folder(root):
    """A folder in one of LAYOUTS, or of photos without labels -> (pictures, layout, problems)."""
    names = {file: "/" + file.relative_to(root).with_suffix("").as_posix().lower()
             for file in files_in(root)}

    # masks lie in mask folders or end in _gt or _mask, if any picture has a twin with that ending
    stems = {Path(name).name for name in names.values()}
    ends = tuple(end for end in ("_gt", "_mask") if any(stem + end in stems for stem in stems))
    masks = {file for file, name in names.items() if re.search(MASKS, name) or name.endswith(ends)}
    layout, labels = find_layout(root, names, masks)

    def key(file):
        """What a picture and its mask share: the path below their class folder, or the stem."""
        name = re.sub("_(gt|mask|edgemask)$", "", names[file])
        name = re.sub(r"(?<=\d)forged$", "t", name)          # COVERAGE
        below = re.sub(f"^.*(?:{GENUINE}|{MANIPULATED}|{MASKS})", "", name)
        return below if layout in ("folders", "IMD2020") else Path(name).name

    masks_of = defaultdict(list)
    for mask in masks:
        masks_of[key(mask)].append(mask)
    uses = Counter(key(file) for file, label in labels.items() if label == 1)
    pictures = []
    problems = []
    for file, label in labels.items():
        found = masks_of[key(file)] if label == 1 else []
        mask = found[0] if len(found) == uses[key(file)] == 1 else None      # else unclear
        if label == 1 and masks and not mask:
            problems.append(f"no mask of its own: {file}")
        scene = file.parent.name if layout == "IMD2020" else ""
        pictures.append(Picture(file, label, mask, scene))
    return pictures, layout, problems


def read_list(file):
    """A list -> pictures: CSV with a header image,label,mask, or the JSON of IMDL-BenCo, [[image,
    mask], ..] with "Negative" for a genuine one; paths are relative to its folder."""
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix.lower() == ".json":
            rows = [{"image": image, "label": int(mask != "Negative"), "mask": mask}
                    for image, mask in json.loads(text)]
        else:
            rows = list(csv.DictReader(text.splitlines()))
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise BadInput(f"found {file}, which cannot be read ({error}), expected a folder, CSV "
                       "list or IMDL-BenCo's JSON: check the path") from error

    pictures = {}                                            # {real path: Picture}
    for number, row in enumerate(rows, start=1):
        row = {str(key).strip(): str(value).strip() for key, value in row.items()}
        if row.get("label") not in ("0", "1") or not row.get("image"):
            raise BadInput(f"found {row!s:.99} as row {number} of {file}, expected a header "
                           "image,label,mask and label 0 (genuine) or 1 (manipulated): correct it")
        path = file.parent / row["image"]
        mask = row.get("mask", "")
        mask = None if mask in ("", "None", "Negative") else file.parent / mask
        picture = Picture(path, int(row["label"]), mask)
        if pictures.setdefault(os.path.realpath(path), picture).label != picture.label:
            raise BadInput(f"found {path} with labels 0 and 1 in {file}, expected one: correct it")
    return list(pictures.values())


def read_set(path, masks=True):
    """A folder or list -> (pictures, layout: a key of LAYOUTS, "no labels" or "list", problems: a
    line each). Each picture and, unless masks=False, each mask is decoded once; unusable ones are
    left out. BadInput if no layout fits or nothing is left."""
    root = Path(path)
    if root.is_dir():
        entries, layout, problems = read_folder(root)
    else:
        entries, layout, problems = read_list(root), "list", []
    wanted = [("file", picture.path) for picture in entries]
    wanted += [("mask", picture.mask) for picture in entries if picture.mask and masks]
    usable = {None}
    for kind, file in wanted:
        try:
            open_image(file)
            usable.add(file)
        except BadInput as error:
            problems.append(f"bad {kind}: {error}")

    pictures = []
    for p in entries:
        if p.path in usable:
            mask = p.mask if p.mask in usable else None
            parts = re.fullmatch(SCENE, p.path.stem.lower(), re.DOTALL)
            scene = p.scene or "".join(parts.groups("")) or str(p.path)
            pictures.append(p._replace(mask=mask, scene=scene))
    if not pictures:
        raise BadInput(f"found no usable picture in {root} ({[*problems, 'empty'][0]}), "
                       "expected .jpg, .png, .tif, ..: check the path and the files")
    if layout == "no labels":
        problems.append("no labels: in training, every picture counts as genuine")
    return pictures, layout, problems


def split(pictures, fraction, seed):
    """Pictures -> (train, held_out): about `fraction` of each class is held out; no scene is in
    both, and each part has both classes if possible. The same seed gives the same split."""
    scenes = defaultdict(Counter)                            # {scene: {label: pictures}}
    for picture in pictures:
        scenes[picture.scene][picture.label] += 1
    order = np.random.default_rng(seed).permutation(sorted(scenes)).tolist()
    total = sum(scenes.values(), Counter())

    held = Counter()
    for label in sorted(total, key=total.get):               # the rarest class first
        goal = max(1, round(fraction * total[label]))
        order.sort(key=lambda scene: scenes[scene][label] > goal)       # large scenes last
        for scene in order:
            more = held + scenes[scene]
            leaves_all = all(more[label] < total[label] for label in total)
            if held[label] < goal and scenes[scene][label] and leaves_all:
                held = more
                scenes[scene] = Counter()                    # nothing of it is left to train on
    held_out = [p for p in pictures if not scenes[p.scene]]
    return [p for p in pictures if scenes[p.scene]], held_out


class TrainingSet(torch.utils.data.Dataset):
    """Labelled pictures: item i -> (a random window of the view, mirrored with probability 1/2,
    uint8 (3, window, window); label). Randomness is seeded by (seed, epoch, i) alone.
    From i = len(self) on, item i is another window of picture i % len(self)."""

    def __init__(self, pictures, *, max_side, cell, window, seed):
        self.pictures = pictures
        self.max_side = max_side
        self.cell = cell
        self.window = window
        self.seed = seed
        self.epoch = 0

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, index):
        rng = np.random.default_rng((self.seed, self.epoch, index))
        picture = self.pictures[index % len(self)]
        image = view(open_image(picture.path), self.max_side, self.cell, self.window)
        room = np.array(image.shape[1:]) - self.window                         # (2,)
        top, left = rng.integers(room + 1)
        window = image[:, top:top + self.window, left:left + self.window]
        window = (255 * window).round().byte()                                 # (3, window, window)
        if rng.random() < 0.5:
            window = window.flip(2)
        return window, picture.label


def demo():
    """Why the network sees native pixels: resampling erases traces, here those of a JPEG file."""
    noise = np.random.default_rng(0).normal(128, 6, (512, 512, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG")
    print("Noise, saved as JPEG. Steps across the borders of its blocks, relative to all steps:")
    for max_side, block in ((512, 8), (256, 4)):             # native pixels, half the size
        pixels = view(open_image(file), max_side, cell=16)                        # (3, H', W')
        steps = pixels.diff(dim=2).abs().mean(dim=(0, 1))                         # (W' - 1,)
        ratio = steps[block - 1::block].mean() / steps.mean()
        print(f"    max_side {max_side}: {ratio:.2f}")


def main(arguments=None):
    """The command line; returns the exit status: 0 fine, 1 notes or faults, 2 wrong call."""
    parser = argparse.ArgumentParser(description="What a set holds and what is wrong with it.")
    parser.add_argument("path", help="folder or list of labelled pictures")
    path = parser.parse_args(arguments).path
    try:
        pictures, layout, problems = read_set(path)
    except (BadInput, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    count = Counter(picture.label for picture in pictures)
    masks = sum(picture.mask is not None for picture in pictures)
    print(f"{path}: {layout}; {count[0]} genuine, {count[1]} manipulated, {count[None]} "
          f"without label, {masks} masks")
    print("\n".join(problems) or "nothing wrong")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="surrogateescape")         # file names that are not UTF-8
    sys.exit(main()) if sys.argv[1:] else demo()
