"""Reading, synthesis and training sets, on pictures that the tests draw themselves."""
import json
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import data

ROOT = Path(__file__).resolve().parents[1]


def photo(seed=0, height=120, width=160):
    """A textured colour picture (H, W, 3) uint8."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    return (smooth + rng.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)


def save(path, array=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = array if isinstance(array, Image.Image) else Image.fromarray(photo() if array is None else array)
    image.save(path, **options)
    return path


def region(height=120, width=160, on=255, off=0):
    """A mask (H, W) uint8: `on` in the upper left tenth."""
    mask = np.full((height, width), off, np.uint8)
    mask[:40, :48] = on
    return mask


# ---------------------------------------------------------------------------------- one picture

@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "RGBA", "LA", "I;16", "F", "RGB"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    grey = Image.new("L", (20, 10), 200)
    image = {"I;16": Image.fromarray(np.full((10, 20), 200 * 257, np.uint16)),
             "F": Image.fromarray(np.full((10, 20), 200, np.float32))}.get(mode) or grey.convert(mode)
    found = data.open_image(save(tmp_path / ("x.tif" if mode in ("CMYK", "F") else "x.png"), image))
    assert found.mode == "RGB" and found.size == (20, 10)
    if mode != "1":
        assert abs(np.asarray(found).astype(int) - 200).max() <= 1


def test_alpha_lies_on_white_and_exif_turns(tmp_path):
    clear = Image.new("RGBA", (20, 10), (255, 0, 0, 0))
    assert (np.asarray(data.open_image(save(tmp_path / "a.png", clear))) == 255).all()
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path / "b.jpg", photo(), exif=exif)
    assert data.open_image(path).size == (120, 160)
    assert data.picture_size(path) == ((160, 120), 6)


def test_bad_files_are_named_with_a_reason(tmp_path):
    text = tmp_path / "text.jpg"
    text.write_text("no picture")
    cut = save(tmp_path / "cut.jpg")
    cut.write_bytes(cut.read_bytes()[:-900])
    for path in (text, cut, tmp_path / "missing.png"):
        with pytest.raises(data.BadPicture, match=path.name):
            data.open_image(path)


def claim(path, width, height):
    """A PNG of a few bytes whose header claims width x height grey pixels."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"IDAT", b"\0" * 8))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks))
    return path


@pytest.mark.parametrize("side", [15_000, 60_000])         # Pillow refuses the second by itself
def test_a_header_that_claims_too_much_is_refused_before_decoding(tmp_path, side, monkeypatch):
    monkeypatch.setattr(Image.core, "new", None)           # nothing may allocate the pixels
    with pytest.raises(data.BadPicture, match="pixels"):
        data.open_image(claim(tmp_path / "bomb.png", side, side))


@pytest.mark.filterwarnings("error")
def test_200_megapixels_are_accepted(tmp_path):
    with data.opened(claim(tmp_path / "large.png", 20_000, 10_000)) as image:
        assert image.size == (20_000, 10_000)


def test_to_tensor():
    tensor = data.to_tensor(photo())
    assert tensor.shape == (3, 120, 160) and tensor.dtype == torch.float32
    assert torch.equal(tensor, torch.from_numpy(photo()).permute(2, 0, 1) / 255)


def test_attacks():
    image = Image.fromarray(np.full((64, 64, 3), 128, np.uint8))
    noisy = np.asarray(data.attack(image, "noise:11"), dtype=float)
    assert noisy.var() == pytest.approx(11, rel=0.05) and abs(noisy.mean() - 128) < 0.1
    assert np.array_equal(noisy, np.asarray(data.attack(image, "noise:11")))
    image = Image.fromarray(photo())
    losses = [np.abs(np.asarray(data.attack(image, f"jpeg:{q}")).astype(int) - photo()).mean()
              for q in (90, 70, 50)]
    assert losses == sorted(losses)
    dot = Image.new("RGB", (31, 31))
    dot.putpixel((15, 15), (255, 255, 255))
    blurred = np.asarray(data.attack(dot, "blur:11"), dtype=float)[:, :, 0]
    spread = (blurred * (np.arange(31) - 15) ** 2).sum() / blurred.sum()
    assert spread ** 0.5 == pytest.approx(2.0, rel=0.15)          # OpenCV: 0.3 (5 - 1) + 0.8 = 2.0
    for spec in ("jpeg", "jpeg:0", "jpeg:101", "blur:x", "rain:3"):
        with pytest.raises(ValueError, match="expected jpeg:QUALITY"):
            data.attack(image, spec)


