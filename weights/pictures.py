"""Pictures pasted together from photos, each part with an editing history of its own, on the GPU.

What weights/make.py learns from. The edits are those of weights/synthesis.py and more, on whole
batches: a GPU makes some thousand pictures a second, a processor with PIL some dozen. All of it is
ours. Reading order: filters -> JPEG -> edits, histories -> regions -> Pictures.

Images are floats (n, 3, H, W) that hold whole numbers of 0-255; regions are (n, H, W), 1 =
manipulated. Which pictures get what is drawn by a numpy generator, noise and colours by torch's.
"""
import math
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import data
import synthesis
from ecpl import CLASSES

KINDS = tuple(synthesis.KINDS)           # "splice", "copy-move", "removal", "local edit"
SHARES = tuple(synthesis.KINDS.values())


# --------------------------------------------------------------------------------------- filters

def send(numbers, device):
    """A numpy array or a tensor -> the tensor on the device, which a GPU gets without a wait."""
    numbers = torch.as_tensor(numbers)
    if device.type == "cuda" and numbers.numel() > 0 and not numbers.is_cuda:
        numbers = numbers.pin_memory()
    return numbers.to(device, non_blocking=True)


def column(numbers, images):
    """n numbers as a tensor (n, 1, 1, 1) beside these images."""
    return send(numbers, images.device).float().view(-1, 1, 1, 1)


def filtered(images, rows, columns):
    """Any separable filter is two matrices: (n, 3, H, W) -> (n, 3, H', W'), rows (n, H', H)."""
    return rows[:, None] @ images @ columns[:, None].transpose(-1, -2)


def blur(images, sigma):
    """Gaussian blur, sigma (n,) in pixels."""
    side = torch.arange(images.shape[-1], device=images.device)
    distance = (side[:, None] - side).float()                                  # (S, S)
    kernel = torch.exp(-0.5 * (distance / column(sigma, images)[:, 0]) ** 2)   # (n, S, S)
    kernel = kernel / kernel.sum(dim=-1, keepdim=True)
    return filtered(images, kernel, kernel)


def bicubic(t):
    """The kernel of PIL's BICUBIC at distances t."""
    t = t.abs()
    near = (1.5 * t - 2.5) * t * t + 1
    far = ((-0.5 * t + 2.5) * t - 4) * t + 2
    return torch.where(t < 1, near, far * (t < 2))


def triangle(t):
    """The kernel of PIL's BILINEAR."""
    return (1 - t.abs()).clamp(min=0)


def lanczos(t):
    """The kernel of PIL's LANCZOS."""
    return torch.sinc(t) * torch.sinc(t / 3) * (t.abs() < 3)


def resampling(old, new, sides, kernel, device):
    """The matrices (n, sides[1], sides[0]) that resample `old` pixels to `new`, (n,) each, with
    zeros in what is left of `sides`. Widened when it reduces, as PIL does."""
    old = send(old, device).float().view(-1, 1, 1)
    new = send(new, device).float().view(-1, 1, 1)
    before = torch.arange(sides[0], device=device)                             # (S0,)
    after = torch.arange(sides[1], device=device)[:, None]                     # (S1, 1)
    place = (after + 0.5) * old / new - 0.5                                    # (n, S1, 1)
    matrix = kernel((place - before) / (old / new).clamp(min=1))               # (n, S1, S0)
    matrix = matrix * (before < old) * (after < new)
    total = matrix.sum(dim=-1, keepdim=True)
    return matrix / torch.where(total == 0, 1, total)


def take(images, rows, columns):
    """The pixels of these rows (n, h) and columns (n, w): (n, 3, h, w). Crops, flips and shifts."""
    n = torch.arange(len(images), device=images.device)[:, None, None]
    rows = send(rows, images.device)[:, :, None]
    columns = send(columns, images.device)[:, None, :]
    return images.permute(0, 2, 3, 1)[n, rows, columns].permute(0, 3, 1, 2).contiguous()


def mirrored(index, side):
    """Whole numbers of any size, reflected into 0 .. side - 1."""
    side = np.maximum(side, 2)
    index = np.mod(index, 2 * side - 2)
    return np.minimum(index, 2 * side - 2 - index)


