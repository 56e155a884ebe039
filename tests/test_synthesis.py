"""Manipulated pictures made from genuine photos: `weights/synthesis.py`."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import mini
from weights import synthesis

ROOT = Path(__file__).resolve().parents[1]


def arrays(count):
    return [np.asarray(mini.photo(160, 120, seed)) for seed in range(count)]


def difference(one, two):
    """Two PIL RGB images -> how far each pixel is off, (H, W)."""
    levels = np.asarray(one).astype(int) - np.asarray(two)                     # (H, W, 3)
    return np.abs(levels).mean(axis=2)                                         # (H, W)


# ------------------------------------------------------------------------- a manipulated picture

@pytest.mark.parametrize("kind", [*synthesis.KINDS, None])
def test_nothing_changes_outside_the_region_and_inside_it_shows(kind):
    for seed in range(12):
        photo = mini.photo(90, 70, seed)
        donor = mini.photo(64, 50, seed + 50)
        made = synthesis.synthesize(photo, donor, np.random.default_rng(seed), kind)
        assert made.image.size == made.region.size == photo.size
        assert (made.image.mode, made.region.mode) == ("RGB", "L")
        assert set(np.unique(made.region)) == {0, 255}
        region = np.asarray(made.region) == 255                                # (H, W)
        assert 0.01 <= region.mean() <= 0.5
        changed = difference(made.image, photo)                                # (H, W)
        assert not changed[~region].any()
        assert changed[region].mean() > 2
        assert made.kind in synthesis.KINDS and kind in (made.kind, None)


def test_equal_chance_makes_the_same_picture():
    photo = mini.photo(90, 70)
    donor = mini.photo(90, 70, 1)
    made = [synthesis.synthesize(photo, donor, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert made[0] == made[1]
    assert made[0] != made[2]


@pytest.mark.parametrize("kind", synthesis.KINDS)
@pytest.mark.parametrize("level", [0, 128, 255])
def test_a_flat_picture_is_changed_visibly(kind, level):
    flat = Image.new("RGB", (64, 64), (level, level, level))
    for seed in range(3):
        made = synthesis.synthesize(flat, flat, np.random.default_rng(seed), kind)
        region = np.asarray(made.region) == 255
        changed = difference(made.image, flat)
        assert region.any() and not region.all()
        assert changed[region].mean() > 2
        assert not changed[~region].any()


@pytest.mark.parametrize("size", [(5, 5), (16, 200), (200, 16), (33, 21)])
def test_photos_of_any_size(size):
    for seed in range(8):
        photo = mini.photo(*size, seed)
        made = synthesis.synthesize(photo, mini.photo(40, 40, seed), np.random.default_rng(seed))
        assert made.image.size == size


def test_the_fill_continues_its_surroundings():
    ramp = np.linspace(40, 200, 160)[None].repeat(120, axis=0)                 # (H, W)
    ramp = ramp[..., None].repeat(3, axis=2).astype(np.uint8)                  # (H, W, 3)
    hole = np.zeros((120, 160), np.uint8)
    hole[40:80, 60:100] = 255
    holed = ramp.copy()
    holed[hole == 255] = 255
    filled = np.asarray(synthesis.fill(Image.fromarray(holed), Image.fromarray(hole)))
    assert np.abs(filled.astype(int) - ramp).max() < 40      # not the 255 of the hole
    assert np.array_equal(filled[hole == 0], ramp[hole == 0])


def test_a_stamp_has_no_rim():
    """Scaled and rotated, one colour stays one colour up to the outline."""
    flat = Image.new("RGB", (96, 96), (150, 150, 150))
    seen = set()
    for seed in range(16):
        words = []
        rng = np.random.default_rng(seed)
        stamp = synthesis.make_stamp(flat, flat, "copy-move", rng, words)
        seen.update(words)
        colour = np.asarray(stamp.convert("RGB")).astype(int)                  # (h, w, 3)
        inside = np.asarray(stamp.getchannel("A")) >= 128                      # (h, w)
        assert np.abs(colour[inside] - 150).max() <= 1
    assert seen == {"enlarged", "reduced", "rotated"}


# -------------------------------------------------------------------------------- training pairs

def test_no_place_is_likelier_than_another():
    pairs = synthesis.PairSet(arrays(6), size=32, count=0, seed=3)
    total = np.zeros((32, 32))
    for number in range(700):
        _, region, _ = pairs.make(number, 1)
        total += np.asarray(region) / 255                                      # (32, 32)
    blocks = total.reshape(4, 8, 4, 8).mean(axis=(1, 3))                       # (4, 4)
    assert blocks.min() > 0.65 * blocks.max()
    middle = total[8:24, 8:24]
    frame = total.sum() - middle.sum()
    assert middle.mean() < 1.3 * frame / (32 * 32 - 16 * 16)


def test_all_kinds_are_made_about_as_often_as_they_should():
    pairs = synthesis.PairSet(arrays(4), size=32, count=0, seed=0)
    kinds = []
    for number in range(300):
        _, _, words = pairs.make(number, 1)
        kinds.append(words[0])
    for kind, share in synthesis.KINDS.items():
        assert kinds.count(kind) / len(kinds) == pytest.approx(share, abs=0.08)


def test_items_are_pairs_and_always_the_same():
    photos = arrays(5)
    first = synthesis.PairSet(photos, size=32, count=24, seed=1)
    again = synthesis.PairSet(photos, size=32, count=24, seed=1)
    assert len(first) == 24
    assert first.labels == [0, 1] * 12
    for i in (3, 0, 17):                                     # in any order
        image, label, index = first[i]
        assert image.shape == (3, 32, 32)
        assert 0 <= image.min() and image.max() <= 1
        assert (label, index) == (i % 2, i)
        assert torch.equal(image, again[i][0])
    other = synthesis.PairSet(photos, size=32, count=24, seed=2)
    assert not torch.equal(other[0][0], first[0][0])


def test_items_are_new_each_epoch():
    pairs = synthesis.PairSet(arrays(5), size=32, count=4, seed=1)
    before = pairs[0][0]
    pairs.epoch = 1
    assert not torch.equal(before, pairs[0][0])
    pairs.epoch = 0
    assert torch.equal(before, pairs[0][0])


def test_both_of_a_pair_are_degraded_alike():
    """Where nothing was changed they differ by no more than what blur and JPEG carry over."""
    pairs = synthesis.PairSet(arrays(5), size=64, count=0, seed=1)
    for number in range(8):
        original, nothing, no_words = pairs.make(number, 0)
        changed, region, words = pairs.make(number, 1)
        assert np.asarray(nothing).max() == 0 and no_words == []
        assert words[0] in synthesis.KINDS
        levels = difference(original, changed)                                 # (64, 64)
        inside = np.asarray(region) == 255
        assert levels[inside].mean() > 4 * levels[~inside].mean()


def test_workers_change_nothing(tmp_path):
    paths = []
    for seed in range(4):
        paths.append(tmp_path / f"{seed}.png")
        mini.photo(160, 120, seed).save(paths[-1])
    found = []
    for workers in (0, 2):
        pairs = synthesis.PairSet(paths, size=32, count=8, seed=1)
        loader = torch.utils.data.DataLoader(pairs, batch_size=4, num_workers=workers)
        found.append(torch.cat([images for images, _, _ in loader]))
    assert torch.equal(found[0], found[1])


# ----------------------------------------------------------------------------------- the command

@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of four genuine photos."""
    folder = tmp_path_factory.mktemp("photos")
    for seed in range(4):
        mini.photo(160, 120, seed).save(folder / f"{seed}.jpg")
    return folder


