"""Pictures and labels: reading data sets in the field's layouts, and feeding the training.

Reading order: one picture -> a data set on disk -> the training set -> what is wrong with a set
(`python data.py SET`; without SET a short lesson). Label 1 = manipulated. Masks are named here,
never read: only tests/evaluate.py does. The training set holds paths and labels.
"""
import argparse
import csv
import io
import json
import re
import sys
from collections import Counter, defaultdict
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from torch.utils.data import Dataset

EXTENSIONS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")
MAX_PIXELS = 200_000_000      # ours: 600 MB decoded; a header that claims more is refused


# ---------------------------------------------------------------------------------- one picture

@contextmanager
def opened(path):
    """An image file, only its header read; any failure, in the body too, becomes a ValueError,
    "path: reason"."""
    Image.MAX_IMAGE_PIXELS = None                    # Pillow warns and refuses earlier than we do
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"found {image.width} x {image.height} pixels, expected at most "
                                 f"{MAX_PIXELS:,}: make it smaller")
            yield image
    except Exception as error:                       # damage has many faces
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        reason = reason.removeprefix(f"{path}: ").splitlines()[0]
        raise ValueError(f"{path}: {reason}") from error


def to_rgb(image, background="white"):
    """PIL image of any mode -> RGB: deeper than 8 bits scaled down, what is transparent filled."""
    if image.mode.startswith(("I", "F")):                   # one channel: I;16, I, F
        values = np.asarray(image, dtype=np.float32)                              # (H, W)
        if values.max() > 255:
            values = values / 257
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert("RGB")


def open_image(path):
    """Picture file -> PIL RGB: first frame, EXIF orientation applied; or ValueError."""
    with opened(path) as image:
        return to_rgb(ImageOps.exif_transpose(image))


def picture_size(path):
    """(H, W) as `open_image` returns it, and the EXIF orientation, from the header alone."""
    with opened(path) as image:
        turn = Image.Image.getexif(image).get(0x0112, 1)     # PNG's own would decode it all
        W, H = image.size
    if turn >= 5:                                            # lies on its side
        return (W, H), turn
    return (H, W), turn


def to_tensor(image):
    """PIL RGB image or (H, W, 3) uint8 array -> (3, H, W) float32 in [0, 1]."""
    array = torch.from_numpy(np.array(image))                                     # (H, W, 3)
    return array.permute(2, 0, 1).contiguous() / 255                              # (3, H, W)


def jpeg(image, quality, shift=(0, 0), subsampling=0):
    """Encode and decode a PIL RGB image, its 8x8 grid shifted by (x, y) pixels."""
    dx, dy = shift
    padded = np.pad(image, ((dy, 0), (dx, 0), (0, 0)), mode="edge")               # (H+dy, W+dx, 3)
    buffer = io.BytesIO()
    Image.fromarray(padded).save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    H, W, _ = padded.shape
    return Image.open(buffer).convert("RGB").crop((dx, dy, W, H))


def add_noise(image, sigma, rng):
    """Gaussian noise of standard deviation sigma (levels of 0-255) on a PIL RGB image."""
    noise = rng.standard_normal((image.height, image.width, 3), dtype=np.float32)
    noisy = np.asarray(image) + sigma * noise + 0.5
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


# -------------------------------------------------------------------------- a data set on disk

class Picture(NamedTuple):
    """One entry of a data set: label 0 genuine, 1 manipulated, None unknown."""
    path: Path
    label: int | None
    mask: Path | None = None
    source: str = ""              # pictures of one scene share it: never split up by `split`
    inverted: bool = False        # the mask is black where manipulated


class Report(NamedTuple):
    """How a set was read."""
    layout: str                   # a key of LAYOUTS, "list" or "no labels"
    problems: list                # one line each, empty if all is well