def test_jpeg_grid_offset_keeps_size_and_place():
    shifted = np.asarray(data.jpeg(Image.fromarray(photo()), 95, 3, 5))
    assert shifted.shape == photo().shape
    assert np.abs(shifted.astype(int) - photo()).mean() < 4


# ------------------------------------------------------------------------------------- layouts

def draw_columbia_mask():
    """As published: bright and dark red one part, bright and dark green the other, a JPEG."""
    mask = np.zeros((120, 160, 3), np.uint8)
    mask[..., 0] = 100
    mask[:40, :48] = (0, 100, 0)
    mask[30:40, :48], mask[40:50, :48] = (0, 255, 0), (255, 0, 0)
    return mask


LAYOUTS = {   # name: ({path: picture or None for a photo}, genuine, manipulated, problems)
    "folders": ({"au/1.jpg": None, "tp/1.jpg": None, "tp/2.x.PNG": None, "mask/1.png": region(),
                 "mask/2.x.png": region(), "notes/me.gif": None, ".cache/tp/9.jpg": None}, 1, 2, 0),
    "folders, other names": ({"a/Authentic/1.jpg": None, "a/Manipulated/s/2.jpg": None,
                              "a/masks/s/2_gt.png": region()}, 1, 1, 0),
    "CASIA": ({"Au/Au_ani_00001.jpg": None, "Tp/Tp_D_CRN_S_N_ani00002_art00014_11818.tif": None,
               "CASIA 2 Groundtruth/Tp_D_CRN_S_N_ani00002_art00014_11818_gt.png": region()}, 1, 1, 0),
    "CASIA dotted": ({"Au/Au_ani_0001.jpg": None, "Sp/Sp_D_NNN_A_ani0099_ani0100.0288.jpg": None,
                      "Sp/Sp_S_NNN_A_ani0001_ani0001_0500.jpg": None,
                      "Gt/Sp_D_NNN_A_ani0099_ani0100.0288_gt.png": region()}, 1, 2, 1),
    "Columbia": ({"4cam_auth/a_01.tif": None, "4cam_splc/b_01.tif": None,
                  "4cam_auth/edgemask/a_01_edgemask.jpg": None,
                  "4cam_splc/edgemask/b_01_edgemask.jpg": draw_columbia_mask()}, 1, 1, 0),
    "COVERAGE": ({"image/1.tif": None, "image/1t.tif": None, "mask/1forged.tif": region(),
                  "mask/1copy.tif": region(), "mask/1paste.tif": region()}, 1, 1, 0),
    "IMD2020": ({"1a/1a_orig.jpg": None, "1a/c8t.jpg": None, "1a/c8t_mask.png": region()}, 1, 1, 0),
    "DSO-1": ({"DSO-1/normal-01.png": None, "DSO-1/splicing-01.png": None,
               "DSO-1-Fake-Images-Masks/splicing-01.png": region(on=0, off=255)}, 1, 1, 0),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(tmp_path, name):
    files, genuine, manipulated, problems = LAYOUTS[name]
    for path, array in files.items():
        save(tmp_path / path, array)
    pictures, report = data.read_set(tmp_path)
    labels = [picture.label for picture in pictures]
    assert (labels.count(0), labels.count(1)) == (genuine, manipulated)
    assert len(report.problems) == problems and name.startswith(report.layout)
    masks = [data.read_mask(picture) for picture in pictures if picture.mask]
    assert len(masks) == manipulated - problems
    for mask in masks:
        assert mask.dtype == np.uint8 and (mask != region(on=1)).mean() < 0.02


def test_scenes_stay_together(tmp_path):
    for path in ("au/Au_ani_00001.jpg", "tp/Tp_D_CRN_S_N_art00014_ani00001_11818.jpg",
                 "tp/Tp_S_CRN_S_N_ani00007_ani00007_11819.jpg", "au/Au_ani_00007.jpg"):
        save(tmp_path / path)
    pictures, _ = data.read_set(tmp_path)
    train, val = data.split(pictures, 0.5, seed=0)
    assert len(train) == len(val) == 2 and {p.source for p in train}.isdisjoint(p.source for p in val)
    assert data.split(pictures, 0.5, seed=0) == (train, val)


def test_problems_are_named(tmp_path, capsys):
    for path, array in {"au/1.jpg": None, "tp/1.jpg": None, "tp/1.png": None, "tp/2.jpg": None,
                        "mask/1.png": region(), "mask/1_gt.png": region(), "mask/3.png": region()}.items():
        save(tmp_path / path, array)
    (tmp_path / "tp" / "bad.jpg").write_text("no picture")
    pictures, report = data.read_set(tmp_path)
    kinds = sorted(problem.split(":")[0] for problem in report.problems)
    assert kinds == ["bad file", "duplicate", "duplicate", "mask without picture", "no mask", "no mask"]
    assert {p.path.name: p.mask and p.mask.name for p in pictures} == {
        "1.jpg": "1.png", "1.png": "1.png", "2.jpg": None}
    assert data.main([str(tmp_path), "--preview", str(tmp_path / "p.png")]) == 1
    said = capsys.readouterr().out
    assert "bad.jpg" in said and "1 genuine, 3 manipulated" in said
    assert Image.open(tmp_path / "p.png").width > 300


def test_wrong_sets_are_refused(tmp_path):
    with pytest.raises(ValueError, match="found no .*nowhere"):
        data.read_set(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="found no pictures"):
        data.read_set(tmp_path)
    save(tmp_path / "au" / "1.jpg")
    assert len(data.read_set(tmp_path)[0]) == 1


# --------------------------------------------------------------------------------------- lists

LISTS = {
    "benco.json": json.dumps([["Tp/6.jpg", "Gt/6.png"], ["Au/8.jpg", "Negative"]]),
    "wscl.json": json.dumps({"a": {"path": "Tp/6.jpg", "label": 1, "mask": "Gt/6.png"},
                             "b": {"path": "Au/8.jpg", "label": 0, "mask": None}}),
    "mvss.txt": "Tp/6.jpg Gt/6.png 1\n\nAu/8.jpg None 0\n",
    "set.csv": "\ufeffimage,label,mask\nTp/6.jpg,1,Gt/6.png\nAu/8.jpg,0,\n",
    "bare.csv": "image,label\nTp/6.jpg,1\nAu/8.jpg,0\n",
}


@pytest.mark.parametrize("name", LISTS)
def test_lists(tmp_path, name):
    for path, array in {"Tp/6.jpg": None, "Au/8.jpg": None, "Gt/6.png": region()}.items():
        save(tmp_path / path, array)
    (tmp_path / name).write_text(LISTS[name], encoding="utf-8")
    pictures, report = data.read_set(tmp_path / name)
    assert [(p.path.name, p.label) for p in pictures] == [("6.jpg", 1), ("8.jpg", 0)]
    assert report.problems == []
    if name != "bare.csv":
        assert np.array_equal(data.read_mask(pictures[0]), region(on=1))
    assert not data.read_mask(pictures[1]).any()


def test_columbia_masks_are_read_from_a_list_too(tmp_path):
    save(tmp_path / "b_01.tif"), save(tmp_path / "b_01_edgemask.jpg", draw_columbia_mask())
    (tmp_path / "set.csv").write_text("image,label,mask\nb_01.tif,1,b_01_edgemask.jpg\n")
    mask = data.read_mask(data.read_set(tmp_path / "set.csv")[0][0])
    assert (mask != region(on=1)).mean() < 0.02


@pytest.mark.parametrize("text", ["[[1, 2, 3]]", "{\"a\": 1}", "not json"])
def test_a_broken_list_is_one_line(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="expected CSV") as error:
        data.read_set(path)
    assert "\n" not in str(error.value)


def test_black_masks_and_duplicates_in_a_list(tmp_path):
    for path, array in {"NIST16/a.jpg": None, "NIST16/m.png": region(on=0, off=255), "NIST16/b.jpg": None}.items():
        save(tmp_path / path, array)
    path = tmp_path / "list.txt"
    path.write_text("NIST16/a.jpg NIST16/m.png 1\nNIST16/b.jpg None 0\nNIST16/b.jpg None 0\n"
                    "NIST16/gone.jpg None 0\n")
    pictures, report = data.read_set(path)
    assert np.array_equal(data.read_mask(pictures[0]), region(on=1))
    assert [problem.split(":")[0] for problem in report.problems] == ["duplicate", "bad file"]
    save(tmp_path / "x/tp/a.jpg"), save(tmp_path / "x/mask/a.png", region(on=0, off=255))
    assert "inverted?" in data.read_set(tmp_path / "x")[1].problems[-1]


# --------------------------------------------------------------------------------------- masks

def masks():
    white = np.full((120, 160, 3), 255, np.uint8)
    palette = Image.fromarray(region(on=1)).convert("P")
    palette.putpalette([0, 0, 0, 128, 0, 0])
    return {"grey": Image.fromarray(region()), "zero and one": Image.fromarray(region(on=1)),
            "palette": palette, "16 bit": Image.fromarray(region().astype(np.uint16) * 257),
            "alpha": Image.fromarray(np.dstack([white, region()])),
            "opaque": Image.fromarray(np.dstack([region()] * 3 + [np.full_like(region(), 255)])),
            "RGB": Image.fromarray(region()).convert("RGB"), "1 bit": Image.fromarray(region() > 0),
            "turned": Image.fromarray(region()).transpose(Image.Transpose.ROTATE_270),
            "half size": Image.fromarray(region()).resize((80, 60), Image.Resampling.NEAREST)}


@pytest.mark.parametrize("kind", masks())
def test_masks_of_all_kinds(tmp_path, kind):
    picture = data.Picture(save(tmp_path / "tp/1.png"), 1, save(tmp_path / "mask/1.png", masks()[kind]))
    assert np.array_equal(data.read_mask(picture), region(on=1))
    assert data.read_mask(picture, (60, 80)).sum() == 20 * 24
    said = " ".join(data.read_set(tmp_path)[1].problems)
    assert ("will be turned" in said) == (kind == "turned")
    assert ("will be resized" in said) == (kind == "half size")


def test_a_mask_follows_the_exif_of_its_picture(tmp_path):
    exif = Image.Exif()
    for turn in (6, 8):
        exif[0x0112] = turn
        path = save(tmp_path / f"{turn}.png", Image.fromarray(region()).convert("RGB"), exif=exif)
        picture = data.Picture(path, 1, save(tmp_path / "raw.png", region()))
        expected = np.asarray(data.open_image(path))[..., 0] > 127
        assert np.array_equal(data.read_mask(picture), expected)          # drawn on the raw picture
        upright = save(tmp_path / "upright.png", expected.astype(np.uint8) * 255)
        assert np.array_equal(data.read_mask(picture._replace(mask=upright)), expected)


def test_a_missing_mask_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="found no mask"):
        data.read_mask(data.Picture(save(tmp_path / "1.png"), 1))


