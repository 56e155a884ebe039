"""Metrics against brute force and by hand, the traps of public evaluation code, the command."""
import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageChops

import data
import ecpl
import evaluate
import infer
import scene
from mini import photo

ROOT = Path(__file__).resolve().parents[1]
PIXEL = [name for name in evaluate.PIXEL_METRICS if name != "fp_area"]
IMAGE = [name for name in evaluate.IMAGE_METRICS if name != "comb_f1"]


def brute_auc(values, truth):
    """All pairs of a positive and a negative."""
    positives = values[truth][:, None]
    negatives = values[~truth]
    return np.mean((positives > negatives) + 0.5 * (positives == negatives))


def brute_f1(flags, truth):
    TP = (flags & truth).sum()
    wrong = (flags ^ truth).sum()
    return 2 * TP / (2 * TP + wrong) if TP else 0.0


@pytest.mark.parametrize("levels", [3, 20, 10 ** 6])
def test_pixel_scores_equal_brute_force(levels):
    rng = np.random.default_rng(levels)
    for _ in range(8):
        map = (rng.integers(0, levels + 1, (7, 9)) / levels).astype(np.float32)
        truth = rng.random((7, 9)) < rng.uniform(0.1, 0.9)
        flags = map > 0.5
        scores = evaluate.pixel_scores(map, truth, threshold=0.3)
        TP = (flags & truth).sum()
        exact = map.astype(np.float64)
        expected = {
            "TP": TP, "FP": (flags & ~truth).sum(), "FN": (~flags & truth).sum(),
            "f1": brute_f1(flags, truth), "f1_at_7": brute_f1(map > 0.3, truth),
            "iou": TP / (flags | truth).sum(), "precision": TP / max(1, flags.sum()),
            "recall": TP / truth.sum(), "auc": brute_auc(map, truth),
            "f1_best": max(brute_f1(exact > t, truth) for t in (0, *exact.ravel()) if t < 1)}
        assert {name: scores[name] for name in expected} == pytest.approx(expected)
        grid = [brute_f1(exact > k / 100, truth) for k in range(1, 100)]
        assert scores["f1_on_grid"] == pytest.approx(grid)


def test_maps_whose_scores_are_known():
    truth = np.zeros((8, 8), bool)
    truth[2:5, 3:7] = True
    perfect = evaluate.pixel_scores(truth.astype(np.float32), truth)
    blank = evaluate.pixel_scores(np.zeros((8, 8)), truth)
    for name in ("f1", "iou", "precision", "recall", "f1_best"):
        assert (perfect[name], blank[name]) == (1.0, 0.0)
    assert perfect["auc"] == 1.0
    full = evaluate.pixel_scores(np.ones((8, 8)), np.ones((8, 8), bool))
    assert (full["auc"], full["f1"]) == (None, 1.0)
    genuine = evaluate.pixel_scores(np.ones((8, 8)), np.zeros((8, 8), bool))
    assert "f1" not in genuine and genuine["fp_area"] == 1.0
    # a constant map; the threshold is strict, and nothing is rounded to 8 bits (127.47 / 255)
    for value, recall in ((0.0, 0.0), (0.4999, 0.0), (0.5, 0.0), (0.5001, 1.0), (1.0, 1.0)):
        scores = evaluate.pixel_scores(np.full((8, 8), value), truth)
        assert (scores["auc"], scores["recall"]) == (0.5, recall)
    assert evaluate.image_summary([0.5, 0.5001], [1, 1])["image_sen"] == 0.5


def test_one_threshold_for_the_set():
    truth = np.array([[True, True, False, False]])
    low = evaluate.pixel_scores(np.array([[0.3, 0.2, 0.1, 0.1]]), truth)         # best: 0.1 .. 0.2
    high = evaluate.pixel_scores(np.array([[0.9, 0.95, 0.85, 0.1]]), truth)      # best: above 0.85
    summary = evaluate.pixel_summary([low, high])
    assert summary["pixel_f1_best_global"] == pytest.approx((1 + 0.8) / 2)       # 0.1 .. 0.2