class Layout(NamedTuple):
    """What paths look like: lower case, without extension, below any folder. A mask belongs to the
    picture with equal groups; the groups of `scene` are what pictures of one scene share."""
    genuine: str
    manipulated: str
    mask: str
    scene: str
    unused: str = "(?!)"          # never matches
    inverted: bool = False


GENUINE = "(?:au|authentic|genuine|real|originals?|pristine|untouched)"
MANIPULATED = "(?:tp|sp|manipulated|tampered|fakes?|forged|forger(?:y|ies)|spliced|edited)"
MASKS = r"(?:[^/]*mask[^/]*|gt|[^/]*ground_?-? ?truth[^/]*)"
LAYOUTS = {      # the first one that every picture fits is taken
    "CASIA": Layout("au_[^/]*", "([st]p_[^/]*)", "([st]p_[^/]*)_gt",
                    # the last of two scenes in a name is the background
                    scene=r"(?:.*_)?([a-z]{3})_?(\d{4,5})[^a-z/]*|([^/]*)"),
    "Columbia": Layout("4cam_auth/[^/]*", "4cam_splc/([^/]*)", "4cam_splc/edgemask/(.*)_edgemask",
                       scene="([^/]*)", unused="4cam_auth/edgemask/.*"),
    "COVERAGE": Layout(r"image/\d+", r"image/(\d+)t", r"mask/(\d+)forged", scene=r"(\d+)t?",
                       unused=r"mask/\d+(?:copy|paste)"),
    "DSO-1": Layout(r"normal-\d+", r"(splicing-\d+)", f"{MASKS}/(splicing-\\d+)", scene="([^/]*)",
                    inverted=True),
    "folders": Layout(f"{GENUINE}/.*", f"{MANIPULATED}/(.*)", f"{MASKS}/(.*?)(?:_gt|_mask)?",
                      scene="([^/]*?)(?:_[of])?"),
    "IMD2020": Layout("[^/]*/[^/]*_orig", "([^/]*/[^/]*(?<!_orig))", "([^/]*/[^/]*)_mask",
                      scene="([^/]*)/[^/]*"),
}


def match(pattern, name):
    """The groups of a pattern that fits the end of a path from some folder on, or None."""
    found = re.fullmatch(f"(?:.*/)?(?:{pattern})", name)
    return found and found.groups()


def roles_in(layout, names):
    """{file: (role, groups)} where a Layout knows what a file is; names: {file: path in it}."""
    roles = {}
    for file, name in names.items():
        found = {}
        for role in ("mask", "unused", "genuine", "manipulated"):      # a mask is no picture
            groups = match(getattr(layout, role), name)
            if groups is not None:
                found[role] = groups
        unclear = set(found) == {"genuine", "manipulated"}             # such as tp/real/
        if found and not unclear:
            roles[file] = next(iter(found.items()))
    return roles


def find_layout(root, names):
    """(name in LAYOUTS, roles) of the layout that every file fits; ("no labels", {}) if no folder
    is named like a class or like masks; else ValueError, which names a file that does not fit."""
    for name, layout in LAYOUTS.items():
        roles = roles_in(layout, names)
        kinds = {role for role, _ in roles.values()}
        usable = "genuine" in kinds or "manipulated" in kinds
        if name == "IMD2020":                              # any two levels of folders look like it
            usable = "genuine" in kinds and "mask" in kinds
        if usable and len(roles) == len(names):
            return name, roles

    telling = f"(?:{GENUINE}|{MANIPULATED}|{MASKS})/.*"
    if all(match(telling, name) is None for name in names.values()):
        return "no labels", {}
    known = roles_in(LAYOUTS["folders"], names)
    odd = [file for file in names if file not in known] or list(names)
    raise ValueError(f"found {odd[0]}, which fits no layout, expected in {root} only folders of "
                     "genuine pictures (au, real, ..), manipulated ones (tp, fake, ..) and masks: "
                     "rename or move it, or write a list image,label,mask")


