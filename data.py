"""Pictures and labels: reading data sets, making manipulated pictures, feeding the training.

Reading order: one picture -> a data set on disk -> synthesis -> the two training sets -> command line.
Label 1 and mask 1 = manipulated. The training sets hold paths and labels only: no way to a mask.
"""
import io
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter, ImageOps, ImageStat
from torch.utils.data import Dataset

EXTENSIONS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")


# ----------------------------------------------------------------------------------- one picture

class BadPicture(ValueError):
    """A file that cannot be used as a picture; the message is "path: reason"."""


def open_image(path):
    """Any picture file -> PIL RGB image: first frame, EXIF orientation applied, alpha on white.

    16-bit, CMYK, palette and grey are converted. Raises BadPicture; pictures above Pillow's size limit
    (89 million pixels) are refused from the header, before they are decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()
                return to_rgb(ImageOps.exif_transpose(image))
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombWarning,
            Image.DecompressionBombError) as error:
        raise BadPicture(f"{path}: {str(error).splitlines()[0] or type(error).__name__}") from error


def to_rgb(image):
    """PIL image of any mode -> RGB. 16-bit values are divided by 257, transparency lies on white."""
    if image.mode[0] in "IF":                       # I, I;16, I;16B, F: one channel, deeper than 8 bits
        values = np.asarray(image, dtype=np.float32)
        scale = 1 / 257 if values.max() > 255 else 255 if values.max() <= 1 < len(image.mode) else 1
        image = Image.fromarray((values * scale).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_tensor(image):
    """PIL RGB image or (H, W, 3) uint8 array -> (3, H, W) float32 in [0, 1]."""
    array = torch.from_numpy(np.array(image, dtype=np.uint8))
    return array.permute(2, 0, 1).contiguous().float().div_(255)


def jpeg(image, quality, dx=0, dy=0, subsampling=0):
    """Encode and decode a PIL RGB image, its 8x8 grid shifted by (dx, dy) pixels."""
    if dx or dy:
        image = Image.fromarray(np.pad(np.asarray(image), ((dy, 0), (dx, 0), (0, 0)), mode="edge"))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    return Image.open(buffer).convert("RGB").crop((dx, dy, image.width, image.height))


def add_noise(image, sigma, rng):
    """Gaussian noise of standard deviation sigma (levels of 0-255) on every channel of an RGB image."""
    noise = rng.standard_normal((image.height, image.width, 3), dtype=np.float32) * sigma
    return Image.fromarray((np.asarray(image) + noise + 0.5).clip(0, 255).astype(np.uint8))


def attack(image, spec):
    """A robustness test on a PIL RGB image: "jpeg:QUALITY", "blur:KERNEL" or "noise:VARIANCE".

    As IMDL-BenCo: the Gaussian kernel of k pixels has sigma 0.3 ((k - 1) / 2 - 1) + 0.8, the variance is on
    the 0-255 scale; the noise is the same in every run. Raises ValueError for anything else.
    """
    name, _, value = spec.partition(":")
    if name not in ("jpeg", "blur", "noise") or not value.isdigit() or not int(value):
        raise ValueError(f"found attack {spec!r}, expected jpeg:QUALITY, blur:KERNEL or noise:VARIANCE, "
                         "for example jpeg:70, blur:7 or noise:11")
    value = int(value)
    if name == "jpeg":
        return jpeg(image, min(value, 100), subsampling=2)
    if name == "blur":
        return image.filter(ImageFilter.GaussianBlur(0.3 * ((value - 1) / 2 - 1) + 0.8))
    return add_noise(image, value ** 0.5, np.random.default_rng(0))


# -------------------------------------------------------------------------- a data set on disk

class Picture(NamedTuple):
    """One entry of a data set: label 0 genuine, 1 manipulated, None unknown."""
    path: Path
    label: int | None
    mask: Path | None = None
    inverted: bool = False        # the mask is black where manipulated
    green: bool = False           # the mask is green where manipulated (Columbia)
    source: str = ""              # pictures of one scene share it: never split between train and val


def read_set(path, need_both=False):
    """Folder -> (list of Picture, report)."""
    root = Path(path)
    pictures = []
    for folder, label in (("au", 0), ("tp", 1)):
        for file in sorted((root / folder).glob("*")):
            if file.suffix.lower() in EXTENSIONS:
                mask = root / "mask" / (file.stem + ".png")
                pictures.append(Picture(file, label, mask if label and mask.exists() else None,
                                        source=file.stem))
    return pictures, None


def split(pictures, fraction, seed):
    """Pictures -> (train, val): about `fraction` of the scenes go to val, no scene to both."""
    sources = sorted({picture.source for picture in pictures})
    order = np.random.default_rng(seed).permutation(len(sources))
    held_out = {sources[i] for i in order[:round(fraction * len(sources))]}
    return ([p for p in pictures if p.source not in held_out],
            [p for p in pictures if p.source in held_out])


# -------------------------------------------------------------- synthesis: changes to a picture

def curve(image, gain=(1, 1, 1), contrast=1.0):
    """Per-channel gain and contrast about mid-grey, as one table look-up."""
    levels = np.arange(256) * np.array(gain)[:, None]                             # (3, 256)
    levels = (levels - 128) * contrast + 128
    return image.point(levels.clip(0, 255).round().astype(int).ravel().tolist())


TOUCHES = {   # word of the caption: (image, rng, u) -> image, u uniform in [0, 1] = how strong
    "brighter": lambda image, rng, u: curve(image, (1.12 + 0.35 * u,) * 3),
    "darker": lambda image, rng, u: curve(image, (0.88 - 0.3 * u,) * 3),
    "more contrast": lambda image, rng, u: curve(image, contrast=1.2 + 0.5 * u),
    "less contrast": lambda image, rng, u: curve(image, contrast=0.8 - 0.3 * u),
    "warmer": lambda image, rng, u: curve(image, (1.08 + 0.15 * u, 1, 0.92 - 0.2 * u)),
    "colder": lambda image, rng, u: curve(image, (0.92 - 0.2 * u, 1, 1.08 + 0.15 * u)),
    "paler": lambda image, rng, u: ImageEnhance.Color(image).enhance(0.6 * (1 - u)),
    "blurred": lambda image, rng, u: image.filter(ImageFilter.GaussianBlur(0.6 + 1.4 * u)),
    "sharpened": lambda image, rng, u: image.filter(ImageFilter.UnsharpMask(1.5, int(80 + 170 * u), 0)),
    "noisy": lambda image, rng, u: add_noise(image, 4 + 10 * u, rng),
    "smoothed": lambda image, rng, u: image.filter(ImageFilter.MedianFilter(3 if u < 0.5 else 5)),
    "recompressed": lambda image, rng, u: jpeg(image, int(75 - 45 * u), *rng.integers(0, 8, 2)),
}


def touch(image, rng):
    """One random entry of TOUCHES -> (image, its word)."""
    word = str(rng.choice(list(TOUCHES)))
    return TOUCHES[word](image, rng, rng.random()), word


# -------------------------------------------------------------- synthesis: shapes and places

def random_box(size, rng):
    """A (width, height) for a region that covers 4-70 % of a picture of this size, log-uniform."""
    area = np.exp(rng.uniform(np.log(0.04), np.log(0.7))) * size[0] * size[1] / 0.6
    aspect = np.exp(rng.uniform(-0.7, 0.7))                    # shapes fill about 0.6 of their box
    width, height = (area * aspect) ** 0.5, (area / aspect) ** 0.5
    return [int(min(max(side, 5), 0.95 * limit)) for side, limit in zip((width, height), size)]


def outline(box, rng, smooth):
    """A closed outline that fills the box: an irregular smooth blob, or a polygon of 3-8 corners -> L."""
    if smooth:
        angle = np.linspace(0, 2 * np.pi, 60, endpoint=False)
        wave = np.arange(1, 6)[:, None]
        radius = 1 + (rng.normal(0, 0.28, (5, 1)) / wave ** 0.5
                      * np.cos(wave * angle + rng.uniform(0, 2 * np.pi, (5, 1)))).sum(0)
        radius = radius.clip(0.25)
    else:
        angle = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 9)))
        radius = rng.uniform(0.5, 1, len(angle))
    points = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)        # (corners, 2)
    low, high = points.min(0), points.max(0)
    points = (points - low) / (high - low + 1e-6) * (np.array(box) - 3) + 1
    shape = Image.new("L", tuple(box))
    ImageDraw.Draw(shape).polygon(points.ravel().tolist(), fill=255)
    return shape


def segment(image, rng):
    """A shape along the picture's own edges: pixels near a seed in colour and place -> L. ours: cheap."""
    small = image.resize([max(8, min(side, 72)) for side in image.size]).filter(ImageFilter.BoxBlur(1))
    colour = np.asarray(small, dtype=np.float32)
    height, width = colour.shape[:2]
    y, x = (rng.uniform(0.35, 0.65, 2) * (height, width)).astype(int)
    distance = ((colour - colour[y, x]) ** 2).sum(2) / (colour.var((0, 1)).sum() + 30)
    distance += 5 * (((np.arange(height) - y) / height) ** 2)[:, None]
    distance += 5 * ((np.arange(width) - x) / width) ** 2
    inside = distance < np.quantile(distance[::2, ::2], rng.uniform(0.35, 0.7))
    inside[[0, -1]] = inside[:, [0, -1]] = False
    shape = Image.fromarray(inside).convert("L").filter(ImageFilter.GaussianBlur(2))   # drops specks
    return shape.resize(image.size, Image.Resampling.BICUBIC).point(HARD)


