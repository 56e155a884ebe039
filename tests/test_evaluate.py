"""Metrics against brute force and hand cases, the traps of public evaluation code, the command."""
import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
import ecpl
import evaluate
import infer
from mini import mini_sapl, photo

ROOT = Path(__file__).resolve().parents[1]
PIXEL = ("pixel_f1", "pixel_auc", "pixel_precision", "pixel_recall", "pixel_iou", "pixel_f1_best",
         "pixel_f1_best_global")
IMAGE = ("image_auc", "image_acc", "image_sen", "image_spe", "image_f1", "image_f1_hm")


# ------------------------------------------------------------------------------- brute references

def brute_auc(values, truth):
    """Every pair of a positive and a negative, one by one."""
    won = []
    for positive in values[truth]:
        for negative in values[~truth]:
            won.append((positive > negative) + 0.5 * (positive == negative))
    return np.mean(won)


def brute_f1(flags, truth):
    TP = (flags & truth).sum()
    FP = (flags & ~truth).sum()
    FN = (~flags & truth).sum()
    if TP == 0:
        return 0.0
    return 2 * TP / (2 * TP + FP + FN)


@pytest.mark.parametrize("levels", [3, 20, 10 ** 6])
def test_pixel_scores_equal_brute_force(levels):
    rng = np.random.default_rng(levels)
    for _ in range(8):
        map = (rng.integers(0, levels + 1, (7, 9)) / levels).astype(np.float32)
        truth = rng.random((7, 9)) < rng.uniform(0.1, 0.9)
        flags = map > 0.5
        scores = evaluate.pixel_scores(map, truth)

        assert scores["TP"] == (flags & truth).sum()
        assert scores["FP"] == (flags & ~truth).sum()
        assert scores["FN"] == (~flags & truth).sum()
        assert scores["TN"] == (~flags & ~truth).sum()
        assert scores["f1"] == pytest.approx(brute_f1(flags, truth))
        assert scores["iou"] == pytest.approx((flags & truth).sum() / (flags | truth).sum())
        assert scores["precision"] == pytest.approx((flags & truth).sum() / max(1, flags.sum()))
        assert scores["recall"] == pytest.approx((flags & truth).sum() / truth.sum())
        assert scores["auc"] == pytest.approx(brute_auc(map, truth))

        exact = map.astype(np.float64)
        thresholds = [t for t in (0.0, *exact.ravel()) if t < 1]
        best = max(brute_f1(exact > t, truth) for t in thresholds)
        assert scores["f1_best"] == pytest.approx(best)
        grid = [brute_f1(exact > k / 100, truth) for k in range(1, 100)]
        assert scores["f1_at"] == pytest.approx(grid)


def test_rank_auc():
    assert evaluate.rank_auc([3, 2, 1], [1, 0, 0]) == 1.0
    assert evaluate.rank_auc([1, 2, 3], [1, 0, 0]) == 0.0
    assert evaluate.rank_auc([1, 1, 1, 1], [0, 1, 0, 1]) == 0.5
    assert evaluate.rank_auc([1, 2, 2, 3], [0, 0, 1, 1]) == 3.5 / 4
    assert evaluate.rank_auc([1, 2], [1, 1]) is None
    assert evaluate.rank_auc([1, 2], [0, 0]) is None
    assert evaluate.rank_auc([], []) is None


# ------------------------------------------------------------------------------- cases by hand

def square():
    truth = np.zeros((8, 8), bool)
    truth[2:5, 3:7] = True
    return truth


def level(value):
    return np.full((8, 8), value, np.float32)


def test_perfect_and_blank_maps():
    perfect = evaluate.pixel_scores(square().astype(np.float32), square())
    for name in ("f1", "iou", "precision", "recall", "auc", "f1_best"):
        assert perfect[name] == 1.0
    blank = evaluate.pixel_scores(level(0), square())
    for name in ("f1", "iou", "precision", "recall", "f1_best"):
        assert blank[name] == 0.0


@pytest.mark.parametrize("value", [0.0, 0.1, 0.3, 0.5, 0.9, 1.0])
def test_a_constant_map_has_an_auc_of_exactly_one_half(value):
    assert evaluate.pixel_scores(level(value), square())["auc"] == 0.5
    large = np.full((700, 900), value, np.float32)
    truth = np.zeros((700, 900), bool)
    truth[100:307, 200:511] = True
    assert evaluate.rank_auc(large, truth) == 0.5