# ------------------------------------------------------------------------------------------ JPEG

LUMINANCE = torch.tensor([                               # quality 50, of the standard's annex K
    [16, 11, 10, 16, 24, 40, 51, 61], [12, 12, 14, 19, 26, 58, 60, 55],
    [14, 13, 16, 24, 40, 57, 69, 56], [14, 17, 22, 29, 51, 87, 80, 62],
    [18, 22, 37, 56, 68, 109, 103, 77], [24, 35, 55, 64, 81, 104, 113, 92],
    [49, 64, 78, 87, 103, 121, 120, 101], [72, 92, 95, 98, 112, 100, 103, 99]])
CHROMINANCE = torch.full((8, 8), 99)
CHROMINANCE[:4, :4] = torch.tensor([[17, 18, 24, 47], [18, 21, 26, 66],
                                    [24, 26, 56, 99], [47, 66, 99, 99]])
YCC = torch.tensor([[0.299, 0.587, 0.114],
                    [-0.168736, -0.331264, 0.5],
                    [0.5, -0.418688, -0.081312]])        # RGB -> Y, Cb, Cr
RGB = torch.linalg.inv(YCC)
FREQUENCY = torch.arange(8)[:, None]
DCT = torch.cos((2 * torch.arange(8) + 1) * FREQUENCY * math.pi / 16) / 2      # (8, 8)
DCT[0] /= 2 ** 0.5


