"""Reading pictures, data sets and masks, and the training set, on pictures that are drawn here."""
import json
import os
import re
import struct
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import mini

W = 160
H = 120


def photo(seed=0):
    return mini.photo(W, H, seed)


def save(path, image=None, **options):
    """Write a picture (None: a photo), with its folder -> path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or photo()).save(path, **options)
    return path


def save_all(root, files):
    """Write photos at "path; path; .." below root -> root."""
    for path in files.split("; "):
        save(root / path)
    return root


def claim(path, width, height, depth=8, colour=0, body=bytes(8)):
    """A PNG whose header claims width x height pixels, whatever the body -> path."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, part in ((b"IHDR", header), (b"IDAT", body), (b"IEND", b"")):
        check = struct.pack(">I", zlib.crc32(kind + part))
        content += struct.pack(">I", len(part)) + kind + part + check
    path.write_bytes(content)
    return path


def refusal(path):
    """What `read_set` says when it refuses: found .., a remedy after the last colon, one line."""
    with pytest.raises(data.BadInput) as error:
        data.read_set(path)
    text = str(error.value)
    assert re.fullmatch(r"found .+: [a-z][^:]+", text)       # a dot is no line break
    assert len(text) < 700
    return text


def labels_of(pictures):
    """{name of the folder and file: label}"""
    return {f"{p.path.parent.name}/{p.path.name}": p.label for p in pictures}


def kinds_of(report):
    """The first words of each problem, sorted."""
    return sorted(re.split(" of|:", problem)[0] for problem in report.problems)


# ---------------------------------------------------------------------------------- one picture

def ramp(white, dtype):
    """A picture (10, 256) from black to white, as numbers from 0 to `white`."""
    return np.tile(np.linspace(0, white, 256), (10, 1)).round(6).astype(dtype)


@pytest.mark.parametrize("white, dtype", [
    (1, np.float32), (255, np.float32), (255, np.uint16), (4095, np.uint16), (65535, np.uint16),
    (65535, np.int32)])
def test_numbers_are_scaled_to_the_picture_that_8_bits_show(tmp_path, white, dtype):
    found = data.open_image(save(tmp_path / "x.tif", Image.fromarray(ramp(white, dtype))))
    assert found.mode == "RGB"
    assert np.abs(np.asarray(found)[..., 0] - ramp(255, np.int32)).max() <= 1


@pytest.mark.parametrize("bad", [-1, 70_000, np.nan, np.inf])
@pytest.mark.filterwarnings("error")                         # NumPy's own words beside ours
def test_numbers_of_no_clear_range_are_refused_in_one_line(tmp_path, bad):
    values = ramp(1, np.float32)
    values[3, 3] = bad
    path = save(tmp_path / "x.tif", Image.fromarray(values))
    for call, source, name in ((data.open_image, path, f"{path}: "), (data.to_picture, values, "")):
        with pytest.raises(data.BadInput, match=f"^{name}found values from .*, expected .*: scale"):
            call(source)


def test_16_bit_colours_are_read_unless_they_fill_12_bits_alone(tmp_path):
    for top in (65535, 4095):
        rows = np.zeros((8, 1 + 6 * 8), np.uint8)            # each starts with its filter, 0
        rows[:, 1:] = np.full((8, 8, 3), top, ">u2").view(np.uint8).reshape(8, -1)
        path = claim(tmp_path / f"{top}.png", 8, 8, depth=16, colour=2, body=zlib.compress(rows))
        if top == 65535:
            assert (np.asarray(data.open_image(path)) == 255).all()
    with pytest.raises(data.BadInput, match="found colours of 12 bits in 16"):
        data.open_image(path)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "LA", "RGB"])
def test_every_mode_becomes_rgb_what_is_transparent_white(tmp_path, mode):
    image = Image.new("L", (20, 10), 200).convert(mode)
    found = data.open_image(save(tmp_path / ("x.tif" if mode == "CMYK" else "x.png"), image))
    assert (found.mode, found.size) == ("RGB", (20, 10))
    assert abs(np.asarray(found).astype(int) - 200).max() <= 1
    clear = Image.new("RGBA", (20, 10), (255, 0, 0, 0))
    for source in (clear, np.asarray(clear)):
        assert (np.asarray(data.to_picture(source)) == 255).all()
    assert (np.asarray(data.to_rgb(clear, "black")) == 0).all()