# ----------------------------------------------------------------------------------- synthesis

@pytest.mark.parametrize("kind", [*data.KINDS, None])
def test_nothing_changes_outside_the_mask(kind):
    for seed in range(12):
        original, rng = photo(seed, 70, 90), np.random.default_rng(seed)
        changed, mask, caption = data.synthesize(original, photo(seed + 50, 50, 64), rng, kind)
        assert changed.shape == original.shape and changed.dtype == np.uint8
        assert mask.shape == (70, 90) and mask.dtype == np.uint8 and set(np.unique(mask)) == {0, 1}
        assert 0.01 <= mask.mean() <= 0.5
        assert np.array_equal(changed[mask == 0], original[mask == 0])
        assert np.abs(changed[mask == 1].astype(int) - original[mask == 1]).mean() > 2
        assert len(caption) <= 60 and caption.startswith(kind or tuple(data.KINDS))


def test_a_flat_picture_is_changed_visibly():
    flat = np.full((64, 64, 3), 90, np.uint8)
    changed, mask, _ = data.synthesize(flat, flat, np.random.default_rng(0), "copy-move")
    assert mask.any() and (changed[mask == 1] != 90).any() and (changed[mask == 0] == 90).all()


def test_the_smooth_fill_continues_its_surroundings():
    ramp = np.repeat(np.linspace(40, 200, 160)[None], 120, 0)
    ramp = np.repeat(ramp[..., None], 3, 2).astype(np.uint8)
    holed = ramp.copy()
    holed[40:80, 60:100] = 255
    hole = np.zeros((120, 160), np.uint8)
    hole[40:80, 60:100] = 255
    filled = np.asarray(data.fill(Image.fromarray(holed), Image.fromarray(hole)))
    assert np.abs(filled.astype(int) - ramp).max() < 40             # not the 255 of the hole
    assert np.array_equal(filled[hole == 0], ramp[hole == 0])


