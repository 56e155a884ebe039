"""The README's picture: a landscape rendered as a photograph, a forgery of it, SAPL's answers.

    python tests/scene.py        writes tests/scene.png and tests/forged.png

Lengths are in metres, light is linear (red, green, blue). Shapes: H, W pixels; Z depths.
"""
import sys
from pathlib import Path

import numpy as np
from PIL import Image

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent))

import infer                                                    # noqa: E402 (path first)
from evaluate import jpeg                                       # noqa: E402

H = 688
W = 976
HORIZON = H / 2                                                 # a row
FOCAL = 912                                                     # focal length in pixels
DEPTHS = np.geomspace(12, 17000, 2900)[:, None]                 # (Z, 1), each 0.25 % farther
ROW, COLUMN, _ = np.mgrid[:H, :W, :1]                           # (H, W, 1)

# light of the sun, the sky overhead and haze; reflectance of grass and bare earth
SUN = np.array([2.6, 2.3, 1.9])
ZENITH = np.array([0.08, 0.30, 0.64])
HAZE = np.array([0.50, 0.65, 0.81])
GRASS = np.array([0.10, 0.13, 0.03])
EARTH = np.array([0.20, 0.18, 0.14])


# ------------------------------------------------------------------------------------- landscape

def mix(a, b, share):
    """a where the share is 0 or less, b where it is 1 or more."""
    return a + (b - a) * share.clip(0, 1)


def noise(rng, falloff):
    """Noise (Z, W) of amplitude 1 / frequency ** falloff; it looks equally fine at any depth."""
    deep = np.fft.fftfreq(len(DEPTHS), 0.0025)[:, None]
    wide = np.fft.rfftfreq(W, 1 / FOCAL)
    frequency = np.hypot(deep, wide).clip(1.5)
    white = rng.normal(size=(len(DEPTHS), W))
    spectrum = np.fft.rfft2(white) / frequency ** falloff
    values = np.fft.irfft2(spectrum)                                           # (Z, W)
    return values / values.std()