def test_arrays_and_tensors_are_the_picture_of_their_bytes():
    array = np.asarray(photo())                                                # (H, W, 3)
    opaque = np.full((H, W), 255, np.uint8)
    for source in (array, torch.from_numpy(array.copy()), array / 255, photo(),
                   (array / 255).astype(np.float16), array.astype(np.uint16) * 257,
                   torch.from_numpy(array / 255).requires_grad_(), np.dstack([array, opaque])):
        found = np.asarray(data.to_picture(source)).astype(int)
        assert np.abs(found - array).max() <= 1
    grey = array[..., 0]                                                       # (H, W)
    for source in (grey, grey[..., None], grey / 255, grey.astype(np.uint16)):
        assert (np.asarray(data.to_picture(source)) == grey[..., None]).all()


@pytest.mark.parametrize("source", [
    np.zeros((3, H, W), np.uint8), np.zeros((H, W, 2), np.uint8), np.zeros(5, np.uint8),
    np.zeros((0, W, 3), np.uint8), np.zeros((1, H, W, 3), np.uint8), np.zeros((H, W), np.int64),
    np.zeros((H, W), bool), torch.zeros(3, H, W), torch.zeros(H, W, dtype=torch.bfloat16),
    "photo.jpg", None])
def test_other_sources_are_refused_in_one_line(source):
    with pytest.raises(data.BadInput, match="^found .*expected a PIL image or .*: .*$"):
        data.to_picture(source)


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.tif", "x.webp", "x.avif"])
@pytest.mark.parametrize("turn, method", [
    (1, None), (3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_270)])
def test_exif_turns_a_file_and_its_image_alike_and_once(tmp_path, name, turn, method):
    exif = Image.Exif()
    exif[0x0112] = turn
    path = save(tmp_path / name, exif=exif)
    expected = photo() if turn == 1 else photo().transpose(method)
    found = data.open_image(path)
    assert data.picture_size(path) == (found.size[::-1], turn)
    assert found.size == expected.size
    assert np.abs(np.asarray(found) - np.asarray(expected).astype(int)).mean() < 8      # lossy
    with Image.open(path) as image:
        assert data.to_picture(image) == found
        image.load()
        assert data.to_picture(image) == found
    assert data.to_picture(found) == found                   # not turned again


@pytest.mark.parametrize("ending", data.EXTENSIONS)
def test_every_format_is_read_and_its_damage_named_with_a_reason(tmp_path, ending):
    kind = {".jpe": "JPEG", ".jfif": "JPEG"}.get(ending)     # Pillow saves neither by its ending
    whole = save(tmp_path / f"whole{ending}", format=kind)
    assert data.open_image(whole).size == (W, H)
    rng = np.random.default_rng(0)
    for i in range(12):
        content = bytearray(whole.read_bytes())
        content[rng.integers(0, 200)] = rng.integers(256)
        path = tmp_path / f"{i}{ending}"
        path.write_bytes(content[:rng.integers(1, 2 * len(content))])
        try:
            data.open_image(path)                            # some damage does not show
        except data.BadInput as error:
            assert re.fullmatch(f"{path}: .+", str(error))


