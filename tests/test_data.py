"""Pictures, data sets and the training set, on pictures that are drawn here."""
import base64
import io
import os
import re
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
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABEAIAAADA54+dAAAA"       # one pixel of 16-bit colours
WHITE = PNG + "C0lEQVR4nGP4DwYAFPIF+6QNfF4AAAAASUVORK5CYII="


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


def refusal(path):
    """The one line with which `read_set` refuses: found .., and a remedy after the last colon."""
    with pytest.raises(data.BadInput) as error:
        data.read_set(path)
    text = str(error.value)
    assert re.fullmatch(r"found .{,650}: [a-z][^:]+", text)
    return text


def labels_of(pictures):
    """{name of the folder and file: label}"""
    return {f"{p.path.parent.name}/{p.path.name}": p.label for p in pictures}


def kinds_of(problems):
    """The first words of each problem, sorted."""
    return sorted(re.split(" of|:", problem)[0] for problem in problems)


def ramp(white, dtype):
    """A picture (1, 256) from black to white, as numbers from 0 to `white`."""
    return np.linspace(0, white, 256).round(6).astype(dtype)[None]


@pytest.mark.parametrize("white, dtype", [
    (1, "float32"), (255, "float32"), (255, "uint16"), (4095, "uint16"), (65535, "int32")])
def test_numbers_are_scaled_to_the_8_bit_picture(tmp_path, white, dtype):
    numbers = ramp(white, dtype)
    path = save(tmp_path / "x.tif", Image.fromarray(numbers))
    for found in (data.open_image(path), data.to_rgb(Image.fromarray(numbers))):
        assert found.mode == "RGB"
        assert np.abs(np.asarray(found)[..., 0] - ramp(255, "int32")).max() <= 1


@pytest.mark.parametrize("bad", [-1, 70_000, np.nan, np.inf])
@pytest.mark.filterwarnings("error")                         # NumPy must not add a warning
def test_numbers_out_of_range_are_refused_in_one_line(tmp_path, bad):
    numbers = ramp(1, "float32")
    numbers[0, 3] = bad
    path = save(tmp_path / "x.tif", Image.fromarray(numbers))
    with pytest.raises(data.BadInput, match=f"^{path}: found values from .*: scale them$"):
        data.open_image(path)


def test_16_bit_colours_are_read():
    white = data.open_image(io.BytesIO(base64.b64decode(WHITE)))
    assert white.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "LA", "RGB"])
def test_every_mode_becomes_rgb_on_the_background(tmp_path, mode):
    image = Image.new("L", (20, 10), 200).convert(mode)
    found = data.open_image(save(tmp_path / ("x.tif" if mode == "CMYK" else "x.png"), image))
    assert (found.mode, found.size) == ("RGB", (20, 10))
    assert abs(np.asarray(found).astype(int) - 200).max() <= 1
    clear = Image.new("RGBA", (1, 1), (255, 0, 0, 0))
    for colour, value in (("white", 255), ("black", 0)):
        assert data.to_rgb(clear, colour).getpixel((0, 0)) == (value, value, value)


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.tif", "x.webp", "x.avif"])
@pytest.mark.parametrize("turn, degrees", [(1, 0), (3, 180), (6, 270)])
def test_files_and_images_are_rotated_alike_and_once(tmp_path, monkeypatch, name, turn, degrees):
    exif = Image.Exif()
    exif[0x0112] = turn
    path = save(tmp_path / name, exif=exif)
    if name != "x.avif":                                     # Pillow itself writes its EXIF data
        monkeypatch.setattr(Image.Exif, "tobytes", None)     # as if it were too odd for Pillow
    expected = photo().rotate(degrees, expand=True)
    found = data.open_image(path)
    assert found.size == expected.size
    assert np.abs(np.asarray(found) - np.asarray(expected).astype(int)).mean() < 8      # lossy
    with Image.open(path) as image:
        for _ in range(2):                                   # the second time it has been loaded
            assert data.to_rgb(image) == found
    assert data.to_rgb(found) == found                       # not rotated again


@pytest.mark.parametrize("ending", data.EXTENSIONS[:12])
def test_every_format_is_read_and_its_damage_is_named(tmp_path, ending):
    kind = {".jpe": "JPEG", ".jfif": "JPEG"}.get(ending)     # Pillow saves neither by its ending
    path = save(tmp_path / f"x{ending}", format=kind)
    assert data.open_image(path).size == (W, H)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(12):
        content = bytearray(whole)
        content[rng.integers(0, 200)] = rng.integers(256)
        path.write_bytes(content[:rng.integers(1, 2 * len(content))])
        try:
            data.open_image(path)                            # some damage does not show
        except data.BadInput as error:
            assert re.fullmatch(f"{path}: .+", str(error))


