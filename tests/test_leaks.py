"""Trivial cues that reveal the class are found, and only those."""
import re

import numpy as np
import pytest
from PIL import Image

import leaks
import mini


@pytest.fixture
def sets(tmp_path):
    """Two sets of 40 pictures: leaky, whose classes differ in JPEG quality, and fair."""
    qualities = {"leaky/au": 90, "leaky/tp": 70, "fair/au": 90, "fair/tp": 90}
    for seed, (name, quality) in enumerate(qualities.items()):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        for i in range(20):
            mini.photo(64, 64, 50 * seed + i).save(folder / f"{i}.jpg", quality=quality)
    return tmp_path


def test_accuracy_of_guessing_labels():
    labels = [0, 1] * 200
    rng = np.random.default_rng(0)
    assert leaks.accuracy_from(labels, labels) == 1
    assert leaks.accuracy_from([7] * 400, labels) == 0.5
    unrelated = rng.integers(0, 4, 400).tolist()
    assert leaks.accuracy_from(unrelated, labels) == pytest.approx(0.5, abs=0.07)
    assert leaks.accuracy_from(list(range(400)), labels) == 0.5     # no value twice: no guess


def test_leaks_are_found_and_absent(sets, capsys):
    assert leaks.main([str(sets / "leaky")]) == 1
    said = capsys.readouterr().out
    assert re.search("JPEG tables +reveals the class with balanced accuracy 1.00 .*: leak\n", said)
    assert re.search("size +reveals the class with balanced accuracy 0.50 [^:]*\n", said)
    assert leaks.main([str(sets / "fair")]) == 0
    assert "leak" not in capsys.readouterr().out


def test_the_preview_shows_pictures_and_masks(sets):
    fair = sets / "fair"
    (fair / "mask").mkdir()
    Image.new("L", (64, 64), 255).save(fair / "mask/3.png")
    png = sets / "sheet.png"
    assert leaks.main([str(fair), "--preview", str(png)]) == 0
    sheet = np.asarray(Image.open(png))
    assert sheet.shape == (7 * 144, 3 * 264, 3)              # 20 of the 40, three a row
    assert (sheet[:128, :128] != 255).any()                  # the first picture


def test_wrong_calls_exit_2_with_one_line(sets, capsys):
    mini.photo(64, 64).save(sets / "fair/au/only.png")
    nowhere = str(sets / "no/such/folder.png")
    for words in ([nowhere], [str(sets / "fair/au")], [str(sets / "fair"), "--preview", nowhere]):
        assert leaks.main(words) == 2
        assert re.fullmatch("error: .*\n", capsys.readouterr().err)