HARD = [0] * 128 + [255] * 128                                  # half and more belongs to the region
INNER = [max(0, 2 * value - 255) for value in range(256)]       # soft inside the region, 0 outside it


def random_shape(image, rng):
    """Shape for a stamp -> (L mask of the image's size, word)."""
    word = str(rng.choice(["object", "blob", "polygon"], p=[0.5, 0.3, 0.2]))
    return (segment(image, rng) if word == "object" else outline(image.size, rng, word == "blob")), word


def cut(image, box, rng, zoom=1.0):
    """A random window of the image, zoomed and resampled to `box` (width, height)."""
    zoom = max(zoom, box[0] / image.width, box[1] / image.height)       # the window must fit
    width, height = (max(1, int(side / zoom)) for side in box)
    x, y = rng.integers(image.width - width + 1), rng.integers(image.height - height + 1)
    window = image.crop((x, y, x + width, y + height))
    return window if window.size == tuple(box) else window.resize(box, Image.Resampling.BICUBIC)


def fits(region):
    """Does the region cover 1-50 % of its frame?"""
    return 0.01 <= region.histogram()[255] / (region.width * region.height) <= 0.5


def place(stamp, size, rng):
    """Put a stamp (with alpha) on an empty frame: uniform over all spots, partly outside too, so that
    no place is likelier than another -> (layer RGB, region L of 0 and 255), both of `size`."""
    for _ in range(10):
        frame = Image.new(stamp.mode, size)
        frame.paste(stamp, (int(rng.integers(1 - stamp.width, size[0])),
                            int(rng.integers(1 - stamp.height, size[1]))))
        region = frame.getchannel("A").point(HARD) if stamp.mode == "RGBA" else frame
        if fits(region):
            break
    return frame.convert("RGB"), region