def quantized(plane, table, quality):
    """A plane (n, H, W), sides multiples of 8, after JPEG's rounding of its cosine coefficients."""
    n, H, W = plane.shape
    scale = torch.where(quality < 50, 5000 // quality, 200 - 2 * quality)      # (n,)
    steps = (send(table, plane.device) * scale.view(-1, 1, 1) + 50) // 100
    steps = steps.clamp(1, 255).view(n, 1, 1, 8, 8)

    dct = send(DCT, plane.device)
    blocks = plane.view(n, H // 8, 8, W // 8, 8).transpose(2, 3)               # (n, h, w, 8, 8)
    blocks = (dct @ blocks @ dct.T / steps).round() * steps
    blocks = dct.T @ blocks @ dct
    return blocks.transpose(2, 3).reshape(n, H, W).round()


def jpeg(images, quality, shift, subsampled):
    """Encode and decode: quality (n,), rounded down, shift (n, 2) of the 8x8 grid, (y, x) pixels;
    subsampled: colours at half the resolution, for all. As libjpeg to about a grey level."""
    H, W = images.shape[-2:]
    shift = np.asarray(shift)
    rows = np.arange(math.ceil((H + 8) / 16) * 16) - shift[:, :1]
    columns = np.arange(math.ceil((W + 8) / 16) * 16) - shift[:, 1:]
    padded = take(images, rows.clip(0, H - 1), columns.clip(0, W - 1))
    quality = send(quality, images.device).long()

    ycc = send(YCC, images.device)
    planes = torch.einsum("ij,njhw->nihw", ycc, padded).round()
    planes[:, 0] = quantized(planes[:, 0] - 128, LUMINANCE, quality) + 128
    colours = planes[:, 1:]                                                    # (n, 2, H', W')
    if subsampled:
        colours = F.avg_pool2d(colours, 2).round()
    for i in (0, 1):
        colours[:, i] = quantized(colours[:, i].contiguous(), CHROMINANCE, quality)
    colours = colours.clamp(-128, 127)
    if subsampled:
        colours = F.interpolate(colours, scale_factor=2, mode="bilinear").round()
    planes = torch.cat([planes[:, :1].clamp(0, 255), colours], dim=1)

    decoded = torch.einsum("ij,njhw->nihw", send(RGB, images.device), planes)
    decoded = decoded.round().clamp(0, 255)
    return take(decoded, np.arange(H) + shift[:, :1], np.arange(W) + shift[:, 1:])


# ---------------------------------------------------------------------------- edits and histories

def grey(images):
    """The lightness (n, 1, H, W)."""
    return (images * send(YCC[0], images.device).view(3, 1, 1)).sum(dim=1, keepdim=True)


def brighter(images, strength, rng):
    return images * (1.12 + 0.35 * strength)


def darker(images, strength, rng):
    return images * (0.88 - 0.3 * strength)


def contrast(images, strength, rng):
    mean = grey(images).mean(dim=(1, 2, 3), keepdim=True)
    return mean + (images - mean) * (0.55 + 1.1 * strength)


def paler(images, strength, rng):
    light = grey(images)
    return light + (images - light) * 0.6 * strength


def tinted(images, strength, rng):
    colour = 255 * torch.rand(len(images), 3, 1, 1, device=images.device)
    return images + (0.08 + 0.12 * strength) * (colour - images)


def balanced(images, strength, rng):
    """Another white balance: each channel times a number of its own."""
    gain = torch.randn(len(images), 3, 1, 1, device=images.device)
    return images * torch.exp((0.05 + 0.15 * strength) * gain)


def gamma(images, strength, rng):
    power = 2 ** (0.8 * (strength - 0.5).sign() * (0.3 + (2 * strength - 1).abs()))
    return 255 * (images / 255) ** power


def blurred(images, strength, rng):
    return blur(images, 0.6 + 1.4 * strength)


def sharpened(images, strength, rng):
    sigma = torch.full_like(strength, 1.5)
    return images + (0.8 + 1.7 * strength) * (images - blur(images, sigma))


def noisy(images, strength, rng):
    return images + (4 + 10 * strength) * torch.randn_like(images)


def recompressed(images, strength, rng):
    quality = (75 - 45 * strength).flatten()
    return jpeg(images, quality, rng.integers(0, 8, (len(images), 2)), rng.random() < 0.5)


EDITS = (brighter, darker, contrast, paler, tinted, balanced, gamma, blurred, sharpened, noisy,
         recompressed)


def apply(images, chosen, edit):
    """Edit the chosen images in place, if there are any: chosen (n,) bool, edit: images -> images
    of their size."""
    places = send(np.flatnonzero(chosen), images.device)
    if len(places) > 0:
        images[places] = edit(images[places]).round().clamp(0, 255)


def random_edits(images, chosen, rng, words):
    """One of EDITS, of random strength, for each of the chosen images, in place; its name goes to
    its words (n lists)."""
    which = rng.integers(len(EDITS), size=len(images))
    for number, edit in enumerate(EDITS):
        ours = chosen & (which == number)
        strength = column(rng.random(ours.sum()), images)
        apply(images, ours, lambda part: edit(part, strength, rng))
        for i in np.flatnonzero(ours):
            words[i].append(edit.__name__)


def enlarge(images, rng):
    """Reduce the images to 44-87 % and enlarge them again: what resampling leaves."""
    n, _, S, _ = images.shape
    small = np.round(S / 2 ** rng.uniform(0.2, 1.2, n))
    kernel = (bicubic, triangle, lanczos)[rng.integers(3)]
    down = resampling(np.full(n, S), small, (S, S), kernel, images.device)
    images = filtered(images, down, down).round().clamp(0, 255)
    up = resampling(small, np.full(n, S), (S, S), bicubic, images.device)
    return filtered(images, up, up)


def turn(images, factor, angle):
    """Enlarge by factors (n,) and turn by angles (n,), radians, about the middle."""
    angle = column(angle, images).view(-1)
    factor = column(factor, images).view(-1)
    cos = angle.cos() / factor
    sin = angle.sin() / factor
    zero = torch.zeros_like(cos)
    matrix = torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, "bicubic", "reflection", align_corners=False)


def turn_some(images, chosen, rng, words):
    """Scale and turn four tenths of the chosen images each, in place, with their words."""
    n = len(images)
    factor = np.where(chosen & (rng.random(n) < 0.4), 2 ** rng.uniform(-0.5, 0.5, n), 1)
    angle = np.where(chosen & (rng.random(n) < 0.4), rng.uniform(-1, 1, n), 0)
    ours = (factor != 1) | (angle != 0)
    apply(images, ours, lambda part: turn(part, factor[ours], angle[ours]))
    for i in range(n):
        if factor[i] != 1:
            words[i].append("enlarged" if factor[i] > 1 else "reduced")
        if angle[i] != 0:
            words[i].append("rotated")


def compress(images, chosen, quality, rng):
    """JPEG for the chosen images, in place: quality (n,), half of them with reduced colours."""
    subsampled = rng.random(len(images)) < 0.5
    for halved in (False, True):
        ours = chosen & (subsampled == halved)
        shift = rng.integers(0, 8, (ours.sum(), 2))
        apply(images, ours, lambda part: jpeg(part, quality[ours], shift, halved))


def edit_histories(images, rng):
    """A random chain of edits for each image, in place -> n lists of words."""
    n = len(images)
    words = [[] for _ in range(n)]
    edited = rng.random(n) < 0.5                         # half of the photos: JPEG at most
    enlarged = edited & (rng.random(n) < 0.35)
    apply(images, enlarged, lambda part: enlarge(part, rng))
    for i in np.flatnonzero(enlarged):
        words[i].append("enlarged")
    turn_some(images, edited & (rng.random(n) < 0.25), rng, words)

    steps = rng.integers(0, 3, n)
    for step in range(2):
        random_edits(images, edited & (steps > step), rng, words)

    compressed = rng.random(n) < np.where(edited, 0.6, 0.4)
    quality = rng.integers(40, 99, n)
    compress(images, compressed, quality, rng)
    for i in np.flatnonzero(compressed):
        words[i].append(f"quality {quality[i] // 10 * 10}")
    return words


# --------------------------------------------------------------------------------------- regions

class Boxes(NamedTuple):
    """Where the regions shall be, in pixels: arrays (n,)."""
    y: np.ndarray            # middle
    x: np.ndarray
    height: np.ndarray
    width: np.ndarray


def random_boxes(n, side, rng):
    """Boxes as large as 12-90 % of a square picture, anywhere, also partly outside: 2-70 % of the
    picture lie in each, or nearly all after ten draws."""
    boxes = draw_boxes(n, side, rng)
    for _ in range(10):
        high = overlap(boxes.y, boxes.height, side)
        wide = overlap(boxes.x, boxes.width, side)
        share = high * wide / side ** 2
        bad = (share < 0.02) | (share > 0.7)
        new = draw_boxes(n, side, rng)
        boxes = Boxes(*[np.where(bad, other, own) for own, other in zip(boxes, new)])
    return boxes


def draw_boxes(n, side, rng):
    """Boxes anywhere that touch the picture."""
    size = 0.35 * 3.4 ** rng.random(n) * side
    aspect = 2 ** rng.uniform(-0.5, 0.5, n)
    height = np.minimum(size / aspect, 0.95 * side)
    width = np.minimum(size * aspect, 0.95 * side)
    y = rng.uniform(-height / 2, side + height / 2)
    x = rng.uniform(-width / 2, side + width / 2)
    return Boxes(y, x, height, width)


def overlap(middle, length, side):
    """How much of a stretch lies within 0 .. side."""
    return np.minimum(side, middle + length / 2) - np.maximum(0, middle - length / 2)


def outlines(guide, boxes, rng):
    """Regions (n, S, S) of 0 and 1 in these boxes: objects of the guide images (n, 3, S, S), blobs,
    stars and rectangles."""
    n, _, S, _ = guide.shape
    y, x, height, width = [column(numbers, guide)[:, 0] for numbers in boxes]  # (n, 1, 1)
    side = torch.arange(S, device=guide.device)
    v = (side[:, None] - y) / (height / 2)                                     # (n, S, 1)
    u = (side - x) / (width / 2)                                               # (n, 1, S)
    box = (v.abs() < 1) & (u.abs() < 1)                                        # (n, S, S)

    kind = rng.choice(4, n, p=(0.5, 0.25, 0.15, 0.1))    # object, blob, star, rectangle
    kind = send(kind, guide.device)[:, None, None]
    region = torch.where(kind == 3, box, stars(v, u, kind == 1, rng))
    return torch.where(kind == 0, objects(guide, boxes, box, v, u, rng), region).float()


def stars(v, u, smooth, rng):
    """Bool (n, S, S): within a random radius in each of ten directions, and between them linearly,
    or smoothly. v (n, S, 1) and u (n, 1, S) are -1 .. 1 within the box."""
    n = len(v)
    radius = send(rng.uniform(0.4, 1, (n, 10)), v.device).float()              # (n, 10)
    direction = torch.atan2(v, u) / (2 * math.pi) % 1 * 10                     # (n, S, S), 0 .. 10
    before = direction.floor()
    share = direction - before
    share = torch.where(smooth, share * share * (3 - 2 * share), share)
    before = before.long() % 10

    picture = torch.arange(n, device=v.device)[:, None, None]
    reach = torch.lerp(radius[picture, before], radius[picture, (before + 1) % 10], share)
    return v ** 2 + u ** 2 < reach ** 2


def objects(guide, boxes, box, v, u, rng):
    """Bool (n, S, S): the pixels of each box nearest to a seed in colour and place, roughly what
    lies in its middle."""
    n, _, S, _ = guide.shape
    size = boxes.height + boxes.width
    smooth = blur(guide, size / 40)
    seed_y = np.round(boxes.y + rng.uniform(-0.15, 0.15, n) * boxes.height).clip(0, S - 1)
    seed_x = np.round(boxes.x + rng.uniform(-0.15, 0.15, n) * boxes.width).clip(0, S - 1)
    seed = take(smooth, seed_y.astype(int)[:, None], seed_x.astype(int)[:, None])

    distance = (smooth - seed).square().sum(dim=1)                             # (n, S, S)
    spread = smooth.var(dim=(2, 3)).sum(dim=1).view(-1, 1, 1) + 30
    distance = distance / spread + 1.25 * (v ** 2 + u ** 2)

    # the nearest 35-70 % of the box
    within = distance.masked_fill(~box, math.inf).flatten(1).sort(dim=1).values
    count = box.flatten(1).sum(dim=1).clamp(min=1)                             # (n,)
    part = send(rng.uniform(0.35, 0.7, n), guide.device)
    limit = within.gather(1, (count * part).long()[:, None])                   # (n, 1)
    near = (box & (distance < limit[..., None])).float()
    return blur(near[:, None], size / 60)[:, 0] > 0.5


def fill(images, region):
    """The images with the region filled by the colours around it: a pyramid of halved pictures."""
    known = (1 - region)[:, None]                                              # (n, 1, S, S)
    levels = [(images * known, known)]
    while levels[-1][1].shape[-1] > 1:
        colours, weight = [F.avg_pool2d(part, 2, ceil_mode=True) for part in levels[-1]]
        levels.append((colours, weight))

    colours, weight = levels.pop()
    smooth = colours / weight.clamp(min=1e-6)
    for colours, weight in reversed(levels):
        smooth = F.interpolate(smooth, colours.shape[-2:], mode="bilinear")
        own = colours / weight.clamp(min=1e-6)
        smooth = torch.where(weight > 0, weight * own + (1 - weight) * smooth, smooth)
    return smooth


# -------------------------------------------------------------------------------------- pictures

class Batch(NamedTuple):
    """B pictures, a genuine one and its manipulation in turn; T = B parts, 2 a pair."""
    image: torch.Tensor      # (B, 3, S, S) in [0, 1]
    inside: torch.Tensor     # (B, N), the share of each patch that is manipulated
    known: torch.Tensor      # (B,) bool; False: the manipulation cannot be seen, do not judge
    classes: list            # T texts: "genuine" or "manipulated, splice"
    histories: list          # T lists of words

    def split(self, count):
        """So many equal batches of it."""
        each = len(self.image) // count
        for start in range(0, count * each, each):
            yield Batch(*[part[start:start + each] for part in self])


def sizes_of(path):
    """A photo in four sizes, arrays (H, W, 3) uint8."""
    photo = data.open_image(path)
    sizes = [photo]
    for scale, sampling in ((0.7, Image.Resampling.LANCZOS), (0.5, Image.Resampling.BICUBIC),
                            (0.35, Image.Resampling.BILINEAR)):
        size = [max(2, round(scale * side)) for side in photo.size]
        sizes.append(photo.resize(size, sampling))
    return [np.asarray(image) for image in sizes]


class Pictures:
    """Makes Batches of the photos (paths). It keeps all of them on the device, decoded: 5.6 bytes a
    pixel, 2.5 GB for our 2,173."""

    def __init__(self, photos, device, seed):
        with ThreadPoolExecutor() as pool:
            arrays = [array for sizes in pool.map(sizes_of, photos) for array in sizes]
        self.heights = np.array([array.shape[0] for array in arrays])
        self.widths = np.array([array.shape[1] for array in arrays])
        self.starts = np.cumsum(self.heights * self.widths) - self.heights * self.widths
        flat = np.concatenate([array.reshape(-1, 3) for array in arrays])
        self.pixels = torch.from_numpy(flat).to(device)                        # (all pixels, 3)
        self.rng = np.random.default_rng(seed)

    def windows(self, n, side):
        """Random squares of random photos, flipped or not -> images (n, 3, side, side). At least
        half are not resampled."""
        rng = self.rng
        size = np.where(rng.random(n) < 0.5, 0, rng.integers(1, 4, n))
        photo = rng.integers(len(self.heights) // 4, size=n) * 4
        short = np.minimum(self.heights, self.widths)
        for _ in range(3):
            size -= (size > 0) & (short[photo + size] < side)    # too small: the next larger
        chosen = photo + size
        heights = self.heights[chosen][:, None]
        widths = self.widths[chosen][:, None]

        y = rng.integers(0, np.maximum(heights - side, 0) + 1)                 # (n, 1)
        x = rng.integers(0, np.maximum(widths - side, 0) + 1)
        rows = mirrored(y + np.arange(side), heights)
        columns = mirrored(x + np.arange(side), widths)
        columns = np.where(rng.random((n, 1)) < 0.5, columns[:, ::-1], columns)
        rows = self.starts[chosen][:, None] + rows * widths                    # (n, side)

        device = self.pixels.device
        rows = send(rows, device)
        columns = send(columns, device)
        pixels = self.pixels[rows[:, :, None] + columns[:, None, :]]           # (n, side, side, 3)
        return pixels.permute(0, 3, 1, 2).float().contiguous()

    @torch.no_grad()
    def crops(self, n, side):
        """Windows, four tenths of them edited -> (n, 3, side, side) in [0, 1]."""
        images = self.windows(n, side)
        random_edits(images, self.rng.random(n) < 0.4, self.rng, [[] for _ in range(n)])
        return images / 255

    def layers(self, photo, donor, kind, boxes, words):
        """What shows inside the regions, before any fill: images like these. kind (n,): indices
        into KINDS; what happened is added to words, n lists."""
        rng = self.rng
        n, _, S, _ = photo.shape
        splice, copy_move, removal, local_edit = [kind == i for i in range(4)]
        layer = torch.where(column(splice, photo) > 0, donor, photo)

        # what covers a removal comes from beside it, a copy from 0.2-0.8 sides away
        sign = rng.choice([-1, 1], (n, 2))                                     # (y, x)
        far = sign * rng.uniform(0.2, 0.8, (n, 2)) * S
        beside = sign * np.stack([boxes.height, boxes.width], axis=1)
        beside[np.arange(n), rng.integers(0, 2, n)] = 0                        # along one axis
        shift = np.where(removal[:, None], beside, far).round().astype(int)
        rows = mirrored(np.arange(S) + shift[:, :1], S)
        columns = mirrored(np.arange(S) + shift[:, 1:], S)
        flipped = copy_move & (rng.random(n) < 0.4)
        columns = np.where(flipped[:, None], columns[:, ::-1], columns)
        moved = copy_move | removal
        apply(layer, moved, lambda part: take(part, rows[moved], columns[moved]))

        turn_some(layer, splice | copy_move, rng, words)
        random_edits(layer, local_edit, rng, words)
        return layer

    def manipulate(self, photo, donor, kind, words):
        """Paste into photos (n, 3, S, S), from donors like them -> (images, regions (n, S, S),
        seen: (n,) whether one can see it); kind and words as in `layers`."""
        rng = self.rng
        n, _, S, _ = photo.shape
        boxes = random_boxes(n, S, rng)
        layer = self.layers(photo, donor, kind, boxes, words)
        guide = torch.where(column(kind < 2, photo) > 0, layer, photo)         # splice, copy-move
        region = outlines(guide, boxes, rng)

        filled = (kind == 2) & (rng.random(n) < 0.5)     # the other removals are covered
        places = np.flatnonzero(filled)
        if len(places) > 0:
            there = send(places, photo.device)
            smooth = fill(photo[there], region[there])
            noise = 5 * torch.rand(len(places), 1, 1, 1, device=photo.device)
            smooth = smooth + noise * torch.randn_like(smooth)
            layer[there] = smooth.round().clamp(0, 255)
        for i in places:
            words[i].append("smooth")

        # half of the regions get a border of 0.5-3 pixels that is soft on its inside
        width = np.where(rng.random(n) < 0.5, rng.uniform(0.5, 3, n), 0)
        area = region.sum(dim=(1, 2))                                          # (n,), pixels
        width = torch.minimum(send(width, photo.device), area.sqrt() / 10).clamp(min=0.01)
        alpha = (2 * blur(region[:, None], width) - 1).clamp(min=0) * region[:, None]
        image = (photo + alpha * (layer - photo)).round()

        change = (image - photo).abs().mean(dim=1)                             # (n, S, S)
        visible = (change * region).sum(dim=(1, 2)) > 3 * area
        seen = visible & (area > 0.01 * S * S) & (area < 0.5 * S * S)
        return image, region, seen

    def degrade(self, images, side):
        """Rescale to `side`, then blur, noise and JPEG, each sometimes; the first half of the
        images and the second alike."""
        rng = self.rng
        device = images.device
        n = len(images) // 2
        if images.shape[-1] != side:
            old = images.shape[-1]
            kernel = (bicubic, triangle, lanczos)[rng.integers(3)]
            matrix = resampling(np.array([old]), np.array([side]), (old, side), kernel, device)
            images = filtered(images, matrix, matrix).round().clamp(0, 255)

        blurs = np.tile(rng.random(n) < 0.15, 2)
        sigma = np.tile(0.3 * 13 ** rng.random(n), 2)
        apply(images, blurs, lambda part: blur(part, sigma[blurs]))
        noises = np.tile(rng.random(n) < 0.15, 2)
        level = column(np.tile(rng.uniform(1, 6, n), 2)[noises], images)
        apply(images, noises, lambda part: part + level * torch.randn_like(part))

        kind = np.tile(rng.choice(3, n, p=(0.35, 0.325, 0.325)), 2)            # 0: no JPEG
        quality = np.tile(rng.integers(45, 101, n), 2)
        shift = np.tile(rng.integers(0, 8, (n, 2)), (2, 1))
        for chosen in (1, 2):
            ours = kind == chosen
            apply(images, ours, lambda part: jpeg(part, quality[ours], shift[ours], chosen == 2))
        return images

    @torch.no_grad()
    def batch(self, pairs, side):
        """-> Batch of 2 * pairs pictures of side x side pixels."""
        rng = self.rng
        work = side
        if rng.random() < 0.35:
            work = min(288, round(side / rng.uniform(0.5, 1.25)))      # photos are hardly larger
        images = self.windows(2 * pairs, work)
        histories = edit_histories(images, rng)
        photo = images[:pairs]
        donor = images[pairs:]

        kind = rng.choice(4, pairs, p=SHARES)
        words = []                                       # of the pasted parts
        for i in range(pairs):
            before = histories[pairs + i] if kind[i] == 0 else histories[i]
            words.append(list(before))
        image, region, seen = self.manipulate(photo, donor, kind, words)
        images = self.degrade(torch.cat([photo, image]), side)
        region = F.interpolate(region[:, None], (side, side), mode="area")     # (n, 1, S, S)
        inside = F.avg_pool2d(region, 8).flatten(1)                            # (n, N)

        classes = []
        texts = []
        for i in range(pairs):
            classes += [CLASSES[0], f"{CLASSES[1]}, {KINDS[kind[i]]}"]
            texts += [histories[i], words[i]]
        return Batch(image=in_turn(images[:pairs], images[pairs:]) / 255,
                     inside=in_turn(torch.zeros_like(inside), inside),
                     known=in_turn(torch.ones_like(seen), seen), classes=classes, histories=texts)


def in_turn(first, second):
    """Two tensors (n, ..) -> (2n, ..): one of each in turn."""
    return torch.stack([first, second], dim=1).flatten(0, 1)
