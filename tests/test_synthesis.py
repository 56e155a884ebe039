"""The generator of manipulated pictures, weights/synthesis.py, beside Pillow and as a command."""
import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

import data
import mini
from weights import synthesis


def some(count=6, side=72):
    """Different pictures, as PIL images and as (n, 3, S, S)."""
    images = [mini.photo(side, side, seed=i) for i in range(count)]
    return images, batch_of(images)


def batch_of(images):
    return torch.stack([255 * data.to_tensor(image) for image in images]).round()


def largest_mean(found, expected):
    """The mean absolute difference, in grey levels, of the pictures that differ most."""
    difference = synthesis.rounded(found) - batch_of(expected)
    return difference.abs().mean(dim=(1, 2, 3)).max().item()


def changed(images, others):
    """Which images differ, (n,) bool."""
    return (images != others).flatten(1).any(dim=1)


def generator(seed):
    torch.manual_seed(seed)
    return np.random.default_rng(seed)


def pillow_jpeg(image, quality, y, x, subsampling):
    padded = np.pad(image, ((y, 0), (x, 0), (0, 0)), mode="edge")
    buffer = io.BytesIO()
    Image.fromarray(padded).save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    decoded = Image.open(buffer).convert("RGB")
    return decoded.crop((x, y, *decoded.size))


@pytest.mark.parametrize("side, shift, subsampled", [
    (72, (0, 0), False), (75, (3, 6), False), (72, (0, 0), True), (75, (3, 6), True)])
def test_jpeg_is_within_a_grey_level_of_pillow(side, shift, subsampled):
    images, batch = some(side=side)
    quality = [95, 80, 70, 50, 30, 5]
    found = synthesis.jpeg(batch, np.array(quality), shift, subsampled)
    expected = [pillow_jpeg(image, q, *shift, 2 * subsampled)        # 0: 4:4:4, 2: 4:2:0
                for image, q in zip(images, quality)]
    assert largest_mean(found, expected) < 0.8
    assert largest_mean(batch, expected) > 3                     # what compression changes


def test_blur_and_resampling_are_those_of_pillow():
    images, batch = some(3)
    found = synthesis.blur(batch, np.array([0.7, 1.5, 3.0]))
    inner = [image.filter(ImageFilter.GaussianBlur(sigma)).crop((9, 9, 63, 63))
             for image, sigma in zip(images, (0.7, 1.5, 3.0))]   # Pillow repeats the border
    assert largest_mean(found[:, :, 9:63, 9:63], inner) < 1

    small = round(72 / 2 ** np.random.default_rng(4).uniform(0.2, 1.2))
    found = synthesis.rescale(batch, np.random.default_rng(4))
    expected = [image.resize((small, small), Image.Resampling.BICUBIC) for image in images]
    expected = [image.resize((72, 72), Image.Resampling.BICUBIC) for image in expected]
    assert 31 < small < 64
    assert largest_mean(found, expected) < 0.5


@pytest.mark.parametrize("name", synthesis.EDITS)
def test_an_edit_changes_only_the_chosen_images(name):
    _, batch = some(4)
    before = batch.clone()
    chosen = np.array([True, False, True, False])
    strength = synthesis.column([0.3, 0.5, 0.9, 0.5], batch)
    synthesis.apply(synthesis.EDITS[name], batch, chosen, strength)
    assert torch.equal(batch[[1, 3]], before[[1, 3]])
    assert (batch[[0, 2]] - before[[0, 2]]).abs().mean(dim=(1, 2, 3)).min() > 0.1
    assert torch.equal(batch, synthesis.rounded(batch))


def stamps(factor=1, angle=0):
    """Two stamps of 30 x 20 pixels, the second one mirrored."""
    both = [[25, 30, 30, 20, sign, factor, angle, 41, 22] for sign in (1, -1)]
    return synthesis.Stamps(*np.array(both).T)


def test_an_unscaled_stamp_is_an_exact_copy():
    source = torch.randint(0, 256, (2, 3, 72, 72)).float()
    layer, region = synthesis.stamped(source, stamps(), generator(0))
    for number in range(2):
        rows, columns = region[number, 0].nonzero(as_tuple=True)
        assert rows.min() >= 26 and rows.max() < 56 and len(rows) > 100
        own = columns + 8 if number == 0 else 51 - columns       # the mirror lies in the middle
        assert torch.equal(layer[number][:, rows, columns], source[number][:, rows - 16, own])


def test_a_scaled_and_rotated_stamp_turns_about_its_centre_without_a_rim():
    source = torch.zeros(2, 3, 72, 72)
    source[:, :, 24:26, 20:40] = 255                             # a horizontal bar
    layer, _ = synthesis.stamped(source, stamps(angle=np.pi / 2), generator(1))
    assert layer[0, 0, 34:48, 21:23].min() > 200                 # is a vertical one
    assert layer[0, 0, 34:48, :19].max() < 60

    flat = torch.full((2, 3, 72, 72), 150.0)
    layer, region = synthesis.stamped(flat, stamps(factor=1.3, angle=0.7), generator(1))
    assert region.mean() > 0.02
    assert ((layer - 150).abs() * region).max() == 0


def test_fill_keeps_what_is_known_and_continues_it():
    ramp = torch.linspace(40, 200, 64).expand(1, 3, 64, 64)
    region = torch.zeros(1, 1, 64, 64)
    region[:, :, 15:40, 20:45] = 1
    spoiled = torch.where(region > 0, 255.0, ramp)
    filled = torch.stack([synthesis.fill(spoiled, region)[0] for _ in range(30)]).mean(dim=0)
    assert torch.allclose(filled * (1 - region[0]), ramp[0] * (1 - region[0]), atol=1e-3)
    assert ((filled - ramp[0]) * region[0]).abs().max() < 45     # not the 255 of the hole