def test_the_threshold_that_marks_7_percent_of_genuine_pixels():
    rng = np.random.default_rng(0)
    large = rng.random((200, 300)).astype(np.float32) ** 2
    small = rng.random((20, 30)).astype(np.float32) / 2
    found = [evaluate.pixel_scores(map, np.zeros(map.shape, bool)) for map in (large, small)]
    threshold = evaluate.genuine_threshold(found)
    shares = [(map > threshold).mean() for map in (large, small)]
    assert np.mean(shares) == pytest.approx(0.07, abs=0.005)         # a small picture counts fully
    without = evaluate.pixel_scores(large, large > 0.9, evaluate.genuine_threshold([]))
    assert evaluate.pixel_summary([without])["pixel_f1_at_7"] is None


def test_image_metrics():
    assert evaluate.image_summary([0.9, 0.6, 0.5, 0.4, 0.6], [1, 1, 1, 0, 0]) == pytest.approx({
        "image_sen": 2 / 3, "image_spe": 1 / 2, "image_acc": 3 / 5, "image_f1": 4 / 6,
        "image_f1_hm": 2 * (2 / 3) * 0.5 / (2 / 3 + 0.5), "image_auc": (2 + 1.5 + 1) / 6})
    assert evaluate.image_summary([0.1, 0.9], [1, 0])["image_f1_hm"] == 0.0      # all wrong
    # null where a class is missing
    positives = evaluate.image_summary([0.9, 0.1], [1, 1])
    assert {name for name in IMAGE if positives[name] is None} == {
        "image_auc", "image_spe", "image_f1_hm"}
    negatives = evaluate.image_summary([0.1, 0.2], [0, 0])
    assert {name for name in IMAGE if negatives[name] is not None} == {"image_acc", "image_spe"}


def test_intervals():
    values = np.random.default_rng(0).normal(size=1600)
    expected = pytest.approx([-1.96 / 40, 1.96 / 40], abs=0.01)      # 40: the root of 1600
    assert evaluate.interval(np.mean, values - values.mean()) == expected
    labels = np.arange(200) % 2
    assert evaluate.interval(evaluate.rank_auc, labels, labels) == [1.0, 1.0]
    assert evaluate.interval(np.mean, [0.7]) is None


def test_baselines():
    image = photo(40, 24)
    maps = evaluate.baselines(image)
    assert np.array_equal(maps["all_ones"], np.ones((24, 40)))
    assert np.array_equal(maps["edge"], ecpl.soft_edges(data.to_tensor(image)[None])[0, 0])
    for y, x in ((12, 0), (0, 20)):                                  # two sigmas from the centre
        assert maps["centre"][y, x] == pytest.approx(np.exp(-2), rel=0.01)


def test_attacks():
    image = photo(160, 120)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=70, subsampling="4:2:0")
    assert np.array_equal(evaluate.apply_attack(image, "jpeg:70"), Image.open(file))

    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    noisy = np.asarray(evaluate.apply_attack(grey, "noise:11"), dtype=float)
    assert noisy.var() == pytest.approx(11, rel=0.05)
    assert np.array_equal(noisy, evaluate.apply_attack(grey, "noise:11"))        # always the same
    dot = Image.new("RGB", (31, 31))
    dot.putpixel((15, 15), (255, 255, 255))
    blurred = np.asarray(evaluate.apply_attack(dot, "blur:11"), dtype=float)[:, :, 0]
    variance = (blurred * (np.arange(31) - 15) ** 2).sum() / blurred.sum()
    assert variance == pytest.approx(2.0 ** 2, rel=0.3)              # of OpenCV for 11: sigma 2

    assert evaluate.apply_attack(image, "size:50").size == (80, 60)
    attacked = [evaluate.apply_attack(image, spec).tobytes() for spec in evaluate.ATTACKS]
    assert len({image.tobytes(), *attacked}) == 20
    for spec in ("jpeg", "jpeg:0", "jpeg:101", "blur:x", "blur:-3", "rain:3", "jpeg:70.5", ""):
        with pytest.raises(ValueError, match="expected jpeg:QUALITY"):
            evaluate.apply_attack(image, spec)