def test_the_threshold_is_strict_and_nothing_is_rounded_to_8_bits():
    assert evaluate.pixel_scores(level(0.5), square())["recall"] == 0.0
    assert evaluate.pixel_scores(level(0.5001), square())["recall"] == 1.0
    assert evaluate.pixel_scores(level(0.4999), square())["recall"] == 0.0      # 127.47 / 255
    assert evaluate.image_summary([0.5, 0.5001], [1, 1])["image_sen"] == 0.5


def test_a_genuine_picture_has_no_f1():
    scores = evaluate.pixel_scores(level(0.9), np.zeros((8, 8), bool))
    assert scores == {"TP": 0, "FP": 64, "FN": 0, "TN": 0, "fp_area": 1.0}


def test_a_fully_manipulated_picture_has_no_auc():
    full = evaluate.pixel_scores(level(1), np.ones((8, 8), bool))
    assert full["auc"] is None
    assert full["f1"] == 1.0


def test_means_over_pictures_and_one_threshold_for_the_set():
    truth = np.array([[True, True, False, False]])
    high = evaluate.pixel_scores(np.array([[0.9, 0.8, 0.1, 0.1]]), truth)      # best: 0.1 .. 0.8
    low = evaluate.pixel_scores(np.array([[0.3, 0.2, 0.1, 0.1]]), truth)       # best: 0.1 .. 0.2
    summary = evaluate.pixel_summary([high, low])
    assert summary["pixel_f1"] == 0.5
    assert summary["pixel_f1_best"] == 1.0
    assert summary["pixel_f1_best_global"] == 1.0

    # 1 only above 0.85, where the low one marks nothing; below 0.2 it is 2 * 2 / (3 + 2)
    late = evaluate.pixel_scores(np.array([[0.9, 0.95, 0.85, 0.1]]), truth)
    summary = evaluate.pixel_summary([low, late])
    assert summary["pixel_f1_best"] == 1.0
    assert summary["pixel_f1_best_global"] == pytest.approx((1 + 0.8) / 2)


def test_image_metrics():
    found = evaluate.image_summary([0.9, 0.6, 0.5, 0.4, 0.6], [1, 1, 1, 0, 0])
    assert found["image_sen"] == pytest.approx(2 / 3)
    assert found["image_spe"] == 0.5
    assert found["image_acc"] == pytest.approx(3 / 5)
    assert found["image_f1"] == pytest.approx(4 / 6)
    assert found["image_f1_hm"] == pytest.approx(2 * (2 / 3) * 0.5 / (2 / 3 + 0.5))
    assert found["image_auc"] == pytest.approx((2 + 1.5 + 1) / 6)


def test_image_metrics_that_do_not_exist_are_null():
    positives = evaluate.image_summary([0.9, 0.1], [1, 1])
    assert positives["image_acc"] == 0.5
    for name in ("image_auc", "image_spe", "image_f1_hm"):
        assert positives[name] is None
    negatives = evaluate.image_summary([0.1, 0.2], [0, 0])
    assert negatives["image_spe"] == 1.0
    for name in ("image_auc", "image_sen", "image_f1", "image_f1_hm"):
        assert negatives[name] is None
    assert evaluate.image_summary([0.1, 0.9], [1, 0])["image_f1_hm"] == 0.0    # all wrong


def test_harmonic_mean():
    assert evaluate.harmonic(0.5, 1.0) == pytest.approx(2 / 3)
    assert evaluate.harmonic(0.0, 1.0) == 0.0
    assert evaluate.harmonic(0.0, 0.0) == 0.0
    assert evaluate.harmonic(None, 1.0) is None


def test_baselines():
    image = photo(40, 24)
    maps = evaluate.baselines(image)
    assert tuple(maps) == evaluate.BASELINES
    assert all(map.shape == (24, 40) for map in maps.values())
    assert (maps["all_ones"] == 1).all()
    edges = ecpl.soft_edges(data.to_tensor(image)[None])[0, 0].numpy()
    assert np.array_equal(maps["edge"], edges)

    centre = maps["centre"]
    assert np.allclose(centre, centre[::-1, ::-1])
    assert centre[12, 20] == centre.max() > 0.9
    assert centre[12, 0] == pytest.approx(np.exp(-2), rel=0.01)      # two sigmas to every side
    assert centre[0, 20] == pytest.approx(np.exp(-2), rel=0.01)