def test_no_place_is_likelier_than_another():
    photos = [photo(seed) for seed in range(6)]
    synthetic = data.SynthesisSet(photos, size=32, count=0, seed=3)
    mean = np.mean([synthetic.make(i, 1)[1] for i in range(700)], axis=0)     # (32, 32)
    blocks = mean.reshape(4, 8, 4, 8).mean((1, 3))
    assert blocks.min() > 0.65 * blocks.max()
    middle, frame = mean[8:24, 8:24].mean(), mean.sum() - mean[8:24, 8:24].sum()
    assert middle < 1.3 * frame / (32 * 32 - 16 * 16)


def test_equal_chance_degrades_alike():
    one, two = photo(1), photo(1)
    two[50:60, 50:60] = 0
    sizes = set()
    for seed in range(20):
        a, words = data.degrade(one, np.random.default_rng(seed))
        b, same = data.degrade(two, np.random.default_rng(seed))
        assert a.shape == b.shape and words == same
        far = np.s_[: a.shape[0] // 5]
        assert np.abs(a[far].astype(int) - b[far]).mean() < 0.5           # same noise, same tables
        sizes.add(a.shape)
    assert len(sizes) > 10
    assert data.degrade(one, np.random.default_rng(0), (64, 32))[0].shape == (32, 64, 3)


def test_degrade_covers_the_robustness_grid(monkeypatch):
    """JPEG down to 50, blur up to sigma 3.8, noise up to variance 23; strong blur stays rare."""
    sigmas, noises, words = [], [], []
    blur, noise = data.ImageFilter.GaussianBlur, data.add_noise
    monkeypatch.setattr(data.ImageFilter, "GaussianBlur", lambda s: sigmas.append(s) or blur(s))
    monkeypatch.setattr(data, "add_noise", lambda im, s, rng: noises.append(s) or noise(im, s, rng))
    small = photo(0, 16, 16)
    for seed in range(2000):
        words += data.degrade(small, np.random.default_rng(seed))[1].split(", ")
    qualities = [int(word.split()[1]) for word in words if word.startswith("quality")]
    assert 45 == min(qualities) and max(qualities) == 100
    assert 0.3 <= min(sigmas) < 0.35 and 3.6 < max(sigmas) <= 3.9
    assert np.median(sigmas) == pytest.approx(1.08, rel=0.15) and 200 < len(sigmas) < 400
    assert 1 <= min(noises) and 23 ** 0.5 < max(noises) <= 6


# ------------------------------------------------------------------------------- training sets

def test_synthesis_set_is_pairs_deterministic_and_new_each_epoch():
    photos = [photo(seed) for seed in range(5)]
    first = data.SynthesisSet(photos, size=32, count=24, seed=1)
    again = data.SynthesisSet(photos, size=32, count=24, seed=1)
    assert len(first) == 24
    image, label, index = first[5]
    assert image.shape == (3, 32, 32) and 0 <= image.min() and image.max() <= 1 and (label, index) == (1, 5)
    for i in (3, 0, 17):
        assert torch.equal(first[i][0], again[i][0]) and first[i][1] == i % 2
    for number in range(6):
        original, _, _ = first.make(number, 0)
        changed, mask, _ = first.make(number, 1)
        difference = np.abs(original.astype(int) - changed).mean(2)
        assert difference[mask == 1].mean() > 4 * difference[mask == 0].mean()
    before = first[0][0]
    first.set_epoch(1)
    assert not torch.equal(before, first[0][0])
    other = data.SynthesisSet(photos, size=32, count=24, seed=2)
    assert not torch.equal(other[0][0], again[0][0])


def test_workers_and_cache_change_nothing(tmp_path):
    paths = [save(tmp_path / f"{i}.jpg", photo(i)) for i in range(4)]
    make = {"size": 32, "count": 8, "seed": 1}
    plain = torch.cat([batch[0] for batch in torch.utils.data.DataLoader(
        data.SynthesisSet(paths, **make), batch_size=4)])
    forked = torch.cat([batch[0] for batch in torch.utils.data.DataLoader(
        data.SynthesisSet(paths, **make, cache=0), batch_size=4, num_workers=2)])
    assert torch.equal(plain, forked)


def test_training_set_sees_paths_and_labels_only(tmp_path, monkeypatch):
    pairs = [(save(tmp_path / f"{i}.jpg", photo(i)), i % 2) for i in range(3)]
    opened, real = [], Image.open
    monkeypatch.setattr(Image, "open", lambda path, *rest: opened.append(path) or real(path, *rest))
    for augment in (False, True):
        items = data.TrainingSet(pairs, size=48, seed=0, augment=augment, cache=0)
        image, label, index = items[1]
        assert image.shape == (3, 48, 48) and (label, index) == (1, 1)
        assert torch.equal(image, items[1][0])
        items.set_epoch(1)
        assert not torch.equal(image, items[1][0])
    assert {path for path in opened if isinstance(path, Path)} == {pairs[1][0]}
    plain = data.TrainingSet(pairs, size=120, seed=0, augment=False, reencode=False)
    expected = data.to_tensor(data.open_image(pairs[0][0]).crop((20, 0, 140, 120)))
    assert torch.equal(plain[0][0], expected)


def test_mixture_is_pictures_then_pairs_of_the_genuine_ones(tmp_path):
    pairs = [(save(tmp_path / f"{i}.jpg", photo(i)), i % 2) for i in range(4)]
    pictures = data.TrainingSet(pairs, size=48, seed=0)
    items = data.Mixture(pictures, count=6)
    assert (len(items), items.pairs, items.labels) == (10, 6, [0, 1, 0, 1] + [0, 1] * 3)
    alone = data.SynthesisSet([path for path, label in pairs if not label], size=48, count=6, seed=0)
    for epoch in (0, 1):
        items.set_epoch(epoch)
        alone.set_epoch(epoch)
        assert torch.equal(items[2][0], pictures[2][0]) and items[2][1:] == (0, 2)
        assert all(torch.equal(items[4 + i][0], alone[i][0]) for i in range(6))
        assert items[9][1:] == (1, 9)


def test_an_unreadable_picture_is_named_when_asked_for(tmp_path):
    (tmp_path / "bad.jpg").write_text("no picture")
    items = data.TrainingSet([(tmp_path / "bad.jpg", 0), (save(tmp_path / "1.jpg"), 1)], size=32, seed=0)
    assert items[1][1] == 1
    with pytest.raises(data.BadPicture, match="bad.jpg"):
        items[0]


# -------------------------------------------------------------------------------- command line

def test_synthesize_command_is_deterministic(tmp_path, capsys):
    for i in range(4):
        save(tmp_path / "photos" / f"{i}.jpg", photo(i))
    words = ["--synthesize", str(tmp_path / "photos"), "--count", "3", "--size", "64", "--seed", "5"]
    assert data.main([*words, "--out", str(tmp_path / "one"), "--preview", str(tmp_path / "p.png")]) == 0
    call = subprocess.run([sys.executable, ROOT / "data.py", *words, "--out", tmp_path / "two"])
    assert call.returncode == 0
    files = [p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file()]
    assert len(files) == 10
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)
    for path in (tmp_path / "one", tmp_path / "one" / "list.csv"):
        pictures, report = data.read_set(path)
        assert len(pictures) == 6 and report.problems == []
        assert all(data.read_mask(p).any() == p.label for p in pictures)
    assert data.main([*words, "--out", str(tmp_path / "one")]) == 2
    assert "empty folder" in capsys.readouterr().err