def red_picture(value, first=16, last=48):
    """64 x 64 pixels, black but for a red square of a brightness."""
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[first:last, first:last, 0] = value
    return Image.fromarray(picture)


def make_set(root, red=255):
    """A folder: 5 black genuine pictures, 4 with a red square and its mask."""
    for names, count, value in (("au/a", 5, 0), ("tp/t", 4, red), ("mask/t", 4, 255)):
        (root / names).parent.mkdir(parents=True)
        for i in range(count):
            red_picture(value).save(f"{root}/{names}{i}.png")
    return root


@pytest.fixture
def seen(monkeypatch):
    """infer stands for a model that is always right: its map is the red of what it is given."""
    pictures = []

    def localize(model, picture):
        pictures.append(picture)
        map = np.asarray(picture, dtype=np.float32)[:, :, 0] / 255               # (H, W)
        return infer.Result(map, map > 0.5, float(map.max()), "not asked for", 0.0)

    monkeypatch.setattr(infer, "load", lambda *arguments, **more: None)
    monkeypatch.setattr(infer, "localize", localize)
    return pictures


@pytest.fixture
def red_set(tmp_path, seen):
    return make_set(tmp_path / "set")


def summary_of(folder):
    return evaluate.evaluate(None, data.read_set(folder)[0])


def test_a_perfect_model_scores_one_on_a_half_genuine_set(red_set, seen):
    summary, rows = summary_of(red_set)
    assert summary["n"] == len(rows) == len(seen) == 9               # no last batch is dropped
    for name in (*PIXEL, *IMAGE, "comb_f1"):
        assert summary[name] == 1.0
    assert summary["fp_area"] == 0.0
    # the baselines, on the same pictures
    share = 32 * 32 / 64 / 64
    ones = summary["baselines"]["all_ones"]
    assert ones["pixel_f1"] == pytest.approx(2 * share / (1 + share))
    assert (ones["pixel_auc"], ones["fp_area"]) == (0.5, 1.0)
    assert summary["baselines"]["centre"]["pixel_auc"] > 0.9         # the square is in the middle
    assert summary["baselines"]["edge"]["fp_area"] == 0.0            # black pictures have no edges


def test_a_weak_map_is_not_stretched(tmp_path, seen):
    summary, _ = summary_of(make_set(tmp_path / "set", red=100))     # 100 / 255 < 0.5
    for name in ("pixel_f1", "pixel_precision", "pixel_recall", "pixel_iou", "image_sen"):
        assert summary[name] == 0.0
    assert summary["pixel_f1_best"] == summary["pixel_f1_best_global"] == 1.0
    assert summary["pixel_auc"] == summary["image_auc"] == summary["pixel_f1_at_7"] == 1.0


def test_the_map_is_resized_to_the_mask_never_the_reverse(red_set):
    red_picture(255).resize((128, 96)).save(red_set / "mask/t3.png")
    *_, row = summary_of(red_set)[1]
    assert row["TP"] + row["FP"] + row["FN"] + row["TN"] == 128 * 96
    assert evaluate.resize(np.array([[0.0, 1.0]]), (1, 4))[0] == pytest.approx([0, 0.25, 0.75, 1])


def test_masks_are_read_in_the_forms_of_the_field(tmp_path):
    truth = np.zeros((6, 4), np.uint8)
    truth[1:3, :2] = 1
    red = np.stack([200 * (1 - truth), 100 * truth, 0 * truth], axis=2)
    forms = {"255.png": 255 * truth, "1.png": truth, "a_edgemask.png": red, "nist16.png": 1 - truth,
             "turned.png": np.rot90(truth)}
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 4)).save(tmp_path / "turned.jpg", exif=exif)            # 4 x 6, upright
    for name, mask in forms.items():
        Image.fromarray(mask).save(tmp_path / name)
        picture = data.Picture(tmp_path / "turned.jpg", 1, tmp_path / name)
        assert np.array_equal(evaluate.read_mask(picture, (6, 4)), truth), name