def test_what_is_no_picture_is_named_with_a_reason(tmp_path):
    cut = save(tmp_path / "cut.jpg")
    cut.write_bytes(cut.read_bytes()[:-900])
    for path, why in ((cut, "truncated"), (Path(__file__), "cannot identify"),
                      (tmp_path / "missing.png", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(data.BadInput, match=f"^{path}: .*{why}"):
            data.open_image(path)
    with Image.open(cut) as image, pytest.raises(data.BadInput, match="truncated"):
        data.to_picture(image)


@pytest.mark.parametrize("error", [NameError, ValueError, OSError, TypeError])
def test_a_mistake_in_our_code_keeps_its_traceback(tmp_path, monkeypatch, error):
    def mistaken(image, background="white"):
        raise error("imagee")

    save_all(tmp_path, "au/1.png; tp/1.png")
    monkeypatch.setattr(data, "to_rgb", mistaken)
    for call, argument in ((data.open_image, tmp_path / "au/1.png"),
                           (lambda path: data.read_set(path, decode=True), tmp_path)):
        with pytest.raises(error, match="^imagee$") as raised:
            call(argument)
        assert raised.traceback[-1].name == "mistaken"


@pytest.mark.filterwarnings("error")                         # Pillow's own words beside ours
def test_headers_may_claim_200_megapixels_and_pillow_keeps_its_own_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(Image.core, "new", None)             # nothing may allocate the pixels
    for side in (15_000, 60_000):                            # Pillow refuses the second by itself
        with pytest.raises(data.BadInput, match="pixels, expected at most 200,000,000"):
            data.open_image(claim(tmp_path / "bomb.png", side, side))
    before = (Image.MAX_IMAGE_PIXELS, list(warnings.filters))
    path = claim(tmp_path / "large.png", 20_000, 10_000)
    with data.opened(path) as image:
        assert image.size == (20_000, 10_000)
        assert (Image.MAX_IMAGE_PIXELS, warnings.filters) == before
    assert data.picture_size(path) == ((10_000, 20_000), 1)  # from the header alone


def test_the_view_is_native_pixels_and_a_reflected_border():
    view = data.view(photo(), max_side=W, cell=32)
    pixels = torch.from_numpy(np.array(photo())).permute(2, 0, 1) / 255      # (3, H, W)
    assert (view.shape, view.dtype) == ((3, 128, W), torch.float32)
    assert torch.equal(view[:, :H], pixels)
    assert torch.equal(view[:, H:], pixels[:, H - 9:H - 1].flip(1))
    tiny = photo().crop((0, 0, 1, 3))                        # padded several times
    assert data.view(tiny, max_side=W, cell=16).shape == (3, 16, 16)


def test_only_a_longer_picture_is_reduced_and_once():
    assert data.reduced_size((W, H), W) == (W, H)
    assert data.reduced_size((W, H), 100) == (100, 75)
    assert data.reduced_size((5000, 2), 100) == (100, 1)
    view = data.view(photo(), max_side=100, cell=16)
    assert view.shape == (3, 80, 112)
    small = photo().resize((100, 75), Image.Resampling.BICUBIC, reducing_gap=3)
    assert torch.equal(view[:, :75, :100], data.to_tensor(small))


# -------------------------------------------------------------------------------------- layouts

SP = "Sp_D_CND_A_pla0005_pla0023_0281"
TP = "Tp_D_CRN_S_N_ani00002_art00014_11818"
DOTTED = "Sp_S_NNN_A_ani0099_ani0100.0288"
LAYOUTS = {   # layout, names in it: genuine; .. | manipulated > its mask; .. | not used; ..
    "folders": "au/1.jpg | tp/1.jpg > mask/1.png; tp/2.x.PNG > mask/2.x.png | .x/tp/9.jpg",
    "folders, real": "real/1.png | fake/1.png > fake_masks/1.png",
    "folders, original": "original/1.png; original/2.png | Forged/1.png; Forged/2.png",
    "folders, pristine": "pristine/1.png | tampered/1.png > masks/1_mask.png",
    "folders, deeper": "a/Authentic/1.jpg | a/Manipulated/s/2.jpg > a/Ground Truth/s/2_gt.png; "
                       "a/Manipulated/t/2.jpg > a/Ground Truth/t/2_gt.png",
    "folders, masks below": "au/1.jpg | tp/1.jpg > tp/mask/1.png",
    "folders, masks above": "au/1.jpg | tp/1.jpg > mask/tp/1.png",
    "folders, masks beside": "au/1.jpg | tp/1.jpg > tp/1_gt.png",
    "folders, masked faces": "au/1.jpg; au/ski_mask.jpg | tp/a_mask.jpg > mask/a_mask.png",
    "folders, CASIA": f"au/Au_ani_0001.jpg | tp/{SP}.jpg > mask/{SP}.png",
    "folders, CASIA with _gt": f"real/Au_ani_0001.jpg | fake/{SP}.jpg > Gt/{SP}_gt.png | "
                               "Gt/Au_ani_0001_gt.png",
    "folders, COVERAGE": "au/1.tif | tp/1t.tif > mask/1forged.tif | mask/1copy.tif",
    "folders, Columbia": "authentic/a_01.tif | manipulated/b_01.tif > "
                         "manipulated/edgemask/b_01_edgemask.jpg",
    "folders, DSO-1": "au/normal-01.png | tp/splicing-01.png > mask/splicing-01.png",
    "folders, IMD2020": "au/1a_orig.jpg | tp/c8t_0.jpg > mask/c8t_0_mask.png",
    "folders, CASIA 2": f"Au/Au_ani_00001.jpg | Tp/{TP}.tif > CASIA 2 Groundtruth/{TP}_gt.png",
    "folders, CASIA 1": f"Au/Au_ani_0001.jpg | Modified Tp/Tp/Sp/{SP}.jpg > "
                        f"CASIA 1.0 groundtruth/Sp/{SP}_gt.png; Modified Tp/Tp/CM/{DOTTED}.jpg > "
                        f"CASIA 1.0 groundtruth/CM/{DOTTED}_gt.png",
    "CASIA": f"Au_ani_0001.jpg | {SP}.jpg > {SP}_gt.png",
    "CASIA, odd folders": f"jpg/Au_ani_0001.jpg | jpg/{SP}.jpg > labels/{SP}_gt.png",
    "Columbia": "4cam_auth/a_01.tif | 4cam_splc/b_01.tif > 4cam_splc/edgemask/b_01_edgemask.jpg | "
                "4cam_auth/edgemask/a_01_edgemask.jpg",
    "COVERAGE": "image/1.tif | image/1t.tif > mask/1forged.tif | mask/1copy.tif; mask/1paste.tif",
    "IMD2020": "1a/1a_orig.jpg | 1a/c8t.jpg > 1a/c8t_mask.png",
    "DSO-1": "DSO-1/normal-1.png | DSO-1/splicing-1.png > DSO-1-Fake-Images-Masks/splicing-1.png",
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(tmp_path, name):
    genuine, manipulated, *unused = [part.split("; ") for part in LAYOUTS[name].split(" | ")]
    expected = {tmp_path / path: (0, None) for path in genuine}
    for pair in manipulated:
        path, *mask = [tmp_path / path for path in pair.split(" > ")]
        expected[path] = (1, mask[0] if mask else None)
    save_all(tmp_path, re.sub(r" [>|] ", "; ", LAYOUTS[name]))
    pictures, report = data.read_set(tmp_path)
    assert {picture.path: (picture.label, picture.mask) for picture in pictures} == expected
    assert report == (name.split(",")[0], [])


UNCLEAR = {   # what must not be guessed: files, the one that is named
    "NIST16": ("probe/1.png; world/1.png; mask/1.png", "probe/1.png"),
    "misspelt mask folder": ("au/1.png; tp/1.png; maks/1.png", "maks/1.png"),
    "masks called labels": (f"au/Au_a_1.jpg; tp/{SP}.jpg; labels/{SP}.png", f"labels/{SP}.png"),
    "stray picture": ("au/1.png; tp/1.png; mask/1.png; stray.png", "stray.png"),
    "masks without a class": ("images/1.png; masks/1.png", "images/1.png"),
    "masks beside, without a class": ("1.png; 1_mask.png", "1.png"),
    "masks alone": ("mask/1.png; mask/2.png", "mask/1.png"),
    "a class inside the other": ("real/1.png; fake/real/2.png", "fake/real/2.png"),
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_unclear_folders_are_refused_and_a_file_is_named(tmp_path, name):
    files, odd = UNCLEAR[name]
    said = refusal(save_all(tmp_path, files))
    assert str(tmp_path / odd) in said
    assert "rename or move it" in said


def test_missing_classes_are_problems(tmp_path):
    for files, layout, problem in (
            ("1.jpg; x/2.jpg; ski_mask.jpg", "no labels", "no labels: no folder is named au, tp"),
            ("au/1.jpg", "folders", "one class only: no manipulated pictures"),
            ("tp/1.jpg", "folders", "one class only: no genuine pictures")):
        root = tmp_path / files[:2]
        pictures, report = data.read_set(save_all(root, files))
        assert len(pictures) == len(files.split("; "))
        assert report.layout == layout
        assert len(report.problems) == 1 and report.problems[0].startswith(problem)


def test_other_formats_are_counted_by_ending_in_one_note(tmp_path):
    for name in ("au/1.heic", "au/2.HEIC", "tp/3.jxl", "au/readme.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"?")
    said = refusal(tmp_path)                                 # nothing else is there
    assert "2 .heic, 1 .jxl" in said
    assert all(known in said for known in data.EXTENSIONS)
    pictures, report = data.read_set(save_all(tmp_path, "au/4.jpg; tp/5.gif"))
    assert labels_of(pictures) == {"au/4.jpg": 0, "tp/5.gif": 1}
    assert report.problems == ["left out: 2 .heic, 1 .jxl, which Pillow cannot open"]


def test_links_are_followed_loops_end_and_each_picture_counts_once(tmp_path):
    save_all(tmp_path, "elsewhere/au/1.png; elsewhere/au/deep/2.png; set/tp/3.png")
    root = tmp_path / "set"
    for link, target in (("au", tmp_path / "elsewhere/au"), ("tp/loop", root), ("tp/self", "self"),
                         ("again", "tp"), ("tp/0.png", "3.png"), ("au/4.png", "gone")):
        os.symlink(target, root / link)
    files, left_out = data.files_in(root)
    names = ["au/1.png", "au/4.png", "au/deep/2.png", "tp/3.png"]
    assert files == [root / name for name in names]
    assert left_out == Counter()
    pictures, report = data.read_set(root)
    assert labels_of(pictures) == {"au/1.png": 0, "deep/2.png": 0, "tp/3.png": 1}
    assert kinds_of(report) == ["bad file"]                  # the link to nothing is named


def test_problems_are_named_and_an_unreadable_mask_leaves_its_picture_in_use(tmp_path):
    save_all(tmp_path, "au/1.jpg; tp/1.jpg; tp/1.png; tp/2.jpg; tp/4.jpg; mask/4.png; mask/3.png")
    for name in ("tp/bad.jpg", "mask/2.png"):
        (tmp_path / name).write_text("no picture")
    pictures, report = data.read_set(tmp_path)
    assert kinds_of(report) == ["bad file", "bad mask", "mask without picture", *["no mask"] * 3]
    assert str(tmp_path / "tp/bad.jpg") in " ".join(report.problems)
    assert labels_of(pictures) == {"au/1.jpg": 0, "tp/1.jpg": 1, "tp/1.png": 1, "tp/2.jpg": 1,
                                   "tp/4.jpg": 1}
    assert [p.mask for p in pictures] == [None] * 4 + [tmp_path / "mask/4.png"]

    cut = tmp_path / "tp/4.jpg"
    cut.write_bytes(cut.read_bytes()[:-900])
    assert len(data.read_set(tmp_path)[0]) == 5              # only headers are read
    pictures, report = data.read_set(tmp_path, decode=True)
    assert len(pictures) == 4
    assert f"bad file: {cut}: " in " ".join(report.problems)


def test_a_mask_that_may_be_of_another_picture_is_not_used(tmp_path):
    """Two sets in one folder: their pictures have equal names, their masks are different."""
    files = "; ".join(f"{part}/{kind}/1.png" for part in ("a", "b") for kind in ("au", "tp", "gt"))
    pictures, report = data.read_set(save_all(tmp_path, files))
    assert [picture.mask for picture in pictures] == [None] * 4
    assert kinds_of(report) == ["no mask"] * 2


def test_masks_are_never_opened_unless_asked_for(tmp_path, monkeypatch):
    save_all(tmp_path, "au/1.jpg; tp/1.jpg; mask/1.png")
    opened = []
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda path: opened.append(path) or original(path))
    pictures, report = data.read_set(tmp_path, masks=False, decode=True)
    assert report.problems == []
    assert [picture.mask for picture in pictures] == [None, None]
    assert set(opened) == {tmp_path / "au/1.jpg", tmp_path / "tp/1.jpg"}
    data.read_set(tmp_path)
    assert tmp_path / "mask/1.png" in opened                 # the spy sees what is opened


def test_scenes_stay_together_whatever_the_folders_are_called(tmp_path):
    names = ["au/Au_ani_00001.jpg", "tp/Tp_D_CRN_S_N_art00014_ani00001_11818.jpg", "au/7.jpg",
             "tp/7t.jpg", "au/031_O.png", "tp/031_F.png", "au/Au_ani_00007.jpg", "tp/x.jpg"]
    pictures, _ = data.read_set(save_all(tmp_path, "; ".join(names)))
    scenes = {"ani00001": 2, "7": 2, "031": 2, "ani00007": 1, "x": 1}
    assert Counter(p.source for p in pictures) == scenes
    rows = [f"{name},{int(name.startswith('tp'))}\n" for name in names]
    (tmp_path / "set.csv").write_text("image,label\n" + "".join(rows))
    listed, _ = data.read_set(tmp_path / "set.csv")
    assert Counter(p.source for p in listed) == scenes
    train, held_out = data.split(pictures, 0.5, seed=0)
    assert {p.source for p in train}.isdisjoint(p.source for p in held_out)
    assert data.split(pictures, 0.5, seed=0) == (train, held_out)
    assert data.split(pictures, 0, seed=0) == (pictures, [])


def numbered(labels, scenes):
    return [data.Picture(Path(f"{i}.png"), label, source=str(scene))
            for i, (label, scene) in enumerate(zip(labels, scenes))]


def test_split_holds_out_about_the_share_asked_for_of_each_class():
    alone = numbered([0] * 100 + [1] * 40, [""] * 140)       # no scenes known: each is its own
    train, held_out = data.split(alone, 0.15, seed=0)
    assert Counter(p.label for p in held_out) == {0: 15, 1: 6}
    assert sorted(train + held_out) == sorted(alone)
    assert data.split(alone, 0.15, seed=1)[1] != held_out
    mixed = numbered([0, 1] * 100, np.arange(200) // 8)
    for seed in range(10):
        held_out = data.split(mixed, 0.15, seed)[1]
        assert all(10 <= count <= 22 for count in Counter(p.label for p in held_out).values())


@pytest.mark.parametrize("fraction", [0.01, 0.15, 0.5, 0.9])
def test_both_classes_are_in_both_parts_whenever_that_is_possible(fraction):
    rng = np.random.default_rng(0)
    sets = [numbered([0] * 200 + [1] * 3, range(203)), numbered([0, 1] * 50, np.arange(100) // 50)]
    for n in rng.integers(2, 9, 200):
        sets.append(numbered(rng.integers(0, 2, n).tolist(), rng.integers(0, 5, n)))
    for seed, pictures in enumerate(sets):
        scenes = {p.source: {q.label for q in pictures if q.source == p.source} for p in pictures}
        count = Counter(map(frozenset, scenes.values()))
        pure = min(count[frozenset({0})], count[frozenset({1})])
        possible = count[frozenset({0, 1})] + pure >= 2
        train, held_out = data.split(pictures, fraction, seed)
        assert not {p.source for p in train} & {p.source for p in held_out}
        assert sorted(train + held_out) == sorted(pictures)
        both = {p.label for p in train} == {p.label for p in held_out} == {0, 1}
        assert both or not possible


LISTS = {
    "benco.json": json.dumps([["Tp/6.jpg", "Gt/6.png"], ["Au/8.jpg", "Negative"]]),
    "objects.json": json.dumps([{"image": "Tp/6.jpg", "label": 1, "mask": "Gt/6.png"},
                                {"image": "Au/8.jpg", "label": 0}]),
    "set.csv": "\ufeffimage,label,mask\nTp/6.jpg,1,Gt/6.png\n\nAu/8.jpg,0,\n",
    "spaces.csv": " image , label ,mask \n Tp/6.jpg , 1 , Gt/6.png \n Au/8.jpg , 0 ,  \n",
    "bare.csv": "image,label\nTp/6.jpg,1\nAu/8.jpg,0\n",
}


def save_list(root, name, text):
    """A list beside three pictures and a mask -> its path."""
    save_all(root, "Tp/6.jpg; Au/8.jpg; Au/9.jpg; Gt/6.png")
    (root / name).write_text(text, encoding="utf-8")
    return root / name


@pytest.mark.parametrize("name", LISTS)
def test_lists(tmp_path, name):
    pictures, report = data.read_set(save_list(tmp_path, name, LISTS[name]))
    assert labels_of(pictures) == {"Tp/6.jpg": 1, "Au/8.jpg": 0}
    assert report == ("list", [])
    mask = None if name == "bare.csv" else tmp_path / "Gt/6.png"
    assert [picture.mask for picture in pictures] == [mask, None]


BROKEN_LISTS = {   # name: (text, what the refusal must say)
    "real.csv": ("image,label\nAu/8.jpg,0\nTp/6.jpg,real\n",
                 ["row 2", "'real'", "0 (genuine) or 1 (manipulated)"]),
    "short.csv": ("image,label\nTp/6.jpg\n", ["row 1", "Tp/6.jpg"]),
    "semicolon.csv": ("image;label;mask\nAu/8.jpg;0;\n", ["image;label;mask", "image,label,mask"]),
    "headless.csv": ("Au/8.jpg,0\nTp/6.jpg,1\n", ["Au/8.jpg", "header image,label,mask"]),
    "paths.csv": ("image,label\nset/Au/8.jpg,0\n", ["set/Au/8.jpg"]),
    "text.txt": ("Tp/6.jpg Gt/6.png 1\nAu/8.jpg None 0\n", ["text.txt", "image,label,mask"]),
    "unlabelled.json": (json.dumps([{"image": "Au/8.jpg"}]), ["row 1", "Au/8.jpg"]),
    "odd.json": ("[[1, 2, 3]]", ["odd.json", "[1, 2, 3]"]),
    "wscl.json": ('{"a": {"path": "Au/8.jpg", "label": 0}}', ["wscl.json", "row 1"]),
    "words.json": ("not json", ["words.json", "cannot be read"]),
}


@pytest.mark.parametrize("name", BROKEN_LISTS)
def test_a_broken_list_is_one_line_that_says_what_and_where(tmp_path, name):
    text, expected = BROKEN_LISTS[name]
    said = refusal(save_list(tmp_path, name, text))
    for words in expected:
        assert words in said


def test_problems_of_a_list_are_named(tmp_path):
    text = ("image,label,mask\nTp/6.jpg,1,gone.png\nAu/8.jpg,0,\n./Au/8.jpg,0,\nAu/gone.jpg,0,\n"
            "Au/9.jpg,0,\nAu/9.jpg,1,\n")
    pictures, report = data.read_set(save_list(tmp_path, "set.csv", text))
    assert labels_of(pictures) == {"Tp/6.jpg": 1, "Au/8.jpg": 0}
    assert pictures[0].mask is None
    assert kinds_of(report) == ["bad file", "bad mask", "contradiction", "duplicate"]
    assert f"contradiction: {tmp_path / 'Au/9.jpg'} " in " ".join(report.problems)


def training_set(pictures, seed=0, window=24):
    return data.TrainingSet(pictures, max_side=64, cell=8, window=window, seed=seed)


def test_a_training_item_is_a_window_of_the_view_mirrored_in_half_of_the_cases(tmp_path):
    items = training_set([data.Picture(save(tmp_path / "1.png"), 1, mask=tmp_path / "gone.png")])
    view = (255 * data.view(photo(), 64, 8)).round()                         # (3, 48, 64)
    places = view.unfold(1, 24, 1).unfold(2, 24, 1)                          # (3, y, x, 24, 24)
    mirrored = 0
    seen = set()
    for index in range(40):                                  # from 1 on: the same picture again
        window, label = items[index]
        assert (window.dtype, window.shape, label) == (torch.uint8, (3, 24, 24), 1)
        straight, flipped = [(places == each[:, None, None]).all(dim=(0, 3, 4))
                             for each in (window, window.flip(2))]           # (y, x)
        assert straight.any() != flipped.any()
        mirrored += flipped.any().item()
        seen |= {tuple(place) for place in (straight | flipped).nonzero().tolist()}
    assert 10 < mirrored < 30
    assert len(seen) > 30


def test_a_window_contains_the_pixel_that_it_is_aimed_at(tmp_path):
    image = Image.new("RGB", (64, 48))                       # its own view
    image.putpixel((31, 2), (255, 255, 255))
    items = training_set([data.Picture(save(tmp_path / "1.png", image), 1)])
    items.aims = {str(tmp_path / "1.png"): (2, 31)}
    for items.epoch in range(40):
        assert items[0][0].max() == 255
    assert any(items[index][0].max() == 0 for index in range(1, 40))           # are not aimed


def test_a_smaller_picture_is_padded_by_reflection(tmp_path):
    window, _ = training_set([data.Picture(save(tmp_path / "1.png"), 0)], window=90)[0]
    view = (255 * data.view(photo(), 64, 8)).round().byte()                  # (3, 48, 64)
    straight = window if torch.equal(window[:, :48, :64], view) else window.flip(2)
    assert window.shape == (3, 90, 90)
    assert torch.equal(straight[:, :48, :64], view)
    assert torch.equal(straight[:, 48:90, :64], view[:, 5:47].flip(1))


def test_chance_comes_from_seed_epoch_and_index_alone(tmp_path):
    pictures = [data.Picture(save(tmp_path / f"{i}.png", photo(i)), i % 2) for i in range(4)]
    items = training_set(pictures)
    first = torch.stack([items[i][0] for i in range(4)])
    for workers in (0, 2):
        loader = torch.utils.data.DataLoader(items, batch_size=4, num_workers=workers)
        images, labels = next(iter(loader))
        assert torch.equal(images, first)
        assert labels.tolist() == [0, 1, 0, 1]
    assert not torch.equal(training_set(pictures, seed=1)[2][0], first[2])
    assert not torch.equal(items[2 + 4][0], first[2]) and items[2 + 4][1] == 0
    items.epoch = 1
    assert not torch.equal(items[2][0], first[2])
    with pytest.raises(data.BadInput, match="gone.jpg"):
        training_set([data.Picture(tmp_path / "gone.jpg", 0)])[0]


def test_the_command_says_what_is_there_and_what_is_wrong(tmp_path, capsys):
    save_all(tmp_path, "au/1.jpg; tp/1.jpg; mask/1.png")
    assert data.main([str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "1 genuine, 1 manipulated, 0 without label, 1 masks" in said
    assert "nothing wrong" in said
    (tmp_path / "tp/bad.jpg").write_text("no picture")
    assert data.main([str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "bad.jpg" in said and "nothing wrong" not in said
    (tmp_path / "empty").mkdir()
    for words in ("nowhere", str(tmp_path / "au/1.jpg"), str(tmp_path / "empty")):
        assert data.main([words]) == 2
        assert re.fullmatch("error: found .{,500}: check .*\n", capsys.readouterr().err)
    for words in ([], ["x", "--leaks"]):
        with pytest.raises(SystemExit, match="2"):
            data.main(words)


def test_the_lesson_goes_from_a_file_to_two_different_windows(capsys):
    data.demo()
    said = capsys.readouterr().out
    assert "700 x 500" in said
    assert "(3, 512, 704)" in said and "(3, 368, 512)" in said
    means = re.findall(r"\(3, 256, 256\) torch.uint8, label 0.* mean (\S+)", said)
    assert len(set(means)) == 2