def test_leaks_are_found_and_absent(tmp_path, capsys):
    for i in range(20):
        save(tmp_path / "set" / "au" / f"{i}.jpg", photo(i, 64, 64), quality=90)
        save(tmp_path / "set" / "tp" / f"{i}.jpg", photo(i + 50, 64, 64), quality=70)
        save(tmp_path / "fair" / "au" / f"{i}.jpg", photo(i, 64, 64), quality=90)
        save(tmp_path / "fair" / "tp" / f"{i}.jpg", photo(i + 50, 64, 64), quality=90)
    found = data.leaks(data.read_set(tmp_path / "set")[0])
    assert found["JPEG tables"] == 1 and found["bytes per pixel"] > 0.8 and found["format"] == 0.5
    fair = data.leaks(data.read_set(tmp_path / "fair")[0])
    assert fair["JPEG tables"] == fair["size"] == 0.5 and fair["bytes per pixel"] < 0.85
    assert data.main([str(tmp_path / "set"), "--leaks"]) == 1
    assert "leak: JPEG tables alone tells the class" in capsys.readouterr().out


def test_without_arguments_it_prints_its_lesson(tmp_path):
    lessons = [subprocess.run([sys.executable, ROOT / "data.py"], cwd=tmp_path, capture_output=True,
                              text=True) for _ in range(2)]
    said = lessons[0].stdout
    assert [lesson.returncode for lesson in lessons] == [0, 0] and said == lessons[1].stdout
    assert 15 <= len(said.splitlines()) <= 25 and list(tmp_path.iterdir()) == []
    assert said.count("outside 0: ") == len(data.KINDS)          # nothing changes outside of a mask
    one, two = (line.split("->")[1] for line in said.splitlines() if line.startswith("degrade()"))
    assert one == two and re.search(r"accuracy 1.00, after degrade\(\) with 0\.(4[89]|5[0-2]);", said)
    assert "item 1: (3, 64, 64) in [0, 1], label 1" in said


@pytest.mark.parametrize("words", [[], ["--leaks"], ["--out", "z"], ["nowhere"], ["--synthesize", "y"],
                                   ["x", "--synthesize", "y"], ["x", "--out", "z"]])
def test_wrong_calls_say_so_in_one_line(words, capsys):
    assert data.main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