def test_what_cannot_count_is_left_out_and_named(red_set):
    Image.new("L", (64, 64)).save(red_set / "mask/t0.png")
    (red_set / "mask/t1.png").unlink()
    Image.new("L", (64, 64), 255).save(red_set / "mask/t2.png")
    pictures, _, _ = data.read_set(red_set)
    (red_set / "mask/t3.png").write_text("no picture any more")
    pictures.append(data.Picture(pictures[0].path, None))
    summary, rows = evaluate.evaluate(None, pictures)

    assert (summary["n"], summary["n_masks"]) == (9, 1)
    assert summary["excluded"] == {
        "empty mask (pixel metrics)": 1, "no mask (pixel metrics)": 1,
        "fully manipulated (pixel_auc)": 1, "unreadable mask (pixel metrics)": 1, "no label": 1}
    assert summary["image_sen"] == rows[-1]["score"] == 1.0          # all count for the image
    assert "t3.png" in rows[-1]["error"]
    assert summary["pixel_recall"] == 32 * 32 / 64 / 64              # of t2, which is red in part
    assert summary["fp_area"] == 0.0                                 # t0 does not enter it
    evaluate.print_table("set", summary)                             # nulls can be printed
    with pytest.raises(data.BadInput, match="found no picture .* expected .*: check"):
        evaluate.evaluate(None, [data.Picture(red_set / "gone.png", 1)])


def test_an_error_in_the_code_keeps_its_traceback(red_set, monkeypatch):
    monkeypatch.setattr(infer, "localize", lambda model, picture: model.wrong_name)
    with pytest.raises(AttributeError):
        summary_of(red_set)