@pytest.mark.parametrize("kind", [*synthesis.KINDS, None])
def test_nothing_changes_outside_the_region_and_inside_it_shows(kind):
    _, images = some(48, 64)
    photo, donor = images.split(24)
    before = images.clone()
    made = synthesis.splice(photo, donor, generator(3), kind)
    assert torch.equal(images, before)                           # the inputs are left alone
    assert made.image.shape == photo.shape and made.region.shape == (24, 64, 64)
    assert torch.equal(made.image, synthesis.rounded(made.image))
    assert set(made.region.unique().tolist()) == {0, 1}
    change = (made.image - photo).abs()
    assert (change.amax(dim=1)[made.region == 0] == 0).all()

    assert made.seen.float().mean() > 0.5
    share = made.region[made.seen].mean(dim=(1, 2))
    assert share.min() >= 0.01 and share.max() <= 0.5
    assert (change[made.seen].mean(dim=(1, 2, 3)) / share).min() > 3             # inside
    assert kind is None or made.kind == [kind] * 24
    assert kind != "local edit" or {own[0] for own in made.words} <= set(synthesis.EDITS)


def test_kinds_come_as_often_as_stated_and_all_places_alike():
    photo = torch.randint(0, 256, (1000, 3, 32, 32)).float()
    made = synthesis.splice(photo, photo.flip(0), generator(0))
    for kind, share in synthesis.KINDS.items():
        assert made.kind.count(kind) / 1000 == pytest.approx(share, abs=0.05)
    assert made.seen.float().mean() > 0.7
    total = made.region[made.seen].sum(dim=0)                                  # (32, 32)
    blocks = total.view(4, 8, 4, 8).mean(dim=(1, 3))                           # (4, 4)
    assert blocks.min() > 0.6 * blocks.max()


def test_the_same_seeds_make_the_same_pictures_and_what_is_invisible_is_marked():
    _, images = some(8, 48)
    made = [synthesis.splice(images, images.flip(0), generator(seed)) for seed in (5, 5, 6)]
    assert torch.equal(made[0].image, made[1].image)
    assert (made[0].kind, made[0].words) == (made[1].kind, made[1].words)
    assert not torch.equal(made[0].image, made[2].image)
    flat = torch.full((8, 3, 64, 64), 128.0)
    assert not synthesis.splice(flat, flat, generator(0), "copy-move").seen.any()    # invisible


def test_wear_leaves_half_of_the_pictures_whatever_they_show():
    """Equal pictures stay equal but for noise, and others are treated at the same places."""
    _, images = some(60, 48)
    before = images.clone()
    worn = synthesis.wear(images, np.random.default_rng(2))
    assert torch.equal(images, before)
    assert worn.shape == images.shape and torch.equal(worn, synthesis.rounded(worn))
    assert 0.3 < changed(worn, images).float().mean() < 0.6

    again = synthesis.wear(images, np.random.default_rng(2))
    assert 0 < changed(worn, again).float().mean() < 0.3         # these are noisy
    assert (worn - again).abs().max() < 60
    other = synthesis.wear(images.flip(0), np.random.default_rng(2))
    assert torch.equal(changed(worn, images), changed(other, images.flip(0)))
    older = synthesis.older_jpeg(images, np.random.default_rng(1))
    assert 0.25 < changed(older, images).float().mean() < 0.55


def test_the_command_makes_a_set_and_the_same_again(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed, side in enumerate((40, 160, 160)):                 # one is smaller than the windows
        mini.photo(side, 120, seed).save(folder / f"{seed}.jpg")
    words = [str(folder), "--count", "3", "--size", "64", "--seed", "5", "--out"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert synthesis.main([*words, str(one)]) == 0
    script = synthesis.__file__                                  # as a user types it
    call = subprocess.run([sys.executable, script, *words, two], cwd=tmp_path, capture_output=True,
                          text=True, timeout=300)
    assert call.returncode == 0 and "3 pairs" in call.stdout, call.stderr
    names = [f"{name}/00000{i}.png" for name in ("au", "mask", "tp") for i in range(3)]
    files = [path for path in sorted(one.rglob("*")) if path.is_file()]
    assert [path.relative_to(one).as_posix() for path in files] == sorted([*names, "list.csv"])
    assert all(path.read_bytes() == (two / path.relative_to(one)).read_bytes() for path in files)

    for path in (one, one / "list.csv"):
        pictures, _, problems = data.read_set(path)
        assert problems == []
        assert sorted(picture.label for picture in pictures) == [0, 0, 0, 1, 1, 1]
        masks = [Image.open(picture.mask) for picture in pictures if picture.label]
        assert all(set(np.unique(mask)) == {0, 255} and mask.size == (64, 64) for mask in masks)


def test_wrong_calls_exit_2_with_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    mini.photo(160, 120).save("a.png")
    (tmp_path / "list.csv").write_text("image,label\na.png,1\n")
    calls = {"only manipulated": "list.csv --out new", "--count 0": ". --out new --count 0",
             "--size 7": ". --out new --size 7", "something at .": ". --out .",
             "something at a.png": ". --out a.png", "nowhere": "nowhere --out new"}
    for expected, words in calls.items():
        assert synthesis.main(words.split()) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: found ") and said.count("\n") == 1
        assert expected in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "list.csv"]
    with pytest.raises(SystemExit, match="2"):
        synthesis.main(". --out new --cuont 3".split())