def spruces(rng):
    """Heights (Z, W) of a wood with one tree in each 6 x 6 m."""
    x = DEPTHS * (1 + np.arange(W) / FOCAL)        # askew, so that no rows of trees show
    i = (DEPTHS // 6).astype(int) % 256
    j = (x // 6).astype(int) % 256
    size = rng.random((256, 256))[i, j]
    radius = np.hypot(x % 6 - 2 - 2 * size, DEPTHS % 6 - 3)
    radius *= np.exp(0.3 * noise(rng, 1))
    return (6 + 16 * size - 5 * radius).clip(0)


def render(seed):
    """A lake below mountains -> light (H, W, 3), depth (H, W, 1), infinite on the lake."""
    rng = np.random.default_rng(seed)
    height = np.interp(DEPTHS, (12, 40, 60, 600, 14000), (0.8, -1, -5, 1, 1800))
    relief = 0.4 * np.abs(height) + DEPTHS / 150
    ground = height + relief * noise(rng, 2.1)                                 # (Z, W)
    ground[-1] = 1e6                               # the sky, behind all
    wooded = noise(rng, 2) > ground / 400 - 1
    wooded &= ground > 1.8
    wood = wooded * spruces(rng)
    surface = ground.clip(0) + wood
    slope = np.gradient(surface, axis=1) * FOCAL / DEPTHS

    # seen from 7 m above the lake, a pixel shows the first surface that rises above all before it
    row = HORIZON + FOCAL * (7 - surface) / DEPTHS
    top = np.minimum.accumulate(row)
    hit = [np.searchsorted(-column, -np.arange(H)) for column in top.T]
    hit = np.stack(hit, axis=1)[..., None]                                     # (H, W, 1)
    seen = hit, COLUMN
    ground = ground[seen]
    slope = slope[seen]
    grain = noise(rng, 1.1)[seen]

    # grass, bare where it is steep, woods, snow high up; the sun stands on the left
    colour = mix(GRASS, EARTH, 0.4 * grain + 2 * np.abs(slope))
    colour = mix(colour, GRASS / 2, wood[seen])
    colour = mix(colour, 0.6, ground / 100 - 7 + grain)
    sun = (0.6 + 0.8 * slope) / np.hypot(1, slope)
    light = colour * (SUN * sun.clip(0) + 0.6 * HAZE)

    # clouds, 1,500 m above, and haze
    far = 1500 * FOCAL / (HORIZON - ROW).clip(1)
    i = np.searchsorted(DEPTHS[:-1, 0], far)
    cloud = noise(rng, 1.5)[i, COLUMN]
    sky = mix(ZENITH, 0.95, 0.7 * cloud)
    is_sky = hit == len(DEPTHS) - 1
    light = np.where(is_sky, sky, light)
    far = np.where(is_sky, far, DEPTHS[hit, 0])
    light = mix(light, HAZE, 1 - np.exp(-far / 14000))

    # the lake mirrors, in ripples, what stands above its far shore
    is_lake = ground <= 0
    shore = is_lake.argmax(axis=0)                                             # (W, 1)
    below = (ROW - shore).clip(1)
    mirror = shore - below + grain * below ** 0.4
    reflection = np.take_along_axis(light, mirror.astype(int).clip(0), axis=0)
    clear = 0.25 + 0.6 * np.exp(-below / 180)
    light = np.where(is_lake, mix(0.02, reflection, clear), light)
    return light, np.where(is_lake, np.inf, far)


# ---------------------------------------------------------------------------------------- camera

def soften(image):
    """Blur by the weights 1, 2, 1 along both axes."""
    for axis in (0, 1):
        beside = np.roll(image, 1, axis) + np.roll(image, -1, axis)
        image = (beside + 2 * image) / 4
    return image


def photograph(light, depth, electrons, blur, quality):
    """Lens, sensor and processing of a camera -> PIL RGB, 480 x 336. Few electrons mean noise."""
    # lens: focused at 200 m, darker in the corners
    spread = 40 * np.abs(1 / depth - 1 / 200) + blur
    for reach in range(8):
        light = np.where(spread > reach, soften(light), light)
    corner = np.hypot(ROW / H - 0.5, COLUMN / W - 0.5)
    light = light * (1 - 0.4 * corner ** 2)

    # sensor: one colour a pixel (Bayer); counted electrons and the amplifier are noisy
    rng = np.random.default_rng(0)
    balance = np.array([1.9, 1, 1.6])
    pattern = (ROW % 2 + COLUMN % 2) == np.arange(3)                           # (H, W, 3) bool
    counted = electrons * light / balance
    sigma = np.sqrt(counted + 16)
    counted += sigma * rng.normal(size=(H, W, 1))

    # processing: missing colours from the neighbours, white balance, tone curve, JPEG
    missing = soften(counted * pattern) / soften(pattern)
    counted = np.where(pattern, counted, missing)
    light = balance * counted / electrons
    tone = (1 - np.exp(-1.6 * light.clip(0))) ** 0.55
    inner = tone[8:-8, 8:-8]                       # `soften` has mixed opposite edges
    image = Image.fromarray((255 * inner).astype(np.uint8))
    return jpeg(image.reduce(2), quality)


# --------------------------------------------------------------------------------------- forgery

def forge(photo):
    """Paste an islet, cut out of a photograph by another camera and enlarged, into the lake."""
    light, depth = render(21)
    other = photograph(light, depth, electrons=400, blur=2, quality=60)
    near = (depth > 60) & (depth < 400)
    outline = Image.fromarray(near[8:-8:2, 8:-8:2, 0]).convert("L")

    islet = (165, 118, 335, 190)                   # left, top, right, bottom
    other = other.resize((238, 100), box=islet)
    outline = outline.resize((238, 100), box=islet)
    forged = photo.copy()
    forged.paste(other, (109, 122), outline)
    return forged


def main():
    light, depth = render(24)
    photo = photograph(light, depth, electrons=1200, blur=0, quality=92)
    forged = forge(photo)
    model = infer.load(device="cpu")

    sheet = Image.new("RGB", (968, 680), "white")
    for y, image in ((0, photo), (344, forged)):
        result = infer.localize(model, image)
        sheet.paste(image, (0, y))
        sheet.paste(infer.overlay(image, result), (488, y))
        print(f"{result.decision}  score {result.score:.2f}  {result.area:.0%} marked")
    forged.save(TESTS / "forged.png")
    sheet.save(TESTS / "scene.png")


if __name__ == "__main__":
    main()