@pytest.mark.filterwarnings("error")                         # Pillow must not add a warning
def test_the_limit_on_pixels_is_pillows_and_stays_as_it_is(tmp_path, monkeypatch):
    path = save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", W * H - 1)          # above it, Pillow warns
    assert data.open_image(path) == photo()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", W * H // 2 - 1)     # above twice that, it fails
    with pytest.raises(data.BadInput, match=f"^{path}: .* exceeds limit"):
        data.open_image(path)


@pytest.mark.parametrize("error", [NameError, ValueError, OSError, TypeError])
def test_a_mistake_in_our_code_keeps_its_traceback(tmp_path, monkeypatch, error):
    def mistaken(image, background="white"):
        raise error("imagee")

    save_all(tmp_path, "au/1.png; tp/1.png")
    picture = data.Picture(tmp_path / "au/1.png", 0)
    monkeypatch.setattr(data, "to_rgb", mistaken)
    for call in (lambda: data.open_image(picture.path), lambda: data.read_set(tmp_path),
                 lambda: training_set([picture])[0]):
        with pytest.raises(error, match="^imagee$") as raised:
            call()
        assert raised.traceback[-1].name == "mistaken"


def test_the_view_is_native_pixels_and_a_reflected_border():
    view = data.view(photo(), max_side=W, cell=32)
    pixels = torch.from_numpy(np.array(photo())).permute(2, 0, 1) / 255      # (3, H, W)
    assert (view.shape, view.dtype) == ((3, 128, W), torch.float32)
    assert torch.equal(view[:, :H], pixels)
    assert torch.equal(view[:, H:], pixels[:, H - 9:H - 1].flip(1))
    tiny = photo().crop((0, 0, 1, 3))                        # padded several times
    assert data.view(tiny, W, 16).shape == (3, 16, 16)


def test_only_a_longer_picture_is_reduced_and_once():
    assert data.reduced_size((W, H), W) == (W, H)
    assert data.reduced_size((5000, 2), 100) == (100, 1)
    view = data.view(photo(), max_side=20, cell=5)
    small = photo().resize((20, 15), Image.Resampling.BICUBIC, reducing_gap=3)
    assert torch.equal(view, data.to_tensor(small))


SP = "Sp_D_CND_A_pla0005_pla0023_0281"


@pytest.mark.parametrize("layout, files", [   # genuine; .. | manipulated > mask; .. | not used; ..
    ("folders", "au/1.jpg | tp/1.jpg > mask/1.png; tp/2.x.PNG > mask/2.x.png | .x/tp/9.jpg"),
    ("folders", "real/1.png | fake/1.png > fake_masks/1_mask.png"),
    ("folders", "a/Authentic/1.jpg | a/Manipulated/s/2.jpg > a/Ground Truth/s/2_gt.png; "
                "a/Manipulated/t/2.jpg > a/Ground Truth/t/2_gt.png"),
    ("folders", "au/1.jpg | tp/1.jpg > tp/mask/1.png"),
    ("folders", "au/1.jpg | tp/1.jpg > tp/1_gt.png"),
    ("folders", "au/1.jpg; au/ski_mask.jpg | tp/a_mask.jpg > mask/a_mask.png"),
    ("folders", f"au/Au_ani_0001.jpg | tp/{SP}.jpg > mask/{SP}.png"),
    ("folders", f"Au/Au_a_1.jpg | Tp/{SP}.tif > 2 Groundtruth/{SP}_gt.png | Gt/Au_a_1_gt.png"),
    ("folders", "au/1.tif | tp/1t.tif > mask/1forged.tif | mask/1copy.tif"),
    ("folders", "au/a_01.tif | tp/b_01.tif > tp/edgemask/b_01_edgemask.jpg"),
    ("folders", "au/1a_orig.jpg | tp/c8t_0.jpg > mask/c8t_0_mask.png"),
    ("CASIA", f"Au_ani_0001.jpg | {SP}.jpg > {SP}_gt.png"),
    ("CASIA", f"jpg/Au_ani_0001.jpg | jpg/{SP}.jpg > labels/{SP}_gt.png"),
    ("Columbia", "4cam_auth/a_01.tif | 4cam_splc/b_01.tif > 4cam_splc/edgemask/b_01_edgemask.jpg"
                 " | 4cam_auth/edgemask/a_01_edgemask.jpg"),
    ("COVERAGE", "image/1.tif | image/1t.tif > mask/1forged.tif | mask/1copy.tif; mask/1paste.tif"),
    ("IMD2020", "1a/1a_orig.jpg | 1a/c8t.jpg > 1a/c8t_mask.png"),
    ("DSO-1", "DSO-1/normal-1.png | DSO-1/splicing-1.png > DSO-1-Fake-Masks/splicing-1.png")])