def names_in(root):
    """{file: its path in a folder, as a Layout sees it} of all pictures that are not hidden."""
    files = sorted(file for file in root.rglob("*") if file.is_file())
    names = {}
    for file in files:
        name = file.relative_to(root).with_suffix("").as_posix().lower()
        hidden = "/." in f"/{name}"
        if file.suffix.lower() in EXTENSIONS and not hidden:
            names[file] = name
    if not names:
        endings = ", ".join(sorted({file.suffix for file in files})) or "nothing"
        raise ValueError(f"found no picture in {root} (only {endings}), expected "
                         f"{', '.join(EXTENSIONS)}: convert them, or check the path")
    return names


def read_folder(root):
    """A folder in one of LAYOUTS -> (pictures, Report); in none of them: pictures, no labels."""
    names = names_in(root)
    layout, roles = find_layout(root, names)
    if layout == "no labels":
        problem = "no labels: no folder is named au, tp or alike"
        return [Picture(file, None) for file in names], Report(layout, [problem])

    # what has equal groups belongs together
    masks = defaultdict(list)
    manipulated = defaultdict(list)
    for file, (role, groups) in roles.items():
        if role == "mask":
            masks[groups].append(file)
        elif role == "manipulated":
            manipulated[groups].append(file)
    problems = []
    for first, *others in (*masks.values(), *manipulated.values()):
        problems += [f"duplicate: {other} beside {first}" for other in others]
    for groups in masks.keys() - manipulated.keys():
        problems.append(f"mask without picture: {masks[groups][0]}")

    pictures = []
    for file, (role, groups) in roles.items():
        if role not in ("genuine", "manipulated"):
            continue
        label = 0 if role == "genuine" else 1
        mask = None
        if label == 1 and len(masks.get(groups, ())) == 1:             # of two, neither is used
            mask = masks[groups][0]
        if label == 1 and masks and not mask:
            problems.append(f"no mask: {file}")
        scene = match(LAYOUTS[layout].scene, names[file]) or ()
        source = "".join(group for group in scene if group)
        pictures.append(Picture(file, label, mask, source, LAYOUTS[layout].inverted))
    return pictures, Report(layout, problems)


def list_rows(file):
    """The rows of a list as (line or entry number, image, mask, label), texts as they stand."""
    text = file.read_text(encoding="utf-8-sig")
    lines = text.splitlines()

    if file.suffix.lower() == ".json":
        entries = json.loads(text)
        if isinstance(entries, dict):                          # WSCL: {id: {path, label, mask}}
            return [(i, row["path"], row.get("mask"), row["label"])
                    for i, row in enumerate(entries.values(), start=1)]
        return [(i, image, mask, "0" if mask == "Negative" else "1")            # IMDL-BenCo
                for i, (image, mask) in enumerate(entries, start=1)]

    if file.suffix.lower() == ".csv":                          # image,label[,mask]
        reader = csv.DictReader(lines)
        if not {"image", "label"} <= set(reader.fieldnames or ()):
            raise ValueError(f"its first line is {lines[:1]!r:.60}")
        return [(reader.line_num, row["image"], row.get("mask"), row["label"]) for row in reader]

    rows = []                                                  # MVSS-Net: image mask label
    for i, line in enumerate(lines, start=1):
        words = line.rsplit(maxsplit=2)
        if len(words) == 3:
            rows.append((i, *words))
        elif words:
            raise ValueError(f"line {i} is {line!r:.60}")
    return rows