# -------------------------------------------------------------- synthesis: the four manipulations
# Each: (photo, donor, rng) -> (layer RGB, region L, words). The layer shows through inside the region.

def splice(photo, donor, rng):
    """A part of another picture, with its own colours and JPEG history."""
    box, words = random_box(photo.size, rng), []
    stamp = cut(donor, box, rng, zoom=np.exp(rng.uniform(-0.5, 0.5)) if rng.random() < 0.6 else 1)
    shape, word = random_shape(stamp, rng)
    if rng.random() < 0.6:
        stamp = jpeg(stamp, int(rng.integers(50, 99)), *rng.integers(0, 8, 2))
    for _ in range(rng.integers(0, 3)):
        stamp, change = touch(stamp, rng)
        words.append(change)
    stamp.putalpha(shape)
    return *place(turn(stamp, rng)[0], photo.size, rng), [word, *dict.fromkeys(words)]


def turn(stamp, rng):
    """Flip, rotate and scale a stamp, each sometimes -> (stamp, words)."""
    words = []
    if rng.random() < 0.4:
        stamp, words = ImageOps.mirror(stamp), ["mirrored"]
    if rng.random() < 0.35:
        stamp = stamp.rotate(rng.uniform(-60, 60), Image.Resampling.BICUBIC, expand=True)
        words.append("turned")
    if rng.random() < 0.35:
        scale = np.exp(rng.uniform(-0.4, 0.4))
        stamp = stamp.resize([max(4, round(side * scale)) for side in stamp.size], Image.Resampling.BICUBIC)
        words.append("scaled")
    return stamp, words