# ------------------------------------------------------------------------------------ intervals

def test_the_interval_contains_the_estimate_and_shrinks_with_n():
    values = np.random.default_rng(0).random(1600)
    widths = []
    for n in (25, 100, 400, 1600):
        low, high = evaluate.interval(np.mean, values[:n])
        assert low < values[:n].mean() < high
        widths.append(high - low)
    theory = 2 * 1.96 * values.std() / 1600 ** 0.5
    assert widths[-1] == pytest.approx(theory, rel=0.1)
    for wide, narrow in zip(widths, widths[1:]):
        assert narrow == pytest.approx(wide / 2, rel=0.35)
    assert evaluate.interval(np.mean, values) == evaluate.interval(np.mean, values)


def test_the_interval_of_an_auc_draws_scores_and_labels_together():
    rng = np.random.default_rng(1)
    labels = np.arange(200) % 2
    scores = rng.random(200) + 0.5 * labels
    low, high = evaluate.interval(evaluate.rank_auc, scores, labels)
    assert 0.5 < low < evaluate.rank_auc(scores, labels) < high < 1
    assert evaluate.interval(evaluate.rank_auc, labels, labels) == [1.0, 1.0]


def test_no_interval_where_there_is_nothing_to_draw():
    assert evaluate.interval(np.mean, []) is None
    assert evaluate.interval(np.mean, [0.7]) is None
    assert evaluate.interval(evaluate.rank_auc, [0.1, 0.9], [1, 1]) is None


# -------------------------------------------------------------------------------------- attacks

def test_jpeg_loses_more_at_lower_quality():
    image = photo(160, 120)
    losses = []
    for quality in (100, 90, 70, 50):
        attacked = evaluate.apply_attack(image, f"jpeg:{quality}")
        losses.append(np.abs(np.asarray(attacked, float) - np.asarray(image, float)).mean())
    assert losses == sorted(losses)
    assert losses[-1] > 2 * losses[0]


def test_jpeg_halves_the_colours_as_cameras_do():
    image = photo(160, 120)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=70, subsampling="4:2:0")
    assert np.array_equal(evaluate.apply_attack(image, "jpeg:70"), Image.open(buffer))


def test_noise_has_the_named_variance_and_is_always_the_same():
    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    noisy = np.asarray(evaluate.apply_attack(grey, "noise:11"), dtype=float)
    assert noisy.var() == pytest.approx(11, rel=0.05)
    assert noisy.mean() == pytest.approx(128, abs=0.1)
    assert np.array_equal(noisy, np.asarray(evaluate.apply_attack(grey, "noise:11")))


def test_blur_is_as_wide_as_opencv_makes_it_for_a_kernel():
    dot = Image.new("RGB", (31, 31))
    dot.putpixel((15, 15), (255, 255, 255))
    blurred = np.asarray(evaluate.apply_attack(dot, "blur:11"), dtype=float)[:, :, 0]
    spread = (blurred * (np.arange(31) - 15) ** 2).sum() / blurred.sum()
    assert spread ** 0.5 == pytest.approx(0.3 * (5 - 1) + 0.8, rel=0.15)