def read_csv(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_the_command_as_a_user_types_it(red_set, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "out"
    command = [sys.executable, ROOT / "tests/evaluate.py", red_set, "--out", out]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for label in ("pixel_f1 (P-F1)", "image_auc (I-AUC)", "comb_f1 (C-F1)", "oracle", "all_ones",
                  "image_f1_hm (I-F1)", "threshold 0.5", "n 9: 5 genuine, 4 manipulated"):
        assert label in done.stdout
    assert list(json.loads((out / "metrics.json").read_text())) == [str(red_set)]
    assert len(read_csv(out / "per_image.csv")) == 9


@pytest.fixture
def run(seen, capsys):
    """The command in this process, with the model that is always right -> (status, out, err)."""
    def call(*words):
        status = evaluate.main([str(word) for word in words])
        printed = capsys.readouterr()
        return status, printed.out, printed.err
    return call


def test_everything_follows_from_the_rows(red_set, run, tmp_path):
    other = make_set(tmp_path / "other", red=140)
    red_picture(140, first=10).save(other / "tp/t1.png")             # marks too much
    red_picture(200, first=0, last=8).save(other / "au/a1.png")      # a false alarm
    _, out, _ = run(red_set, other, "--out", tmp_path / "out")
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    combined = np.mean([summary["comb_f1"] for summary in metrics.values()])
    assert f"comb_f1 (C-F1), mean over the sets: {combined:.3f}" in out

    rows = [row for row in read_csv(tmp_path / "out/per_image.csv") if row["set"] == str(other)]
    summary = metrics[str(other)]
    assert summary["n"] == len(rows) == 9
    assert set(evaluate.METRICS) <= summary.keys()
    for name in ("f1", "iou", "auc", "precision", "recall", "f1_best", "f1_at_7"):
        values = [float(row[name]) for row in rows if row[name]]
        assert len(values) == 4
        assert summary[f"pixel_{name}"] == pytest.approx(np.mean(values))
    assert summary["fp_area"] == pytest.approx(8 * 8 / 64 / 64 / 5)
    assert summary["image_spe"] == 0.8
    assert summary["comb_f1"] == evaluate.harmonic(summary["pixel_f1"], summary["image_f1_hm"])
    assert evaluate.harmonic(0.5, 1.0) == pytest.approx(2 / 3)


def test_attacks_by_the_command(red_set, run, seen, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "ATTACKS", ("jpeg:100", "blur:23"))
    _, out, _ = run(red_set, "--robustness", "--out", tmp_path / "out")
    rows = read_csv(tmp_path / "out/robustness.csv")
    for row, attack in zip(rows, ("none", "jpeg:100", "blur:23"), strict=True):
        assert row["attack"] == attack and f"\n{attack} " in out
    assert float(rows[0]["pixel_f1"]) == 1.0 > float(rows[2]["pixel_f1"])
    [summary] = json.loads((tmp_path / "out/metrics.json").read_text()).values()
    assert summary["pixel_f1"] == 1.0                                # stays without attack

    run(red_set, "--attack", "blur:23", "--out", tmp_path / "out")
    row = read_csv(tmp_path / "out/per_image.csv")[-1]
    assert int(row["TP"]) + int(row["FN"]) == 32 * 32                # the mask stays
    attacked = evaluate.apply_attack(data.open_image(row["path"]), "blur:23")
    assert np.array_equal(seen[-1], attacked)


def test_damaged_files_give_status_1_and_the_rest_is_done(red_set, run, tmp_path):
    (red_set / "au/a0.png").write_text("never was a picture")
    for path in (red_set / "tp/t1.png", red_set / "mask/t2.png"):    # cut off after the header
        path.write_bytes(path.read_bytes()[:50])
    status, out, err = run(red_set, "--out", tmp_path / "out")
    assert status == 1
    for name, line in zip(("a0.png", "t1.png", "t2.png"), err.splitlines(), strict=True):
        assert line.startswith("error: ") and name in line
    assert "n 7: 4 genuine, 3 manipulated, 2 with a mask" in out
    assert "1 no mask (pixel metrics), 2 unreadable" in out
    assert len(read_csv(tmp_path / "out/per_image.csv")) == 7


def test_notes_and_limits(red_set, run):
    assert "n 3: 2 genuine, 1 manipulated" in run(red_set, "--limit", 3)[1]
    for i in range(30):
        red_picture(255).save(red_set / f"tp/lost{i}.png")           # without a mask
    assert len(run(red_set)[2].splitlines()) == 11                   # many problems are cut short
    for path in (red_set / "mask").iterdir():
        Image.new("L", (64, 64), 255).save(path)
    assert "masks inverted? 100%" in run(red_set)[2]


def test_wrong_calls_are_one_line_and_status_2(red_set, run, tmp_path):
    unlabelled = tmp_path / "flat"
    unlabelled.mkdir()
    red_picture(255).save(unlabelled / "a.png")
    for words in ([unlabelled], [red_set, tmp_path / "gone"], [red_set, "--limit", "0"],
                  [red_set, "--attack", "rain:3"], [red_set, "--out", unlabelled / "a.png"]):
        status, out, err = run(*words)
        assert (status, out) == (2, "")
        assert err.startswith("error: ") and len(err.splitlines()) == 1
    for words in ([], [red_set, "--threshold", "0.3"], [red_set, "--robustness", "--attack", "x"]):
        with pytest.raises(SystemExit, match="2"):
            run(*words)


def test_the_forged_part_lies_in_the_window_of_the_lessons(seen, tmp_path, monkeypatch):
    light, depth = scene.render(21)
    monkeypatch.setattr(scene, "render", lambda seed: (light, depth))            # one is enough
    monkeypatch.setattr(scene, "TESTS", tmp_path)
    scene.main()
    genuine = Image.open(tmp_path / "scene.png").crop((0, 0, 480, 336))
    forged = Image.open(tmp_path / "forged.png")
    left, top, right, bottom = ImageChops.difference(genuine, forged).getbbox()
    assert 100 <= left < right <= 356 and 0 <= top < bottom <= 256
