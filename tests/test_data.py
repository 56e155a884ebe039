"""Reading pictures, data sets and masks, and the training set, on pictures that are drawn here."""
import json
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
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
    """Write {path below root: picture or None for a photo} -> root."""
    for path, image in files.items():
        save(root / path, image)
    return root


def region(on=255, off=0):
    """A mask, PIL L: `on` in the upper left tenth."""
    mask = np.full((H, W), off, np.uint8)
    mask[:40, :48] = on
    return Image.fromarray(mask)


TRUTH = np.asarray(region(on=1))                                               # (H, W) {0, 1}


def refusal(path, **options):
    """What `read_set` says when it refuses: found .., a remedy after the last colon, one line."""
    with pytest.raises(ValueError) as error:
        data.read_set(path, **options)
    text = str(error.value)
    assert re.fullmatch(r"found .+: [a-z][^:]+", text)       # a dot is no line break
    assert len(text) < 700
    return text


def labels_of(pictures):
    """{name of the folder and file: label}"""
    return {f"{p.path.parent.name}/{p.path.name}": p.label for p in pictures}


# ---------------------------------------------------------------------------------- one picture

@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "RGBA", "LA", "I;16", "F", "RGB"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    deep = {"I;16": np.full((10, 20), 200 * 257, np.uint16),
            "F": np.full((10, 20), 200, np.float32)}
    if mode in deep:
        image = Image.fromarray(deep[mode])
    else:
        image = Image.new("L", (20, 10), 200).convert(mode)
    name = "x.tif" if mode in ("CMYK", "F") else "x.png"
    found = data.open_image(save(tmp_path / name, image))
    assert found.mode == "RGB"
    assert found.size == (20, 10)
    grey = np.asarray(found).astype(int)
    if mode == "1":                                          # dithered: black and white
        assert set(np.unique(grey)) == {0, 255}
    else:
        assert abs(grey - 200).max() <= 1


def test_what_is_transparent_lies_on_white(tmp_path):
    clear = Image.new("RGBA", (20, 10), (255, 0, 0, 0))
    found = data.open_image(save(tmp_path / "a.png", clear))
    assert (np.asarray(found) == 255).all()


def test_exif_turns_the_picture_and_its_size(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path / "b.jpg", exif=exif)
    assert data.open_image(path).size == (H, W)
    assert data.picture_size(path) == ((W, H), 6)
    assert data.picture_size(save(tmp_path / "plain.jpg")) == ((H, W), 1)
    assert data.picture_size(claim(tmp_path / "no_pixels.png", 90, 50)) == ((50, 90), 1)


def test_bad_files_are_named_with_a_reason(tmp_path):
    text = tmp_path / "text.jpg"
    text.write_text("no picture")
    cut = save(tmp_path / "cut.jpg")
    cut.write_bytes(cut.read_bytes()[:-900])
    for path in (text, cut, tmp_path / "missing.png", tmp_path):
        with pytest.raises(ValueError) as error:
            data.open_image(path)
        assert str(error.value).startswith(f"{path}: ")
        assert "\n" not in str(error.value)