def test_every_attack_of_the_grid_changes_a_picture():
    image = photo(50, 30)
    assert len(set(evaluate.ATTACKS)) == 19
    for spec in evaluate.ATTACKS:
        attacked = evaluate.apply_attack(image, spec)
        half = spec == "size:50"
        assert attacked.size == ((image.width // 2, image.height // 2) if half else image.size)
        assert not np.array_equal(attacked, image)


@pytest.mark.parametrize("spec", ["jpeg", "jpeg:", "jpeg:0", "jpeg:101", "blur:x", "blur:-3",
                                  "rain:3", "jpeg:70.5", ""])
def test_wrong_attacks_are_refused(spec):
    with pytest.raises(ValueError, match="expected jpeg:QUALITY"):
        evaluate.apply_attack(photo(16, 16), spec)


# -------------------------------------------------------------------------------------- whole sets

class RedIsManipulated:
    """Stands for a model that is always right: its map is the red channel of what it is given."""

    def __init__(self):
        self.seen = []

    def localize(self, picture, raw=False):
        self.seen.append((picture, raw))
        map = np.asarray(picture, dtype=np.float32)[:, :, 0] / 255               # (H, W)
        score = float(map.max())
        return infer.Result(map, map > 0.5, score, "not asked for", 0.0)


def red_picture(value, box=(16, 48)):
    """64 x 64 pixels, black but for a red square of a brightness."""
    first, last = box
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[first:last, first:last, 0] = value
    return Image.fromarray(picture)


def make_set(root, red=255):
    """A folder: 5 black genuine pictures, 4 with a red square and its mask."""
    for folder in ("au", "tp", "mask"):
        (root / folder).mkdir(parents=True)
    for i in range(5):
        red_picture(0).save(root / f"au/a{i}.png")
    for i in range(4):
        red_picture(red).save(root / f"tp/t{i}.png")
        red_picture(255).getchannel("R").save(root / f"mask/t{i}.png")
    return root


@pytest.fixture
def red_set(tmp_path):
    return make_set(tmp_path / "set")


def test_a_perfect_model_scores_one_on_a_half_genuine_set(red_set):
    model = RedIsManipulated()
    pictures, _ = data.read_set(red_set)
    summary, rows = evaluate.evaluate(model, pictures)
    assert summary["n"] == len(rows) == len(model.seen) == 9         # no last batch is dropped
    assert summary["n_genuine"] == 5
    assert summary["n_manipulated"] == summary["n_masks"] == 4
    assert summary["excluded"] == {}
    for name in (*PIXEL, *IMAGE, "comb_f1"):
        assert summary[name] == 1.0
    assert summary["fp_area"] == 0.0
    assert summary["intervals"]["pixel_f1"] == [1.0, 1.0]


def test_baselines_are_measured_on_the_same_pictures(red_set):
    pictures, _ = data.read_set(red_set)
    found = evaluate.evaluate(RedIsManipulated(), pictures)[0]["baselines"]
    assert tuple(found) == ("all_ones", "centre", "edge")
    share = 32 * 32 / 64 / 64
    ones = found["all_ones"]
    assert ones["pixel_f1"] == pytest.approx(2 * share / (1 + share))
    assert ones["pixel_auc"] == 0.5
    assert ones["fp_area"] == 1.0
    assert found["centre"]["pixel_auc"] > 0.9                        # the square is in the middle
    assert found["edge"]["fp_area"] == 0.0                           # black pictures have no edges


def test_a_weak_map_is_not_stretched(tmp_path):
    pictures, _ = data.read_set(make_set(tmp_path / "set", red=100))            # 100 / 255 < 0.5
    summary, _ = evaluate.evaluate(RedIsManipulated(), pictures)
    for name in ("pixel_f1", "pixel_precision", "pixel_recall", "pixel_iou", "image_sen"):
        assert summary[name] == 0.0
    assert summary["pixel_f1_best"] == summary["pixel_f1_best_global"] == 1.0
    assert summary["pixel_auc"] == summary["image_auc"] == 1.0


def test_a_faint_map_is_not_rounded_to_8_bits(red_set):
    class Faint(RedIsManipulated):
        """0.501 where manipulated, 0.5 elsewhere: a quarter of an 8-bit step apart."""

        def localize(self, picture, raw=False):
            sure = super().localize(picture, raw)
            map = 0.5 + 0.001 * sure.map
            return sure._replace(map=map, score=float(map.max()))

    pictures, _ = data.read_set(red_set)
    summary, _ = evaluate.evaluate(Faint(), pictures)
    for name in (*PIXEL[:5], *IMAGE):
        assert summary[name] == 1.0


def test_the_map_is_resized_to_the_mask(red_set, monkeypatch):
    def smaller(picture):
        value = 255 * picture.label
        mask = red_picture(value).resize((40, 20), Image.Resampling.NEAREST)
        return (np.asarray(mask)[:, :, 0] > 127).astype(np.uint8)                # (20, 40)

    monkeypatch.setattr(evaluate, "read_mask", smaller)
    pictures, _ = data.read_set(red_set)
    _, rows = evaluate.evaluate(RedIsManipulated(), pictures)
    for row in rows:
        assert row["TP"] + row["FP"] + row["FN"] + row["TN"] == 20 * 40


def test_a_map_is_resized_bilinearly_without_aligned_corners():
    assert evaluate.resize(np.array([[0.0, 1.0]]), (1, 4))[0] == pytest.approx([0, 0.25, 0.75, 1])


def test_a_mask_keeps_its_own_size(red_set):
    for path in (red_set / "mask").iterdir():
        Image.open(path).resize((128, 128), Image.Resampling.NEAREST).save(path)
    pictures, _ = data.read_set(red_set)
    _, rows = evaluate.evaluate(RedIsManipulated(), pictures)
    row = rows[-1]
    assert row["TP"] + row["FP"] + row["FN"] + row["TN"] == 128 * 128


def test_what_cannot_count_is_left_out_and_said(red_set):
    blank = Image.new("L", (64, 64))
    blank.save(red_set / "mask/t0.png")
    (red_set / "mask/t1.png").unlink()
    Image.new("L", (64, 64), 255).save(red_set / "mask/t2.png")
    pictures, _ = data.read_set(red_set)
    pictures.append(data.Picture(pictures[0].path, None))
    summary, rows = evaluate.evaluate(RedIsManipulated(), pictures)

    assert summary["n"] == len(rows) == 9
    assert summary["n_masks"] == 2
    assert summary["excluded"] == {"empty mask (pixel metrics)": 1, "no mask (pixel metrics)": 1,
                                   "fully manipulated (pixel_auc)": 1, "no label": 1}
    assert summary["image_auc"] == 1.0                               # they count for the image
    assert summary["pixel_auc"] == 1.0
    share = 32 * 32 / 64 / 64
    assert summary["pixel_recall"] == (1 + share) / 2                # of t2, which is red in part
    assert summary["fp_area"] == 0.0                                 # t0 does not enter it


def test_an_unreadable_picture_is_named_and_the_rest_is_done(red_set):
    pictures, _ = data.read_set(red_set)
    pictures[0].path.write_text("no picture any more")
    summary, rows = evaluate.evaluate(RedIsManipulated(), pictures)
    assert summary["n"] == 8
    assert summary["excluded"] == {"no answer": 1}
    failed = [row for row in rows if "error" in row]
    assert [row["path"] for row in failed] == [str(pictures[0].path)]
    assert "score" not in failed[0]


def test_evaluating_nothing_is_an_error(red_set):
    unlabelled = [data.Picture(path, None) for path in (red_set / "au").iterdir()]
    for pictures in ([], unlabelled, [data.Picture(red_set / "gone.png", 1)]):
        with pytest.raises(ValueError, match="found no picture .* expected .*: check"):
            evaluate.evaluate(RedIsManipulated(), pictures)


def test_labels_without_masks_give_image_metrics(red_set):
    pictures, _ = data.read_set(red_set, masks=False)
    summary, _ = evaluate.evaluate(RedIsManipulated(), pictures)
    for name in PIXEL:
        assert summary[name] is None
        assert summary["baselines"]["all_ones"][name] is None
    for name in IMAGE:
        assert summary[name] == 1.0
    assert summary["comb_f1"] is None
    assert summary["fp_area"] == 0.0
    assert summary["excluded"] == {"no mask (pixel metrics)": 4}
    assert summary["intervals"]["pixel_f1"] is None
    assert summary["intervals"]["image_auc"] == [1.0, 1.0]
    evaluate.print_table("set", summary)                             # nulls can be printed


def test_the_attack_comes_first_and_the_mask_stays(red_set):
    pictures, _ = data.read_set(red_set)
    model = RedIsManipulated()
    summary, rows = evaluate.evaluate(model, pictures, attack="blur:23", raw=True)
    for picture, (seen, raw) in zip(pictures, model.seen):
        expected = evaluate.apply_attack(data.open_image(picture.path), "blur:23")
        assert np.array_equal(seen, expected)
        assert raw
    assert rows[-1]["TP"] + rows[-1]["FN"] == 32 * 32
    assert 0.5 < summary["pixel_f1"] < 1
    with pytest.raises(ValueError, match="expected jpeg:QUALITY"):
        evaluate.evaluate(model, pictures, attack="jpg:70")


# ------------------------------------------------------------------------------------ the command

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "mini.pt"
    ecpl.save_checkpoint(path, mini_sapl())
    return str(path)


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_command_as_a_user_types_it(red_set, checkpoint, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, ROOT / "tests/evaluate.py", red_set, "--checkpoint", checkpoint,
               "--out", out]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=one_thread, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr
    for label in ("pixel_f1 (P-F1)", "image_auc (I-AUC)", "comb_f1 (C-F1)", "image_f1_hm (I-F1)",
                  "all_ones", "threshold 0.5", "n 9: 5 genuine, 4 manipulated", "oracle"):
        assert label in done.stdout
    metrics = json.loads((out / "metrics.json").read_text())
    assert list(metrics) == [str(red_set)]
    assert len(read_csv(out / "per_image.csv")) == 9
    assert not (out / "robustness.csv").exists()


@pytest.fixture
def run(monkeypatch, capsys):
    """The command in this process, with a model that is always right -> (status, out, err)."""
    monkeypatch.setattr(infer.SAPL, "load", lambda *arguments: RedIsManipulated())

    def call(*words):
        status = evaluate.main([str(word) for word in words])
        printed = capsys.readouterr()
        return status, printed.out, printed.err
    return call


def test_everything_follows_from_the_rows(red_set, run, tmp_path):
    other = make_set(tmp_path / "other", red=140)
    (other / "mask/t0.png").unlink()
    red_picture(140, box=(10, 48)).save(other / "tp/t1.png")         # marks too much
    red_picture(200, box=(0, 8)).save(other / "au/a1.png")           # a false alarm
    status, out, err = run(red_set, other, "--out", tmp_path / "out")
    assert status == 0
    assert "note" in err and "no mask" in err
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert list(metrics) == [str(red_set), str(other)]
    combined = np.mean([summary["comb_f1"] for summary in metrics.values()])
    assert f"comb_f1 (C-F1), mean over the sets: {combined:.3f}" in out

    rows = [row for row in read_csv(tmp_path / "out/per_image.csv") if row["set"] == str(other)]
    summary = metrics[str(other)]
    assert summary["n"] == len(rows) == 9
    for name in ("f1", "iou", "auc", "precision", "recall", "f1_best"):
        values = [float(row[name]) for row in rows if row[name]]
        assert len(values) == 3
        assert summary[f"pixel_{name}"] == pytest.approx(np.mean(values))
    labels = [int(row["label"]) for row in rows]
    scores = [float(row["score"]) for row in rows]
    again = evaluate.image_summary(scores, labels)
    assert again == {name: summary[name] for name in again}
    areas = []
    for row in rows:
        if row["label"] == "0":
            areas.append(int(row["FP"]) / (int(row["FP"]) + int(row["TN"])))
    assert summary["fp_area"] == pytest.approx(np.mean(areas))
    assert 0 < summary["fp_area"] < 1 and summary["image_spe"] == 0.8
    hm = summary["image_f1_hm"]
    f1 = summary["pixel_f1"]
    assert summary["comb_f1"] == pytest.approx(2 * f1 * hm / (f1 + hm))
    assert set(summary["intervals"]) == {"pixel_f1", "pixel_auc", "image_auc"}
    assert set(evaluate.METRICS) <= summary.keys()


def test_robustness_adds_a_line_for_each_attack(red_set, run, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "ATTACKS", ("jpeg:100", "blur:23"))
    status, out, _ = run(red_set, "--robustness", "--out", tmp_path / "out")
    assert status == 0
    rows = read_csv(tmp_path / "out/robustness.csv")
    assert [row["attack"] for row in rows] == ["none", "jpeg:100", "blur:23"]
    assert float(rows[0]["pixel_f1"]) == 1.0 > float(rows[2]["pixel_f1"])
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics[str(red_set)]["pixel_f1"] == 1.0                  # stays without attack
    assert len(read_csv(tmp_path / "out/per_image.csv")) == 9
    for row in rows:
        assert f"\n{row['attack']} " in out


def test_an_attack_is_named_in_the_files(red_set, run, tmp_path):
    status, out, _ = run(red_set, "--attack", "blur:23", "--out", tmp_path / "out")
    assert status == 0
    assert "attack: blur:23" in out
    summary = json.loads((tmp_path / "out/metrics.json").read_text())[str(red_set)]
    assert summary["attack"] == "blur:23"
    assert summary["pixel_f1"] < 1


def test_a_file_that_is_no_picture_gives_status_1(red_set, run):
    (red_set / "au/a0.png").write_text("never was a picture")
    status, out, err = run(red_set)
    assert status == 1
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ") and "a0.png" in err
    assert "n 8: 4 genuine, 4 manipulated, 4 with a mask; left out: 1 unreadable" in out


def test_a_picture_that_breaks_off_gives_status_1(red_set, run, tmp_path):
    path = red_set / "tp/t1.jpg"
    red_picture(255).save(path)
    path.write_bytes(path.read_bytes()[:-20])                        # its header is good
    (red_set / "tp/t1.png").unlink()
    status, out, err = run(red_set, "--out", tmp_path / "out")
    assert status == 1
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ") and err.count("t1.jpg") == 1
    assert "n 8: 5 genuine, 3 manipulated, 3 with a mask; left out: 1 no answer" in out
    rows = read_csv(tmp_path / "out/per_image.csv")
    assert [Path(row["path"]).name for row in rows if row["error"]] == ["t1.jpg"]


def test_limit_takes_pictures_of_both_classes(red_set, run):
    status, out, err = run(red_set, "--limit", 3)
    assert status == 0
    assert "3 of its 9 pictures" in err
    assert "n 3: 2 genuine, 1 manipulated" in out
    assert "n 9: " in run(red_set, "--limit", 99)[1]


def test_nothing_to_evaluate_is_status_2(red_set, run, tmp_path):
    (tmp_path / "flat").mkdir()
    red_picture(255).save(tmp_path / "flat/a.png")
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "flat", tmp_path / "empty", tmp_path / "gone"):
        for words in ([path], [red_set, path]):                      # seen before any work
            status, out, err = run(*words)
            assert (status, out) == (2, "")
            assert len(err.splitlines()) == 1
            for word in ("error: found", "expected", ":", str(path)):
                assert word in err


def test_wrong_calls_are_one_line_and_status_2(red_set, run, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for words in (["--attack", "rain:3"], ["--limit", "0"], ["--out", file]):
        status, out, err = run(red_set, *words)
        assert (status, out) == (2, "")
        assert len(err.splitlines()) == 1
        assert err.startswith("error: found") and "expected" in err
    for words in ([], [red_set, "--threshold", "0.3"],
                  [red_set, "--robustness", "--attack", "jpeg:70"]):
        with pytest.raises(SystemExit) as end:
            run(*words)
        assert end.value.code == 2


def test_many_problems_of_a_set_are_cut_short(red_set, run):
    (red_set / "mask/t0.png").unlink()
    for i in range(30):
        red_picture(255).getchannel("R").save(red_set / f"mask/lost{i}.png")
    status, _, err = run(red_set)
    assert status == 0
    notes = err.splitlines()
    assert len(notes) == 11
    assert "and 21 more: see `python data.py" in notes[-1]


def test_what_was_finished_survives_an_interruption(red_set, run, tmp_path, monkeypatch):
    other = make_set(tmp_path / "other")
    whole = evaluate.evaluate

    def interrupted(model, pictures, **settings):
        if str(pictures[0].path).startswith(str(other)):
            raise KeyboardInterrupt
        return whole(model, pictures, **settings)

    monkeypatch.setattr(evaluate, "evaluate", interrupted)
    assert run(red_set, other, "--out", tmp_path / "out")[0] == 130
    assert list(json.loads((tmp_path / "out/metrics.json").read_text())) == [str(red_set)]


def test_help_needs_no_model(capsys, monkeypatch):
    monkeypatch.setattr(infer.SAPL, "load", None)
    with pytest.raises(SystemExit) as end:
        evaluate.main(["--help"])
    assert end.value.code == 0
    assert "--robustness" in capsys.readouterr().out
