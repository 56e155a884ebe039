"""Trivial cues that tell the class are found, and only those."""
import re

import numpy as np
import pytest
from PIL import Image

import leaks
import mini


@pytest.fixture
def sets(tmp_path):
    """Two sets of 40 pictures: leaky, whose classes differ in JPEG quality, and fair."""
    for i in range(20):
        for folder, seed in (("au", i), ("tp", i + 50)):
            for name, quality in (("leaky", {"au": 90, "tp": 70}[folder]), ("fair", 90)):
                path = tmp_path / name / folder / f"{i}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                mini.photo(64, 64, seed).save(path, quality=quality)
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
    assert re.search("JPEG tables +tells the class with balanced accuracy 1.00 .*: leak\n", said)
    assert re.search("size +tells the class with balanced accuracy 0.50 [^:]*\n", said)
    assert leaks.main([str(sets / "fair")]) == 0
    assert "leak" not in capsys.readouterr().out


def test_the_preview_shows_pictures_and_masks(sets):
    (sets / "fair/mask").mkdir()
    Image.new("L", (64, 64), 255).save(sets / "fair/mask/3.png")
    assert leaks.main([str(sets / "fair"), "--preview", str(sets / "sheet.png")]) == 0
    sheet = np.asarray(Image.open(sets / "sheet.png"))
    assert sheet.shape == (7 * 144, 3 * 264, 3)              # 20 of the 40, three a row
    assert (sheet[:128, :128] != 255).any()                  # the first picture


def test_wrong_calls_exit_2_with_one_line(sets, capsys):
    mini.photo(64, 64).save(sets / "fair/au/only.png")
    for words in (["nowhere"], [str(sets / "fair/au")],
                  [str(sets / "fair"), "--preview", str(sets / "no/such/folder.png")]):
        assert leaks.main(words) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1