def test_layouts(tmp_path, layout, files):
    genuine, manipulated, *unused = [part.split("; ") for part in files.split(" | ")]
    expected = {tmp_path / path: (0, None) for path in genuine}
    for pair in manipulated:
        path, mask = pair.split(" > ")
        expected[tmp_path / path] = (1, tmp_path / mask)
    save_all(tmp_path, re.sub(r" [>|] ", "; ", files))
    pictures, found, problems = data.read_set(tmp_path)
    assert {picture.path: (picture.label, picture.mask) for picture in pictures} == expected
    assert (found, problems) == (layout, [])


@pytest.mark.parametrize("files, odd", [
    ("probe/1.png; world/1.png; mask/1.png", "probe/1.png"),                     # NIST16
    ("au/1.png; tp/1.png; maks/1.png", "maks/1.png"),
    (f"au/Au_a_1.jpg; tp/{SP}.jpg; labels/{SP}.png", f"labels/{SP}.png"),
    ("au/1.png; tp/1.png; mask/1.png; stray.png", "stray.png"),
    ("1.png; 1_mask.png", "1.png"),
    ("mask/1.png; mask/2.png", "mask/1.png"),
    ("real/1.png; fake/real/2.png", "fake/real/2.png")])
def test_unclear_folders_are_refused_and_a_file_is_named(tmp_path, files, odd):
    said = refusal(save_all(tmp_path, files))
    assert str(tmp_path / odd) in said
    assert "rename or move it" in said


@pytest.mark.parametrize("files, layout, labels", [
    ("x/2.jpg; x/2_orig.jpg; x/ski_mask.jpg", "no labels", [None] * 3),
    ("au/1.jpg", "folders", [0]), ("tp/1.jpg", "folders", [1])])
def test_only_a_set_without_labels_is_a_problem(tmp_path, files, layout, labels):
    pictures, found, problems = data.read_set(save_all(tmp_path, files))
    assert [picture.label for picture in pictures] == labels
    assert found == layout
    none = ["no labels: in training, every picture counts as genuine"]
    assert problems == (none if layout == "no labels" else [])


def test_links_are_followed_loops_end_and_each_picture_counts_once(tmp_path):
    save_all(tmp_path, "elsewhere/au/1.png; elsewhere/au/deep/2.png; set/tp/3.png")
    root = tmp_path / "set"
    for link, target in (("au", tmp_path / "elsewhere/au"), ("tp/loop", root), ("tp/self", "self"),
                         ("again", "tp"), ("tp/0.png", "3.png"), ("au/4.png", "gone")):
        os.symlink(target, root / link)
    assert data.files_in(root) == [
        root / name for name in ("au/1.png", "au/4.png", "au/deep/2.png", "tp/3.png")]
    pictures, _, problems = data.read_set(root)
    assert labels_of(pictures) == {"au/1.png": 0, "deep/2.png": 0, "tp/3.png": 1}
    assert kinds_of(problems) == ["bad file"]                  # the link to nothing is named


def test_problems_are_named_and_an_unreadable_mask_leaves_its_picture_in_use(tmp_path):
    save_all(tmp_path, "au/1.jpg; tp/1.jpg; tp/1.png; mask/1.png; tp/2.jpg; tp/4.jpg; mask/4.png")
    cut = save(tmp_path / "tp/3.jpg")
    cut.write_bytes(cut.read_bytes()[:-900])
    for name in ("tp/bad.heic", "mask/2.png"):
        (tmp_path / name).write_text("no picture")
    pictures, _, problems = data.read_set(tmp_path)
    assert kinds_of(problems) == ["bad file", "bad file", "bad mask", *["no mask"] * 4]
    said = "\n".join(problems)
    assert re.search(f"bad file: {cut}: .*truncated", said)
    assert re.search(f"bad file: {tmp_path}/tp/bad.heic: cannot identify", said)
    assert [(p.path.name, p.label) for p in pictures] == [
        ("1.jpg", 0), ("1.jpg", 1), ("1.png", 1), ("2.jpg", 1), ("4.jpg", 1)]
    assert [p.mask for p in pictures] == [None] * 4 + [tmp_path / "mask/4.png"]    # 1: for two