def read_list(file):
    """A list of pictures -> (pictures, Report); paths start at its folder."""
    pictures = {}
    problems = []
    try:
        for number, image, mask, label in list_rows(file):
            if str(label).strip() not in ("0", "1"):
                raise ValueError(f"line {number}: found label {label!r:.60}, expected 0 (genuine) "
                                 "or 1 (manipulated)")
            path = file.parent / image.strip()
            if path in pictures:
                problems.append(f"duplicate: {path}, line {number}")
                continue
            has_mask = int(label) == 1 and mask not in ("", "None", None)
            mask = file.parent / mask if has_mask else None
            pictures[path] = Picture(path, int(label), mask, path.stem.lower())
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"found {file}, which cannot be read ({error}), expected CSV with the "
                         "header image,label,mask (commas), text 'image mask label', or JSON: "
                         "correct it") from None

    if pictures and not any(path.is_file() for path in pictures):
        raise ValueError(f"found none of the {len(pictures)} pictures of {file}, tried "
                         f"{next(iter(pictures))}: write paths as seen from the list's folder")
    return list(pictures.values()), Report("list", problems)


def check(picture, decode):
    """What is wrong with a picture's files: one line, "bad file" if it is unusable, or ""."""
    try:
        size, _ = picture_size(picture.path)
        if decode:
            open_image(picture.path)
        if picture.mask:
            found, _ = picture_size(picture.mask)
            if found != size and found == (size[1], size[0]):
                return f"mask on its side, will be turned: {picture.mask}"
            if found != size:
                return f"mask of another size than its picture: {picture.mask}"
    except ValueError as error:
        return f"bad file: {error}"
    return ""


def read_set(path, masks=True, decode=False):
    """A folder or list -> (pictures, Report) without unusable files, which the report names.

    masks=False: no mask is opened, nor kept. decode: reads every picture, not only its header.
    Raises ValueError, one line, if there is nothing to use or the layout is unclear.
    """
    root = Path(path)
    if not root.exists():
        raise ValueError(f"found no {root}, expected a folder or list of pictures: check the path")
    if root.is_file() and root.suffix.lower() in EXTENSIONS:
        raise ValueError(f"found a picture, {root}, expected a folder or list: name its folder")
    entries, report = read_folder(root) if root.is_dir() else read_list(root)

    pictures = []
    for picture in entries:
        if not masks:
            picture = picture._replace(mask=None)
        problem = check(picture, decode)
        if problem:
            report.problems.append(problem)
        if not problem.startswith("bad file"):
            pictures.append(picture)
    if not pictures:
        reason = report.problems[-1] if report.problems else "it is empty"
        raise ValueError(f"found no usable picture in {root} ({reason}), expected some: folders "
                         "au/ and tp/, or a list")

    labels = {picture.label for picture in pictures}
    for label, name in enumerate(("genuine", "manipulated")):
        if report.layout != "no labels" and label not in labels:
            report.problems.append(f"one class only: no {name} pictures")
    return pictures, report


def split(pictures, fraction, seed):
    """Pictures -> (train, val): about `fraction` of the scenes go to val, no scene to both."""
    scene_of = {picture: picture.source or str(picture.path) for picture in pictures}
    scenes = np.random.default_rng(seed).permutation(sorted(set(scene_of.values())))
    held_out = set(scenes[:round(fraction * len(scenes))])

    train = [picture for picture in pictures if scene_of[picture] not in held_out]
    val = [picture for picture in pictures if scene_of[picture] in held_out]
    return train, val


# ------------------------------------------------------------------------------ the training set