def copy_move(photo, donor, rng):
    """A part of the picture itself, at another place."""
    stamp = cut(photo, random_box(photo.size, rng), rng)
    shape, word = random_shape(stamp, rng)
    stamp.putalpha(shape)
    stamp, words = turn(stamp, rng)
    return *place(stamp, photo.size, rng), [word, *words]


def random_region(size, rng):
    """A blob or polygon somewhere in the picture -> (L, word)."""
    smooth = rng.random() < 0.6
    return place(outline(random_box(size, rng), rng, smooth), size, rng)[1], "blob" if smooth else "polygon"


def diffuse(photo, region):
    """Fill the region from its border: average what is known at half size, again and again, and come back.

    Pillow weighs colours by alpha when it resizes, so unknown pixels (alpha 0) count for nothing.
    """
    known = photo.copy()
    known.putalpha(ImageChops.invert(region))
    levels = [known]
    while max(levels[-1].size) > 1:
        half = [(side + 1) // 2 for side in levels[-1].size]
        levels.append(levels[-1].resize(half, Image.Resampling.BOX))
    fill = levels.pop()
    while levels:
        known = levels.pop()
        fill = Image.alpha_composite(fill.resize(known.size, Image.Resampling.BILINEAR), known)
    return fill.convert("RGB")


def removal(photo, donor, rng):
    """A region filled from its surroundings: smoothly, or with a texture from nearby in the same colour."""
    region, word = random_region(photo.size, rng)
    layer = diffuse(photo, region)
    if rng.random() < 0.4:
        return add_noise(layer, rng.uniform(1, 5), rng), region, [word, "smooth fill"]
    left, top, right, bottom = region.getbbox()
    dx, dy = (right - left, 0) if rng.random() < 0.5 else (0, bottom - top)
    sign = 1 if rng.random() < 0.5 else -1
    texture = ImageChops.offset(photo, sign * dx, sign * dy)
    blur = ImageFilter.BoxBlur(max(2, min(right - left, bottom - top) // 4))
    detail = np.asarray(texture, dtype=np.int16) - np.asarray(texture.filter(blur))
    layer = Image.fromarray((np.asarray(layer) + detail).clip(0, 255).astype(np.uint8))
    return layer, region, [word, "texture fill"]


def local_edit(photo, donor, rng):
    """A region changed in place: brightness, colour, blur, noise, compression."""
    region, word = random_region(photo.size, rng)
    layer, change = touch(photo, rng)
    return layer, region, [word, change]


KINDS = {"splice": (splice, 0.5), "copy-move": (copy_move, 0.25), "removal": (removal, 0.13),
         "local edit": (local_edit, 0.12)}      # with their shares. ours: splices are commonest in the test sets


def synthesize(photo, donor, rng, kind=None):
    """Manipulate a photo -> (manipulated (H, W, 3) uint8, mask (H, W) uint8 {0, 1}, caption).

    photo, donor (H, W, 3) uint8, of any sizes; rng a np.random.Generator; kind a key of KINDS or None (random).
    1-50 % of the picture change; outside the mask every pixel stays as it was. Source: ours.
    """
    names, shares = list(KINDS), [share for _, share in KINDS.values()]
    kind = kind or str(rng.choice(names, p=shares))
    photo, donor = Image.fromarray(photo), Image.fromarray(donor)
    for _ in range(6):
        layer, region, words = KINDS[kind][0](photo, donor, rng)
        result, soft = blend(photo, layer, region, rng)
        change = ImageStat.Stat(ImageChops.difference(result, photo).convert("L"), region)
        if fits(region) and change.mean[0] > 3:                 # less, and nobody could see it
            break
    else:
        kind, words = "local edit", ["polygon", "inverted"]     # a flat picture: make the change plain
        result = Image.composite(ImageOps.invert(photo), photo, region)
        soft = False
    caption = ", ".join([kind, *words[:3], *(["soft border"] if soft else [])])
    return np.asarray(result), np.asarray(region) // 255, caption


def blend(photo, layer, region, rng):
    """Show the layer inside the region; half of the borders are feathered by up to 3 pixels, inwards, so
    that nothing changes outside the region -> (RGB image, whether the border is soft)."""
    soft = rng.random() < 0.5
    feather = min(rng.uniform(0.5, 3), region.histogram()[255] ** 0.5 / 10) if soft else 0
    alpha = region.filter(ImageFilter.GaussianBlur(feather)).point(INNER) if soft else region
    return Image.composite(layer, photo, alpha), soft


# ------------------------------------------------------------------ the same end for both classes

class Settings(NamedTuple):
    """What `degrade` does; one instance serves both pictures of a pair."""
    scale: float = 1.0
    filter: int = Image.Resampling.BICUBIC
    blur: float = 0.0             # sigma, pixels
    noise: float = 0.0            # sigma, levels of 0-255
    seed: int = 0                 # of the noise
    quality: int = 0              # JPEG; 0 = none
    grid: tuple = (0, 0)          # offset of the JPEG grid
    subsampling: int = 0


def random_settings(rng):
    """Settings as they may befall any picture on its way; a third of them do nothing but JPEG, or nothing."""
    chance = rng.random(4)
    return Settings(
        scale=rng.uniform(0.5, 1.25) if chance[0] < 0.35 else 1.0,
        filter=int(rng.choice([Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS])),
        blur=rng.uniform(0.3, 1.2) if chance[1] < 0.15 else 0.0,
        noise=rng.uniform(1, 6) if chance[2] < 0.15 else 0.0,
        seed=int(rng.integers(2 ** 31)),
        quality=int(rng.integers(60, 101)) if chance[3] < 0.65 else 0,
        grid=tuple(rng.integers(0, 8, 2).tolist()), subsampling=int(rng.choice([0, 2])))


def degrade(image, rng, settings=None):
    """Rescale, blur, noise and JPEG, the same for both classes -> ((H', W', 3) uint8, words).

    image (H, W, 3) uint8; settings: drawn from rng if None. Equal settings treat two pictures alike. Source: ours.
    """
    settings = settings or random_settings(rng)
    image, words = Image.fromarray(image), []
    if settings.scale != 1:
        image = image.resize([max(1, round(side * settings.scale)) for side in image.size], settings.filter)
        words.append(f"scale {settings.scale:.2f}")
    if settings.blur:
        image = image.filter(ImageFilter.GaussianBlur(settings.blur))
        words.append("blur")
    if settings.noise:
        image = add_noise(image, settings.noise, np.random.default_rng(settings.seed))
        words.append("noise")
    if settings.quality:
        image = jpeg(image, settings.quality, *settings.grid, settings.subsampling)
        words.append(f"quality {settings.quality}")
    return np.asarray(image), ", ".join(words)


# ------------------------------------------------------------------------------ training sets

class Photos:
    """Decoded pictures by number: kept in memory (and shared with forked workers) up to `cache` megabytes,
    read from disk beyond. paths may also be (H, W, 3) uint8 arrays."""

    def __init__(self, paths, cache):
        self.paths, self.memory, left = list(paths), {}, cache * 1e6
        for i in range(len(self.paths)):
            if left <= 0:
                break
            self.memory[i] = self.read(i)
            left -= self.memory[i].nbytes

    def read(self, i):
        return self.paths[i] if isinstance(self.paths[i], np.ndarray) else np.asarray(open_image(self.paths[i]))

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return self.memory[i] if i in self.memory else self.read(i)


def random_window(photo, size, share, rng):
    """A random square window of `share` times the photo's shorter side, at most, resampled to size -> PIL RGB.

    share None: as many pixels as the result has, or up to 3 times as many, so often not resampled at all.
    """
    height, width = photo.shape[:2]
    wide = size * np.exp(rng.uniform(0, np.log(3)) if rng.random() < 0.5 else 0) if share is None \
        else share * min(height, width)
    side = max(1, min(round(wide), height, width))
    y, x = rng.integers(0, height - side + 1), rng.integers(0, width - side + 1)
    window = Image.fromarray(np.ascontiguousarray(photo[y:y + side, x:x + side]))
    window = ImageOps.mirror(window) if rng.random() < 0.5 else window
    return window if side == size else window.resize((size, size), Image.Resampling.BICUBIC)


class _Seeded(Dataset):
    """Items that depend on (seed, epoch, index) alone; the epoch is shared with living worker processes."""

    def __init__(self, seed):
        self.seed, self.epoch = seed, torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch):
        self.epoch.fill_(epoch)

    def rng(self, *index):
        return np.random.default_rng((self.seed, int(self.epoch), *index))


class TrainingSet(_Seeded):
    """Labelled pictures: item -> (image (3, size, size) in [0, 1], label, index).

    pairs: [(path, label)], nothing else. reencode: both classes go through `degrade`, so that compression
    cannot tell the class. augment: random windows and flips; without, the centre. cache: megabytes.
    """

    def __init__(self, pairs, *, size, seed, reencode=True, augment=True, window=(0.6, 1.0), cache=1000):
        super().__init__(seed)
        self.labels = [int(label) for _, label in pairs]
        self.photos = Photos([path for path, _ in pairs], cache)
        self.size, self.reencode, self.augment, self.window = size, reencode, augment, window

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        rng, photo = self.rng(index), self.photos[index]
        settings = random_settings(rng) if self.reencode else Settings()
        work = max(1, round(self.size / settings.scale))
        if self.augment:
            image = random_window(photo, work, rng.uniform(*self.window), rng)
        else:
            image = ImageOps.fit(Image.fromarray(photo), (work, work), Image.Resampling.BICUBIC)
        image, _ = degrade(np.asarray(image), rng, settings._replace(scale=self.size / work))
        return to_tensor(image), self.labels[index], index


class SynthesisSet(_Seeded):
    """Pictures made on the fly from genuine photos: item -> (image (3, size, size) in [0, 1], label, index).

    photos: paths or (H, W, 3) uint8 arrays. With pairs, items 2i and 2i + 1 are a crop and its manipulation,
    after the same post-processing; read them in order (every epoch is new, so nothing needs shuffling).
    Without, neighbours are unrelated. cache: megabytes. Source: ours.
    """

    def __init__(self, photos, *, size, count, seed, pairs=True, cache=1000):
        super().__init__(seed)
        self.photos, self.size, self.count, self.pairs = Photos(photos, cache), size, count, pairs

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        image = self.make(index // 2 if self.pairs else index, index % 2)[0]
        return to_tensor(image), index % 2, index

    def make(self, number, label):
        """Picture of pair `number` -> (image (size, size, 3) uint8, mask (size, size) uint8, caption)."""
        rng = self.rng(number)
        settings = random_settings(rng)
        work = max(16, round(self.size / settings.scale))
        settings = settings._replace(scale=self.size / work)
        background, donor = rng.integers(len(self.photos), size=2)
        image = random_window(self.photos[background], work, None, rng)
        if rng.random() < 0.4:                                   # an older JPEG history, of both
            image = jpeg(image, int(rng.integers(60, 99)), *rng.integers(0, 8, 2))
        image, mask, caption = np.asarray(image), np.zeros((self.size, self.size), np.uint8), ""
        if label:
            donor = np.asarray(random_window(self.photos[donor], work, None, rng))
            image, mask, caption = synthesize(image, donor, rng)
            mask = np.asarray(Image.fromarray(mask).resize((self.size, self.size), Image.Resampling.NEAREST))
        image, words = degrade(image, rng, settings)
        return image, mask, caption or words or "untouched"