def test_every_file_is_opened_once_and_masks_only_if_asked_for(tmp_path, monkeypatch):
    save_all(tmp_path, "au/1.jpg; tp/1.jpg; mask/1.png")
    opened = []
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda path: opened.append(path) or original(path))
    pictures, _, _ = data.read_set(tmp_path, masks=False)
    assert [picture.mask for picture in pictures] == [None, None]
    assert opened == [tmp_path / "au/1.jpg", tmp_path / "tp/1.jpg"]
    data.read_set(tmp_path)
    assert opened[2:] == [*opened[:2], tmp_path / "mask/1.png"]


def test_scenes_are_recognized_by_the_names_of_the_field(tmp_path):
    pictures, _, _ = data.read_set(save_all(
        tmp_path, "au/Au_ani_00001.jpg; tp/Tp_D_CRN_S_N_art00014_ani00001_11818.jpg; au/7.jpg; "
                  "tp/7t.jpg; au/031_O.png; tp/031_F.png; tp/x.jpg; tp/a\nb.jpg"))
    scenes = Counter(p.scene for p in pictures)
    assert scenes == {"ani00001": 2, "7": 2, "031": 2, "x": 1, "a\nb": 1}
    imd2020 = save_all(tmp_path / "imd2020", "1a/1a_orig.jpg; 1a/c8t.jpg; 1a/c8t_mask.png")
    assert [p.scene for p in data.read_set(imd2020)[0]] == ["1a", "1a"]


def numbered(labels, scenes):
    return [data.Picture(Path(f"{i}.png"), label, scene=str(scene))
            for i, (label, scene) in enumerate(zip(labels, scenes))]