def degrade(image, size, rng):
    """Rescale a PIL RGB image to `size` (W, H), then blur, noise and JPEG, each sometimes (ours):
    compression or sharpness shall not tell the classes. Equal rng, equal treatment."""
    kinds = (Image.Resampling.LANCZOS, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
    sampling = kinds[rng.integers(3)]
    if image.size != size:
        image = image.resize(size, sampling)

    if rng.random() < 0.15:
        image = image.filter(ImageFilter.GaussianBlur(0.3 * 13 ** rng.random()))     # 0.3 .. 3.9
    if rng.random() < 0.15:
        image = add_noise(image, rng.uniform(1, 6), rng)
    if rng.random() < 0.65:
        quality = int(rng.integers(45, 101))
        image = jpeg(image, quality, rng.integers(0, 8, 2), subsampling=int(rng.choice([0, 2])))
    return image


class TrainingSet(Dataset):
    """Labelled pictures [(path, label)]: item -> (image (3, size, size) in [0, 1], label, index).

    Chance comes from (seed, epoch, index), whatever the worker. augment: random squares and flips.
    cache: megabytes of pictures that stay decoded. Arrays (H, W, 3) uint8 may stand for paths.
    """

    def __init__(self, pairs, *, size, seed, augment=True, cache=1000):
        self.photos = [photo for photo, _ in pairs]
        self.labels = [label for _, label in pairs]
        self.size = size
        self.seed = seed
        self.augment = augment
        self.epoch = 0

        for i in range(len(self.photos)):
            if cache > 0:
                self.photos[i] = self.photo(i)
                cache -= self.photos[i].nbytes / 1e6

    def __len__(self):
        return len(self.labels)

    def photo(self, i):
        """Photo i as (H, W, 3) uint8."""
        photo = self.photos[i]
        if isinstance(photo, np.ndarray):
            return photo
        return np.asarray(open_image(photo))

    def rng(self, *numbers):
        return np.random.default_rng((self.seed, self.epoch, *numbers))

    def work_size(self, rng):
        """The side to work at; `degrade` to self.size then rescales by 0.5-1.25, often by 1."""
        if rng.random() < 0.35:
            return round(self.size / rng.uniform(0.5, 1.25))
        return self.size

    def window(self, photo, side, work, rng):
        """A random square, `side` pixels at most, flipped or not, resampled to `work` -> RGB."""
        H, W, _ = photo.shape
        side = max(1, min(round(side), H, W))
        y = rng.integers(0, H - side + 1)
        x = rng.integers(0, W - side + 1)

        window = Image.fromarray(photo[y:y + side, x:x + side])
        if rng.random() < 0.5:
            window = ImageOps.mirror(window)
        return window.resize((work, work), Image.Resampling.BICUBIC)

    def __getitem__(self, index):
        rng = self.rng(index)
        photo = self.photo(index)
        work = self.work_size(rng)

        if self.augment:
            side = rng.uniform(0.6, 1) * min(photo.shape[:2])
            image = self.window(photo, side, work, rng)
        else:
            image = ImageOps.fit(Image.fromarray(photo), (work, work))

        image = degrade(image, (self.size, self.size), rng)
        return to_tensor(image), self.labels[index], index


# ---------------------------------------------------------------------- what is wrong with a set

def accuracy_from(values, labels):
    """Balanced accuracy of guessing n labels (0, 1) from n values; 0.5 is chance (ours). Each label
    is guessed from the pictures of the same value in another random half, ten times."""
    right = {0: [], 1: []}
    for seed in range(10):
        half = np.random.default_rng(seed).permutation(len(labels)) % 2
        total = Counter(zip(half, labels))
        seen = Counter(zip(half, labels, values))

        for own_half, value, label in zip(half, values, labels):
            other = 1 - own_half
            support = seen[other, label, value] / max(1, total[other, label])
            against = seen[other, 1 - label, value] / max(1, total[other, 1 - label])
            right[label].append(0.5 + 0.5 * np.sign(support - against))         # a draw: half right
    return np.mean([np.mean(right[0]), np.mean(right[1])])


def leaks(pictures):
    """How well trivial cues in the files' headers tell the class -> {cue: `accuracy_from`}."""
    cues = defaultdict(list)
    for picture in pictures:
        with opened(picture.path) as image:
            density = picture.path.stat().st_size / (image.width * image.height)
            cues["format"].append(image.format)
            cues["size"].append(image.size)
            cues["aspect"].append(round(8 * np.log2(image.width / image.height)))
            cues["JPEG tables"].append(str(getattr(image, "quantization", "")))
            cues["bytes per pixel"].append(round(8 * np.log2(density)))
    labels = [picture.label for picture in pictures]
    return {cue: accuracy_from(values, labels) for cue, values in cues.items()}


def contact_sheet(pictures, path, cell=128):
    """Write up to 24 pictures of a set, each beside its mask and with its name, as one picture."""
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
        sheet.paste(ImageOps.contain(open_image(picture.path), (cell, cell)), (x, y))
        if picture.mask:
            sheet.paste(ImageOps.contain(open_image(picture.mask), (cell, cell)), (x + cell, y))
    sheet.save(path)


def describe(path, with_leaks):
    """Print what a data set holds and what is wrong -> (pictures, problems)."""
    pictures, report = read_set(path, decode=True)
    count = Counter(picture.label for picture in pictures)
    formats = Counter(picture.path.suffix.lower() for picture in pictures)
    sizes = {picture_size(picture.path)[0] for picture in pictures}
    masks = sum(picture.mask is not None for picture in pictures)
    print(f"{path}: {report.layout}; {count[0]} genuine, {count[1]} manipulated, {count[None]} "
          f"without label, {masks} masks")
    print(f"{dict(formats)}, {len(sizes)} sizes (H, W) from {min(sizes)} to {max(sizes)}")

    if with_leaks:
        if not (count[0] and count[1]):
            raise ValueError("found no two classes, expected both for --leaks: leave it out")
        for cue, accuracy in leaks(pictures).items():
            print(f"{cue:16} tells the class with balanced accuracy {accuracy:.2f} (chance 0.50)")
            if accuracy > 0.5 + max(0.1, len(pictures) ** -0.5):
                report.problems.append(f"leak: {cue} alone tells the class")
    print("\n".join(report.problems) or "nothing wrong")
    return pictures, report.problems


def demo():
    """From a file to a training item, on a picture drawn here: what each step makes."""
    rng = np.random.default_rng(1)
    colours = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
    photo = add_noise(colours.resize((128, 96)), 4, rng)                # PIL RGB
    print(f"photo        {np.asarray(photo).shape} uint8, (H, W, 3): soft colours and some noise")
    print(f"to_tensor()  {tuple(to_tensor(photo).shape)} float32 in [0, 1]")

    # Files of one class have JPEG quality 90, of the other 70: a model could learn just that.
    small = photo.crop((0, 0, 16, 16))
    labels = [0, 1] * 500
    files = [jpeg(small, 90 - 20 * label) for label in labels]
    before = accuracy_from([file.tobytes() for file in files], labels)
    after = [degrade(file, file.size, rng).tobytes() for file in files]
    print("leaks        genuine files of JPEG quality 90, manipulated ones of 70: their pixels")
    print(f"             tell the class with accuracy {before:.2f}, after degrade() with "
          f"{accuracy_from(after, labels):.2f}; chance is 0.50")

    items = TrainingSet([(np.asarray(photo), 0)], size=64, seed=0)
    for epoch in (0, 1):
        items.epoch = epoch
        image, label, index = items[0]
        print(f"training     epoch {epoch}, item {index}: {tuple(image.shape)}, label {label}, "
              f"mean {image.mean():.3f}: another window, and no mask")


def main(arguments=None):
    """The command line; returns the exit status: 0 fine, 1 something is wrong, 2 wrong call."""
    parser = argparse.ArgumentParser(description="What a data set holds, and what is wrong in it.",
                                     allow_abbrev=False)
    parser.add_argument("path", help="folder or list of labelled pictures")
    parser.add_argument("--leaks", action="store_true", help="do trivial cues tell the class?")
    parser.add_argument("--preview", metavar="PNG", help="draw a contact sheet")
    args = parser.parse_args(arguments)
    try:
        pictures, problems = describe(args.path, args.leaks)
        if args.preview:
            contact_sheet(pictures, args.preview)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if problems else 0


if __name__ == "__main__":
    if len(sys.argv) == 1:
        demo()
    else:
        sys.exit(main())