def contents(folder):
    """{path below a folder: bytes}"""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_the_command_makes_a_set_and_the_same_again(photos, tmp_path, capsys):
    one = tmp_path / "one"
    two = tmp_path / "two"
    words = [str(photos), "--count", "2", "--size", "64", "--seed", "5"]
    preview = tmp_path / "p.png"
    assert synthesis.main([*words, "--out", str(one), "--preview", str(preview)]) == 0
    assert "2 pairs" in capsys.readouterr().out
    assert set(contents(one)) == {
        "au/000000.png", "au/000001.png", "tp/000000.png", "tp/000001.png",
        "mask/000000.png", "mask/000001.png", "list.csv"}
    assert Image.open(preview).width > 300

    script = ROOT / "weights/synthesis.py"                   # as a user types it
    call = subprocess.run([sys.executable, script, *words, "--out", two], cwd=tmp_path,
                          capture_output=True, text=True, timeout=300)
    assert call.returncode == 0, call.stderr
    assert contents(two) == contents(one)


def test_what_the_command_makes_is_a_set_without_problems(photos, tmp_path):
    out = tmp_path / "set"
    assert synthesis.main([str(photos), "--count", "3", "--size", "64", "--out", str(out)]) == 0
    for path in (out, out / "list.csv"):
        pictures, report = data.read_set(path, decode=True)
        assert report.problems == []
        labels = [picture.label for picture in pictures]
        assert (labels.count(0), labels.count(1)) == (3, 3)
        for picture in pictures:
            assert data.picture_size(picture.path)[0] == (64, 64)
            assert evaluate.read_mask(picture).any() == (picture.label == 1)


def test_manipulated_pictures_are_not_taken_for_photos(photos, tmp_path, capsys):
    """Of a labelled set only the genuine ones; of a set without them none: a wrong call."""
    mini.photo(160, 120).save(tmp_path / "a.png")
    text = "image,label\na.png,1\n"
    (tmp_path / "list.csv").write_text(text)
    out = tmp_path / "out"
    assert synthesis.main([str(tmp_path / "list.csv"), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert "genuine" in said
    assert not out.exists()


def test_wrong_calls_exit_2_with_one_line(photos, tmp_path, capsys):
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    new = str(tmp_path / "new")
    picture = str(photos / "0.jpg")
    calls = {
        "--count -3": [str(photos), "--out", new, "--count", "-3"],
        "--count 0": [str(photos), "--out", new, "--count", "0"],
        "--size 7": [str(photos), "--out", new, "--size", "7"],
        "something at": [str(photos), "--out", str(full)],
        "notes.txt": [str(photos), "--out", str(full / "notes.txt")],
        "nowhere": [str(tmp_path / "nowhere"), "--out", new],
        "found a picture": [picture, "--out", new],
    }
    for expected, words in calls.items():
        assert synthesis.main(words) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: found ") and said.count("\n") == 1
        assert expected in said
    assert contents(full) == {"notes.txt": b"mine"}
    assert not Path(new).exists()
    for words in ([str(photos)], [str(photos), "--out", new, "--cuont", "3"]):
        with pytest.raises(SystemExit) as stop:
            synthesis.main(words)
        assert stop.value.code == 2