def test_split_holds_out_about_the_fraction_of_each_class():
    alone = numbered([0] * 100 + [1] * 40, range(140))       # each is its own scene
    train, held_out = data.split(alone, 0.15, seed=0)
    assert Counter(p.label for p in held_out) == {0: 15, 1: 6}
    assert data.split(alone, 0.15, seed=0) == (train, held_out)
    assert data.split(alone, 0.15, seed=1)[1] != held_out
    mixed = numbered([0, 1] * 100, np.arange(200).clip(100) // 8)      # one large scene
    for seed in range(10):
        counts = Counter(p.label for p in data.split(mixed, 0.15, seed)[1])
        assert 10 <= counts[0] <= 22 and counts[0] == counts[1]


@pytest.mark.parametrize("fraction", [0.01, 0.15, 0.5, 0.9])
def test_split_keeps_scenes_together_and_both_classes_in_both_parts(fraction):
    rng = np.random.default_rng(0)
    for seed, n in enumerate(rng.integers(2, 20, 200)):
        pictures = numbered(rng.integers(0, 2, n).tolist(), rng.integers(0, 5, n))
        train, held_out = data.split(pictures, fraction, seed)
        assert sorted(train + held_out) == sorted(pictures)
        assert not {p.scene for p in train} & {p.scene for p in held_out}

        labels = {p.scene: set() for p in pictures}         # of each scene
        for picture in pictures:
            labels[picture.scene].add(picture.label)
        genuine, manipulated, mixed = map(list(labels.values()).count, ({0}, {1}, {0, 1}))
        both = {p.label for p in train} == {p.label for p in held_out} == {0, 1}
        assert both or mixed + min(genuine, manipulated) < 2                   # is impossible


def save_list(root, name, text):
    """A list beside three pictures and a mask -> its path."""
    save_all(root, "Tp/6.jpg; Au/8.jpg; Au/9.jpg; Gt/6.png")
    (root / name).write_text(text, encoding="utf-8")
    return root / name


@pytest.mark.parametrize("name, text", [
    ("benco.json", '[["Tp/6.jpg", "Gt/6.png"], ["Au/8.jpg", "Negative"]]'),
    ("x.csv", "\ufeffimage,label,mask\nTp/6.jpg,1,Gt/6.png\n\nAu/8.jpg,0,\n./Au/8.jpg,0,\n"),
    ("x.csv", " image , label ,mask \n Tp/6.jpg , 1 , Gt/6.png \n Au/8.jpg , 0 ,  \n")])
def test_lists(tmp_path, name, text):
    pictures, found, problems = data.read_set(save_list(tmp_path, name, text))
    assert labels_of(pictures) == {"Tp/6.jpg": 1, "Au/8.jpg": 0}
    assert [picture.mask for picture in pictures] == [tmp_path / "Gt/6.png", None]
    assert (found, problems) == ("list", [])


@pytest.mark.parametrize("name, text, expected", [
    ("x.csv", "image,label\nAu/8.jpg,0\nTp/6.jpg,real\n", "row 2 .*0 .genuine. or 1 .manipulated."),
    ("x.csv", "image;label;mask\nAu/8.jpg;0;\n", "image;label;mask.*header image,label,mask"),
    ("x.csv", "Au/8.jpg,0\nTp/6.jpg,1\n", "Au/8.jpg.*header image,label,mask"),
    ("x.csv", "image,label\nset/Au/8.jpg,0\n", "set/Au/8.jpg: No such file"),
    ("x.csv", "image,label\nAu/9.jpg,0\n./Au/9.jpg,1\n", "Au/9.jpg with labels 0 and 1"),
    ("x.txt", "Tp/6.jpg Gt/6.png 1\nAu/8.jpg None 0\n", "x.txt.*header image,label,mask"),
    ("x.json", '{"a": {"path": "Au/8.jpg", "label": 0}}', "x.json, which cannot be read"),
    ("x.json", "7", "x.json, which cannot be read")])
def test_a_broken_list_is_one_line_that_says_what_and_where(tmp_path, name, text, expected):
    assert re.search(expected, refusal(save_list(tmp_path, name, text)))


def training_set(pictures, seed=0, window=24):
    return data.TrainingSet(pictures, max_side=64, cell=8, window=window, seed=seed)


def test_a_training_item_is_a_window_of_the_view_mirrored_half_the_time(tmp_path):
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


def test_a_smaller_picture_is_padded_by_reflection(tmp_path):
    window, _ = training_set([data.Picture(save(tmp_path / "1.png"), 0)], window=90)[0]
    view = (255 * data.view(photo(), 64, 8)).round().byte()                  # (3, 48, 64)
    straight = window if torch.equal(window[:, :48, :64], view) else window.flip(2)
    assert torch.equal(straight[:, :48, :64], view)
    assert torch.equal(straight[:, 48:90, :64], view[:, 5:47].flip(1))


def test_randomness_is_seeded_by_seed_epoch_and_index_alone(tmp_path):
    pictures = [data.Picture(save(tmp_path / f"{i}.png", photo(i)), i % 2) for i in range(4)]
    items = training_set(pictures)
    first = torch.stack([items[i][0] for i in range(4)])                     # (4, 3, 24, 24)
    loader = torch.utils.data.DataLoader(items, batch_size=4, num_workers=2)
    images, labels = next(iter(loader))
    assert torch.equal(images, first)
    assert labels.tolist() == [0, 1, 0, 1]
    assert not torch.equal(items[2 + 4][0], first[2])
    assert not torch.equal(training_set(pictures, seed=1)[2][0], first[2])
    items.epoch = 1
    assert not torch.equal(items[2][0], first[2])


def test_the_command_says_what_is_there_and_what_is_wrong(tmp_path, capsys):
    save_all(tmp_path, "au/1.jpg; tp/1.jpg; mask/1.png")
    assert data.main([str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "folders; 1 genuine, 1 manipulated, 0 without label, 1 masks\nnothing wrong" in said
    (tmp_path / "tp/bad.jpg").write_text("no picture")
    assert data.main([str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert re.search("1 masks\nno mask of its own: .*\nbad file: .*bad.jpg: ", said)

    (tmp_path / "empty").mkdir()
    for words in ("nowhere", str(tmp_path / "au/1.jpg"), str(tmp_path / "empty")):
        assert data.main([words]) == 2
        assert re.fullmatch("error: found .{,500}: check .*\n", capsys.readouterr().err)
    with pytest.raises(SystemExit, match="2"):
        data.main(["x", "--leaks"])


def test_the_lesson_shows_a_trace_that_resampling_erases(capsys):
    data.demo()
    said = capsys.readouterr().out
    native, reduced = re.findall(r"max_side \d+: (\S+)\n", said)
    assert float(native) > 1.5
    assert float(reduced) == pytest.approx(1, abs=0.1)