def claim(path, width, height):
    """A PNG of a few bytes whose header claims width x height grey pixels -> path."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", header), (b"IDAT", b"\0" * 8)):
        check = struct.pack(">I", zlib.crc32(kind + body))
        content += struct.pack(">I", len(body)) + kind + body + check
    path.write_bytes(content)
    return path


@pytest.mark.filterwarnings("error")                        # Pillow's own words beside ours
@pytest.mark.parametrize("side", [15_000, 60_000])          # Pillow refuses the second by itself
def test_a_header_that_claims_too_much_is_refused_before_decoding(tmp_path, side, monkeypatch):
    monkeypatch.setattr(Image.core, "new", None)            # nothing may allocate the pixels
    with pytest.raises(ValueError, match="pixels"):
        data.open_image(claim(tmp_path / "bomb.png", side, side))


@pytest.mark.filterwarnings("error")
def test_200_megapixels_are_accepted(tmp_path):
    with data.opened(claim(tmp_path / "large.png", 20_000, 10_000)) as image:
        assert image.size == (20_000, 10_000)


def test_to_tensor():
    tensor = data.to_tensor(photo())
    assert tensor.shape == (3, H, W)
    assert tensor.dtype == torch.float32
    expected = torch.from_numpy(np.array(photo())).permute(2, 0, 1) / 255
    assert torch.equal(tensor, expected)


def test_jpeg_on_a_shifted_grid_keeps_size_and_place():
    shifted = np.asarray(data.jpeg(photo(), 95, (3, 5))).astype(int)
    straight = np.asarray(data.jpeg(photo(), 95)).astype(int)
    original = np.asarray(photo())
    assert shifted.shape == straight.shape == original.shape
    assert np.abs(shifted - original).mean() < 4
    assert not np.array_equal(shifted, straight)


def test_noise_has_the_deviation_asked_for():
    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    noisy = np.asarray(data.add_noise(grey, 4, np.random.default_rng(0)), dtype=float)
    assert noisy.std() == pytest.approx(4, rel=0.05)
    assert noisy.mean() == pytest.approx(128, abs=0.2)


# -------------------------------------------------------------------------------------- layouts

def columbia_mask():
    """As published: bright and dark red one part, bright and dark green the other, a JPEG."""
    mask = np.zeros((H, W, 3), np.uint8)
    mask[..., 0] = 100
    mask[:40, :48] = (0, 100, 0)
    mask[30:40, :48] = (0, 255, 0)
    mask[40:50, :48] = (255, 0, 0)
    return Image.fromarray(mask)


LAYOUTS = {   # name: ({path: picture or None for a photo}, genuine, manipulated, of these masked)
    "folders": ({"au/1.jpg": None, "tp/1.jpg": None, "tp/2.x.PNG": None, "mask/1.png": region(),
                 "mask/2.x.png": region(), ".cache/tp/9.jpg": None}, 1, 2, 2),
    "folders, real": ({"real/1.png": None, "fake/1.png": None, "fake_masks/1.png": region()},
                      1, 1, 1),
    "folders, original": ({"original/1.png": None, "original/2.png": None, "Forged/1.png": None,
                           "Forged/2.png": None}, 2, 2, 0),
    "folders, pristine": ({"pristine/1.png": None, "tampered/1.png": None,
                           "masks/1_mask.png": region()}, 1, 1, 1),
    "folders, deeper": ({"a/Authentic/1.jpg": None, "a/Manipulated/s/2.jpg": None,
                         "a/Ground Truth/s/2_gt.png": region()}, 1, 1, 1),
    "CASIA": ({"Au/Au_ani_00001.jpg": None, "Tp/Tp_D_CRN_S_N_ani00002_art00014_11818.tif": None,
               "CASIA 2 Groundtruth/Tp_D_CRN_S_N_ani00002_art00014_11818_gt.png": region()},
              1, 1, 1),
    "CASIA, dotted": ({"Au/Au_ani_0001.jpg": None,
                       "Sp/Sp_D_NNN_A_ani0099_ani0100.0288.jpg": None,
                       "Gt/Sp_D_NNN_A_ani0099_ani0100.0288_gt.png": region()}, 1, 1, 1),
    "Columbia": ({"4cam_auth/a_01.tif": None, "4cam_splc/b_01.tif": None,
                  "4cam_auth/edgemask/a_01_edgemask.jpg": None,
                  "4cam_splc/edgemask/b_01_edgemask.jpg": columbia_mask()}, 1, 1, 1),
    "COVERAGE": ({"image/1.tif": None, "image/1t.tif": None, "mask/1forged.tif": region(),
                  "mask/1copy.tif": region(), "mask/1paste.tif": region()}, 1, 1, 1),
    "IMD2020": ({"1a/1a_orig.jpg": None, "1a/c8t.jpg": None, "1a/c8t_mask.png": region()},
                1, 1, 1),
    "DSO-1": ({"DSO-1/normal-01.png": None, "DSO-1/splicing-01.png": None,
               "DSO-1-Fake-Images-Masks/splicing-01.png": region(on=0, off=255)}, 1, 1, 1),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(tmp_path, name):
    files, genuine, manipulated, masked = LAYOUTS[name]
    pictures, report = data.read_set(save_all(tmp_path, files))
    labels = [picture.label for picture in pictures]
    assert labels.count(0) == genuine
    assert labels.count(1) == manipulated
    assert report.problems == []
    assert name.startswith(report.layout)
    masks = [evaluate.read_mask(picture) for picture in pictures if picture.mask]
    assert len(masks) == masked
    for mask in masks:
        assert mask.dtype == np.uint8
        assert (mask != TRUTH).mean() < 0.02                 # Columbia's are JPEGs


def test_the_folder_names_the_class_not_the_order_of_the_alphabet(tmp_path):
    files, _, _, _ = LAYOUTS["folders, real"]
    pictures, _ = data.read_set(save_all(tmp_path, files))
    assert labels_of(pictures) == {"real/1.png": 0, "fake/1.png": 1}


UNCLEAR = {   # what must not be guessed: {path: ..}, the file that is named
    "NIST16": (["probe/1.png", "world/1.png", "mask/1.png"], "probe/1.png"),
    "misspelt mask folder": (["au/1.png", "tp/1.png", "maks/1.png"], "maks/1.png"),
    "stray picture": (["au/1.png", "tp/1.png", "mask/1.png", "stray.png"], "stray.png"),
    "another folder": (["au/1.png", "tp/1.png", "notes/me.png"], "notes/me.png"),
    "masks without a class": (["images/1.png", "masks/1.png"], "images/1.png"),
    "masks alone": (["mask/1.png", "mask/2.png"], "mask/1.png"),
    "a class inside the other": (["real/1.png", "fake/real/2.png"], "fake/real/2.png"),
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_unclear_folders_are_refused_and_a_file_is_named(tmp_path, name):
    files, odd = UNCLEAR[name]
    said = refusal(save_all(tmp_path, dict.fromkeys(files)))
    assert str(tmp_path / odd) in said
    assert "rename or move it" in said


def test_photos_without_labels_are_no_labels(tmp_path):
    save_all(tmp_path, {"1.jpg": None, "holiday/2.jpg": None})
    pictures, report = data.read_set(tmp_path)
    assert [picture.label for picture in pictures] == [None, None]
    assert report.layout == "no labels"
    assert len(report.problems) == 1 and "no labels" in report.problems[0]


@pytest.mark.parametrize("there, missing", [("au", "manipulated"), ("tp", "genuine")])
def test_one_class_alone_is_a_problem_that_names_the_other(tmp_path, there, missing):
    save(tmp_path / there / "1.jpg")
    pictures, report = data.read_set(tmp_path)
    assert len(pictures) == 1
    assert report.problems == [f"one class only: no {missing} pictures"]


@pytest.mark.parametrize("ending", [".heic", ".gif"])
def test_a_folder_of_other_formats_names_their_ending_and_the_known_ones(tmp_path, ending):
    (tmp_path / f"1{ending}").write_bytes(b"?")
    said = refusal(tmp_path)
    assert ending in said
    assert all(known in said for known in data.EXTENSIONS)


def test_wrong_paths_are_refused(tmp_path):
    assert "nowhere" in refusal(tmp_path / "nowhere")
    assert str(tmp_path) in refusal(tmp_path)                # empty
    path = save(tmp_path / "1.png", mini.photo(600, 600))
    said = refusal(path)                                     # a picture, not a set
    assert "found a picture" in said and str(path) in said
    assert len(said) < 200 + len(str(path))


def test_problems_are_named(tmp_path):
    save_all(tmp_path, {"au/1.jpg": None, "tp/1.jpg": None, "tp/1.png": None, "tp/2.jpg": None,
                        "mask/1.png": region(), "mask/3.png": region()})
    (tmp_path / "tp/bad.jpg").write_text("no picture")
    pictures, report = data.read_set(tmp_path)
    kinds = [problem.split(":")[0] for problem in report.problems]
    assert sorted(kinds) == ["bad file", "duplicate", "mask without picture", "no mask", "no mask"]
    assert str(tmp_path / "tp/bad.jpg") in " ".join(report.problems)
    assert labels_of(pictures) == {"au/1.jpg": 0, "tp/1.jpg": 1, "tp/1.png": 1, "tp/2.jpg": 1}


def test_a_mask_that_may_be_of_another_picture_is_not_used(tmp_path):
    """Two sets in one folder: their pictures have equal names, their masks are different."""
    for part in ("train", "val"):
        for folder in ("au", "tp", "mask"):
            save(tmp_path / part / folder / "1.png")
    pictures, report = data.read_set(tmp_path)
    for picture in pictures:
        assert picture.mask in (None, picture.path.parents[1] / "mask" / "1.png")
    assert any(problem.startswith("duplicate") for problem in report.problems)


def test_a_header_that_is_refused_is_a_problem_and_a_cut_file_when_decoded(tmp_path):
    save_all(tmp_path, {"au/1.jpg": None, "tp/1.jpg": None, "tp/cut.jpg": None})
    claim(tmp_path / "au/bomb.png", 60_000, 60_000)
    cut = tmp_path / "tp/cut.jpg"
    cut.write_bytes(cut.read_bytes()[:-900])

    pictures, report = data.read_set(tmp_path)
    assert len(pictures) == 3                                # only headers were read
    assert [problem.split(":")[0] for problem in report.problems] == ["bad file"]
    assert "bomb.png" in report.problems[0]

    pictures, report = data.read_set(tmp_path, decode=True)
    assert len(pictures) == 2
    assert len(report.problems) == 2 and "cut.jpg" in report.problems[1]


def test_nothing_usable_is_refused(tmp_path):
    (tmp_path / "au").mkdir()
    (tmp_path / "au/1.jpg").write_text("no picture")
    assert "1.jpg" in refusal(tmp_path)


def test_masks_are_never_opened_unless_asked_for(tmp_path, monkeypatch):
    save_all(tmp_path, {"au/1.jpg": None, "tp/1.jpg": None})
    broken = tmp_path / "mask/1.png"
    broken.parent.mkdir()
    broken.write_text("no picture")
    opened = []
    original = Image.open

    def spy(path, *rest, **options):
        opened.append(Path(path))
        return original(path, *rest, **options)

    monkeypatch.setattr(Image, "open", spy)
    pictures, report = data.read_set(tmp_path, masks=False, decode=True)
    assert report.problems == []
    assert [picture.mask for picture in pictures] == [None, None]
    assert set(opened) == {tmp_path / "au/1.jpg", tmp_path / "tp/1.jpg"}
    data.read_set(tmp_path)
    assert broken in opened                                  # the spy sees what is opened


def test_scenes_stay_together(tmp_path):
    names = ("au/Au_ani_00001.jpg", "tp/Tp_D_CRN_S_N_art00014_ani00001_11818.jpg",
             "tp/Tp_S_CRN_S_N_ani00007_ani00007_11819.jpg", "au/Au_ani_00007.jpg")
    pictures, _ = data.read_set(save_all(tmp_path, dict.fromkeys(names)))
    train, val = data.split(pictures, 0.5, seed=0)
    assert len(train) == len(val) == 2
    assert {p.source for p in train}.isdisjoint(p.source for p in val)
    assert data.split(pictures, 0.5, seed=0) == (train, val)
    assert data.split(pictures, 0, seed=0) == (pictures, [])


def test_split_holds_out_about_the_share_asked_for_and_another_one_for_another_seed():
    pictures = [data.Picture(Path(f"{i}.png"), i % 2) for i in range(100)]      # no scenes known
    train, val = data.split(pictures, 0.15, seed=0)
    assert len(val) == 15
    assert sorted(train + val) == sorted(pictures)
    assert data.split(pictures, 0.15, seed=1)[1] != val


# ---------------------------------------------------------------------------------------- lists

LISTS = {
    "benco.json": json.dumps([["Tp/6.jpg", "Gt/6.png"], ["Au/8.jpg", "Negative"]]),
    "wscl.json": json.dumps({"a": {"path": "Tp/6.jpg", "label": 1, "mask": "Gt/6.png"},
                             "b": {"path": "Au/8.jpg", "label": 0, "mask": None}}),
    "mvss.txt": "Tp/6.jpg Gt/6.png 1\n\nAu/8.jpg None 0\n",
    "set.csv": "\ufeffimage,label,mask\nTp/6.jpg,1,Gt/6.png\nAu/8.jpg,0,\n",
    "bare.csv": "image,label\nTp/6.jpg,1\nAu/8.jpg,0\n",
}


def save_list(root, name, text):
    """A list beside two pictures and a mask -> its path."""
    save_all(root, {"Tp/6.jpg": None, "Au/8.jpg": None, "Gt/6.png": region()})
    path = root / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", LISTS)
def test_lists(tmp_path, name):
    pictures, report = data.read_set(save_list(tmp_path, name, LISTS[name]))
    assert labels_of(pictures) == {"Tp/6.jpg": 1, "Au/8.jpg": 0}
    assert report == ("list", [])
    assert not evaluate.read_mask(pictures[1]).any()
    if name == "bare.csv":
        assert pictures[0].mask is None
    else:
        assert np.array_equal(evaluate.read_mask(pictures[0]), TRUTH)


BROKEN_LISTS = {   # name: (text, what the refusal must say)
    "real.csv": ("image,label\nAu/8.jpg,0\nTp/6.jpg,real\n",
                 ["line 3", "'real'", "0 (genuine) or 1 (manipulated)"]),
    "two.csv": ("image,label\nTp/6.jpg,2\n", ["line 2", "'2'", "0 (genuine) or 1 (manipulated)"]),
    "short.csv": ("image,label\nTp/6.jpg\n", ["line 2"]),
    "semicolon.csv": ("image;label;mask\nAu/8.jpg;0;\n", ["image;label;mask", "commas"]),
    "header.csv": ("path,class\nAu/8.jpg,0\n", ["path,class", "image,label,mask"]),
    "headless.csv": ("Au/8.jpg,0\n", ["Au/8.jpg,0", "image,label,mask"]),
    "paths.csv": ("image,label\nset/Au/8.jpg,0\nset/Tp/6.jpg,1\n",
                  ["set/Au/8.jpg", "list's folder"]),
    "empty.csv": ("", ["image,label,mask"]),
    "header_only.csv": ("image,label\n", ["header_only.csv"]),
    "none.json": ("[]", ["none.json"]),
    "real.txt": ("Au/8.jpg None 0\nTp/6.jpg Gt/6.png real\n", ["line 2", "'real'"]),
    "short.txt": ("Au/8.jpg None 0\nTp/6.jpg 1\n", ["line 2", "'image mask label'"]),
    "long.txt": ("Au/8.jpg None " + 9999 * "0", ["line 1"]),
    "real.json": (json.dumps({"a": {"path": "Au/8.jpg", "label": "real"}}), ["'real'"]),
    "odd.json": ("[[1, 2, 3]]", ["odd.json"]),
    "number.json": ("5", ["number.json"]),
    "keys.json": ("{\"a\": 1}", ["keys.json"]),
    "words.json": ("not json", ["words.json"]),
}


@pytest.mark.parametrize("name", BROKEN_LISTS)
def test_a_broken_list_is_one_line_that_says_what_and_where(tmp_path, name):
    text, expected = BROKEN_LISTS[name]
    said = refusal(save_list(tmp_path, name, text))
    for words in expected:
        assert words in said


def test_a_file_that_is_no_list_is_one_line(tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(np.random.default_rng(0).bytes(100_000))
    assert str(path) in refusal(path)


def test_problems_of_a_list_are_named(tmp_path):
    text = ("image,label\nTp/6.jpg,1\nAu/8.jpg,0\nAu/8.jpg,0\nAu/gone.jpg,0\nAu/bomb.png,0\n")
    path = save_list(tmp_path, "set.csv", text)
    claim(tmp_path / "Au/bomb.png", 60_000, 60_000)
    pictures, report = data.read_set(path)
    assert labels_of(pictures) == {"Tp/6.jpg": 1, "Au/8.jpg": 0}
    kinds = [problem.split(":")[0] for problem in report.problems]
    assert kinds == ["duplicate", "bad file", "bad file"]
    assert "line 4" in report.problems[0]
    assert "gone.jpg" in report.problems[1]
    assert "bomb.png" in report.problems[2]


# ---------------------------------------------------------------------------------------- masks

def masks():
    """The same region in every way in which data sets write it."""
    grey = np.asarray(region())
    white = np.full_like(grey, 255)
    palette = region(on=1).convert("P")
    palette.putpalette([0, 0, 0, 128, 0, 0])
    return {
        "grey": region(),
        "zero and one": region(on=1),
        "palette": palette,
        "16 bit": Image.fromarray(grey.astype(np.uint16) * 257),
        "alpha": Image.fromarray(np.dstack([white, white, white, grey])),
        "opaque": Image.fromarray(np.dstack([grey, grey, grey, white])),
        "RGB": region().convert("RGB"),
        "1 bit": Image.fromarray(grey > 0),
        "turned": region().transpose(Image.Transpose.ROTATE_270),
        "half size": region().resize((W // 2, H // 2), Image.Resampling.NEAREST),
    }


@pytest.mark.parametrize("kind", masks())
def test_masks_of_all_kinds(tmp_path, kind):
    save_all(tmp_path, {"au/1.png": None, "tp/1.png": None, "mask/1.png": masks()[kind]})
    pictures, report = data.read_set(tmp_path)
    expected = TRUTH
    if kind == "half size":                                  # at its own size: nothing is lost
        expected = TRUTH[::2, ::2]
    assert np.array_equal(evaluate.read_mask(pictures[1]), expected)
    assert not evaluate.read_mask(pictures[0]).any()             # genuine: nothing
    said = {"turned": ["mask on its side"],
            "half size": ["mask of another size than its picture"]}.get(kind, [])
    assert [problem.split(",")[0].split(":")[0] for problem in report.problems] == said


@pytest.mark.parametrize("turn", [6, 8])
def test_a_mask_follows_the_exif_of_its_picture(tmp_path, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    path = save(tmp_path / "turned.png", region().convert("RGB"), exif=exif)
    expected = np.asarray(data.open_image(path))[..., 0] > 127
    raw = save(tmp_path / "raw.png", region())               # drawn on the raw picture
    assert np.array_equal(evaluate.read_mask(data.Picture(path, 1, raw)), expected)
    upright = save(tmp_path / "upright.png", Image.fromarray(expected))
    assert np.array_equal(evaluate.read_mask(data.Picture(path, 1, upright)), expected)


def test_columbia_masks_are_read_from_a_list_too(tmp_path):
    save_all(tmp_path, {"b_01.tif": None, "b_01_edgemask.jpg": columbia_mask()})
    (tmp_path / "set.csv").write_text("image,label,mask\nb_01.tif,1,b_01_edgemask.jpg\n")
    pictures, _ = data.read_set(tmp_path / "set.csv")
    assert (evaluate.read_mask(pictures[0]) != TRUTH).mean() < 0.02


def test_masks_that_are_black_where_manipulated(tmp_path, capsys):
    files = {"a.jpg": None, "m.png": region(on=0, off=255), "b.jpg": None}
    text = "a.jpg m.png 1\nb.jpg None 0\n"
    for name in ("NIST16", "other"):
        save_all(tmp_path / name, files)
        (tmp_path / name / "list.txt").write_text(text)

    # NIST16 is known to have them
    pictures, _ = evaluate.read(tmp_path / "NIST16/list.txt", limit=0)
    assert np.array_equal(evaluate.read_mask(pictures[0]), TRUTH)
    assert "inverted" not in capsys.readouterr().err
    # of others it is asked
    pictures, _ = evaluate.read(tmp_path / "other/list.txt", limit=0)
    assert np.array_equal(evaluate.read_mask(pictures[0]), 1 - TRUTH)
    assert "masks inverted?" in capsys.readouterr().err


def test_a_missing_mask_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="found no mask for .*1.png"):
        evaluate.read_mask(data.Picture(save(tmp_path / "1.png"), 1))


# ------------------------------------------------------------------------------ the training set

def test_equal_chance_degrades_alike():
    one = photo()
    two = photo()
    two.paste((0, 0, 0), (100, 80, 110, 90))
    changed = 0
    for seed in range(20):
        a = np.asarray(data.degrade(one, (W, H), np.random.default_rng(seed))).astype(int)
        b = np.asarray(data.degrade(two, (W, H), np.random.default_rng(seed))).astype(int)
        assert a.shape == b.shape == (H, W, 3)
        assert np.abs(a[:60] - b[:60]).mean() < 0.2          # same noise, same tables
        changed += not np.array_equal(a, np.asarray(one))
    assert 10 < changed < 20                                 # some stay as they are
    assert data.degrade(one, (64, 32), np.random.default_rng(0)).size == (64, 32)


def test_degrade_covers_the_robustness_grid(monkeypatch):
    """JPEG down to 50, blur up to sigma 3.8, noise up to variance 23; strong blur stays rare."""
    sigmas = []
    noises = []
    qualities = []
    blur = data.ImageFilter.GaussianBlur

    def record_blur(sigma):
        sigmas.append(sigma)
        return blur(sigma)

    def record_noise(image, sigma, rng):
        noises.append(sigma)
        return image

    def record_quality(image, quality, *rest, **options):
        qualities.append(quality)
        return image

    monkeypatch.setattr(data.ImageFilter, "GaussianBlur", record_blur)
    monkeypatch.setattr(data, "add_noise", record_noise)
    monkeypatch.setattr(data, "jpeg", record_quality)
    small = mini.photo(16, 16)
    for seed in range(2000):
        data.degrade(small, (16, 16), np.random.default_rng(seed))
    assert 45 == min(qualities) and max(qualities) == 100
    assert 0.3 <= min(sigmas) < 0.35 and 3.6 < max(sigmas) <= 3.9
    assert np.median(sigmas) == pytest.approx(1.08, rel=0.15)
    assert 200 < len(sigmas) < 400
    assert 1 <= min(noises) < 1.2 and 23 ** 0.5 < max(noises) <= 6


def test_the_training_set_sees_paths_and_labels_only(tmp_path, monkeypatch):
    pairs = [(save(tmp_path / f"{i}.jpg", photo(i)), i % 2) for i in range(3)]
    opened = []
    original = Image.open

    def spy(source, *rest, **options):
        opened.append(source)
        return original(source, *rest, **options)

    monkeypatch.setattr(Image, "open", spy)
    for augment in (False, True):
        items = data.TrainingSet(pairs, size=48, seed=0, augment=augment, cache=0)
        image, label, index = items[1]
        assert image.shape == (3, 48, 48)
        assert 0 <= image.min() and image.max() <= 1
        assert (label, index) == (1, 1)
        assert torch.equal(image, items[1][0])               # the same, however often it is asked
        items.epoch = 1
        assert not torch.equal(image, items[1][0])
    assert {path for path in opened if isinstance(path, Path)} == {pairs[1][0]}
    other = data.TrainingSet(pairs, size=48, seed=1, cache=0)
    assert not torch.equal(other[1][0], image)


def test_cache_workers_and_arrays_change_nothing(tmp_path):
    paths = [save(tmp_path / f"{i}.png", photo(i)) for i in range(4)]
    arrays = [np.asarray(photo(i)) for i in range(4)]
    found = []
    for photos, cache, workers in ((paths, 1000, 0), (paths, 0, 2), (paths, 0.1, 0),
                                   (arrays, 0, 0)):
        items = data.TrainingSet([(photo, 0) for photo in photos], size=32, seed=1, cache=cache)
        loader = torch.utils.data.DataLoader(items, batch_size=2, num_workers=workers)
        found.append(torch.cat([batch for batch, _, _ in loader]))
    for images in found[1:]:
        assert torch.equal(images, found[0])


def test_without_augmentation_the_middle_of_the_picture_is_taken(monkeypatch):
    monkeypatch.setattr(data, "degrade", lambda image, size, rng: image.resize(size))
    items = data.TrainingSet([(np.asarray(photo()), 0)], size=H, seed=0, augment=False)
    monkeypatch.setattr(items, "work_size", lambda rng: H)
    middle = photo().crop((20, 0, 140, H))
    assert torch.allclose(items[0][0], data.to_tensor(middle), atol=1 / 255)


def test_an_unreadable_picture_is_named_when_asked_for(tmp_path):
    (tmp_path / "bad.jpg").write_text("no picture")
    pairs = [(tmp_path / "bad.jpg", 0), (save(tmp_path / "1.jpg"), 1)]
    items = data.TrainingSet(pairs, size=32, seed=0, cache=0)
    assert items[1][1] == 1
    with pytest.raises(ValueError, match="bad.jpg"):
        items[0]


# --------------------------------------------------------------------- what is wrong with a set

def test_accuracy_of_guessing_labels():
    labels = [0, 1] * 200
    rng = np.random.default_rng(0)
    assert data.accuracy_from(labels, labels) == 1
    assert data.accuracy_from([7] * 400, labels) == 0.5
    unrelated = rng.integers(0, 4, 400).tolist()
    assert data.accuracy_from(unrelated, labels) == pytest.approx(0.5, abs=0.07)
    assert data.accuracy_from(list(range(400)), labels) == 0.5       # no value twice: no guess


def test_leaks_are_found_and_absent(tmp_path, capsys):
    for i in range(20):
        one = mini.photo(64, 64, i)
        two = mini.photo(64, 64, i + 50)
        save(tmp_path / "leaky/au" / f"{i}.jpg", one, quality=90)
        save(tmp_path / "leaky/tp" / f"{i}.jpg", two, quality=70)
        save(tmp_path / "fair/au" / f"{i}.jpg", one, quality=90)
        save(tmp_path / "fair/tp" / f"{i}.jpg", two, quality=90)
    found = data.leaks(data.read_set(tmp_path / "leaky")[0])
    assert found["JPEG tables"] == 1
    assert found["format"] == found["size"] == found["aspect"] == 0.5
    fair = data.leaks(data.read_set(tmp_path / "fair")[0])
    assert fair["JPEG tables"] == fair["format"] == fair["size"] == 0.5

    assert data.main([str(tmp_path / "leaky"), "--leaks"]) == 1
    assert "leak: JPEG tables alone tells the class" in capsys.readouterr().out
    assert data.main([str(tmp_path / "fair"), "--leaks"]) == 0
    assert "nothing wrong" in capsys.readouterr().out


def test_the_command_says_what_is_there_and_what_is_wrong(tmp_path, capsys):
    save_all(tmp_path / "set", {"au/1.jpg": None, "tp/1.jpg": None, "mask/1.png": region()})
    assert data.main([str(tmp_path / "set"), "--preview", str(tmp_path / "p.png")]) == 0
    said = capsys.readouterr().out
    assert "1 genuine, 1 manipulated, 0 without label, 1 masks" in said
    assert "nothing wrong" in said
    sheet = np.asarray(Image.open(tmp_path / "p.png"))
    assert (sheet[:128, :128] != 255).any()                  # the first picture

    (tmp_path / "set/tp/bad.jpg").write_text("no picture")
    assert data.main([str(tmp_path / "set")]) == 1
    said = capsys.readouterr().out
    assert "bad file" in said and "bad.jpg" in said
    assert "nothing wrong" not in said


def test_the_command_says_so_when_there_are_no_labels_or_one_class(tmp_path, capsys):
    save(tmp_path / "photos/1.jpg")
    assert data.main([str(tmp_path / "photos")]) == 1
    assert "no labels" in capsys.readouterr().out
    assert data.main([str(tmp_path / "photos"), "--leaks"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    save(tmp_path / "set/au/1.jpg")
    assert data.main([str(tmp_path / "set")]) == 1
    assert "no manipulated pictures" in capsys.readouterr().out


def test_wrong_calls_exit_2_with_one_line(tmp_path, capsys):
    picture = save(tmp_path / "pic.png", mini.photo(600, 600))
    save_all(tmp_path, {"set/au/1.png": None, "set/tp/1.png": None})
    unwritable = str(tmp_path / "no/such/folder.png")
    for words in (["nowhere"], [str(picture)], [str(tmp_path / "set"), "--preview", unwritable]):
        assert data.main(words) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1
        assert len(said) < 400
    for words in ([], ["--leaks"], ["x", "--leak"]):
        with pytest.raises(SystemExit) as stop:
            data.main(words)
        assert stop.value.code == 2


def test_the_lesson_shows_a_leak_and_how_it_shrinks(capsys):
    data.demo()
    said = capsys.readouterr().out
    accuracies = re.search(r"accuracy (\S+), after degrade\(\) with (\S+);", " ".join(said.split()))
    before, after = map(float, accuracies.groups())
    assert before == 1
    assert 0.45 < after < 0.75
    means = re.findall(r"epoch \d, item 0: \(3, 64, 64\), label 0, mean (\S+):", said)
    assert len(set(means)) == 2
