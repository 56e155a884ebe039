"""Metrics against brute force and hand cases, and the traps of public evaluation code."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

import data
import infer
from test_infer import make_model, photo


def brute_auc(values, truth):
    pairs = [(p > n) + 0.5 * (p == n) for p in values[truth] for n in values[~truth]]
    return float(np.mean(pairs)) if pairs else None


def brute_f1(flags, truth):
    tp, fp, fn = (flags & truth).sum(), (flags & ~truth).sum(), (~flags & truth).sum()
    return 2 * tp / (2 * tp + fp + fn) if tp else 0.0


@pytest.mark.parametrize("levels", [3, 20, 10 ** 6])
def test_pixel_scores_equal_brute_force(levels):
    rng = np.random.default_rng(levels)
    for _ in range(8):
        map = (rng.integers(0, levels + 1, (7, 9)) / levels).astype(np.float32)
        truth = rng.random((7, 9)) < rng.uniform(0.1, 0.9)
        scores = infer.pixel_scores(map, truth, 0.5)
        flags, exact = map > 0.5, map.astype(np.float64)
        assert scores["tp"] == (flags & truth).sum() and scores["fp"] == (flags & ~truth).sum()
        assert scores["fn"] == (~flags & truth).sum() and scores["tn"] == (~flags & ~truth).sum()
        assert scores["f1"] == pytest.approx(brute_f1(flags, truth))
        assert scores["iou"] == pytest.approx((flags & truth).sum() / (flags | truth).sum())
        assert scores["precision"] == pytest.approx((flags & truth).sum() / max(1, flags.sum()))
        assert scores["recall"] == pytest.approx((flags & truth).sum() / truth.sum())
        assert scores["auc"] == pytest.approx(brute_auc(map[None][0], truth))
        best = max(brute_f1(exact > t, truth) for t in [0.0, *np.unique(exact)] if t < 1)
        assert scores["f1_best"] == pytest.approx(best)
        assert scores["at"] == pytest.approx([brute_f1(exact > t, truth) for t in infer.THRESHOLDS])


def test_perfect_empty_constant_full():
    truth = np.zeros((8, 8), bool)
    truth[2:5, 3:7] = True
    perfect = infer.pixel_scores(truth.astype(np.float32), truth, 0.5)
    assert [perfect[k] for k in ("f1", "iou", "precision", "recall", "auc", "f1_best")] == [1.0] * 6
    empty = infer.pixel_scores(np.zeros((8, 8), np.float32), truth, 0.5)
    assert [empty[k] for k in ("f1", "iou", "precision", "recall", "f1_best")] == [0.0] * 5
    assert empty["auc"] == 0.5
    for level in (0.3, 0.5, 0.9):
        assert infer.pixel_scores(np.full((8, 8), level, np.float32), truth, 0.5)["auc"] == 0.5
    assert infer.pixel_scores(np.full((8, 8), 0.5, np.float32), truth, 0.5)["f1"] == 0.0   # strict
    full = infer.pixel_scores(np.ones((8, 8), np.float32), np.ones((8, 8), bool), 0.5)
    assert full["auc"] is None and full["f1"] == 1.0


def test_summary_averages_per_image_and_takes_one_threshold_for_the_set():
    truth = np.array([[1, 1, 0, 0]], bool)
    a = infer.pixel_scores(np.array([[.9, .8, .1, .1]], np.float32), truth, 0.5)       # 1 at .1 .. .8
    b = infer.pixel_scores(np.array([[.3, .2, .1, .1]], np.float32), truth, 0.5)       # 1 at .1 .. .2
    summary = infer.pixel_summary([a, b])
    assert summary["pixel_f1"] == 0.5 and summary["pixel_f1_best"] == 1.0
    assert summary["pixel_f1_best_global"] == 1.0
    c = infer.pixel_scores(np.array([[.9, .95, .85, .1]], np.float32), truth, 0.5)     # 1 only above .85
    assert infer.pixel_summary([b, c])["pixel_f1_best_global"] == pytest.approx((1 + 0.8) / 2)
    assert set(infer.pixel_summary([]).values()) == {None}


def test_image_metrics_by_hand():
    found = infer.image_summary([0.9, 0.6, 0.5, 0.4, 0.6], [1, 1, 1, 0, 0], 0.5)
    assert found["image_sen"] == pytest.approx(2 / 3) and found["image_spe"] == 0.5
    assert found["image_acc"] == pytest.approx(3 / 5) and found["image_f1"] == pytest.approx(4 / 6)
    assert found["image_f1_hm"] == pytest.approx(2 * (2 / 3) * 0.5 / (2 / 3 + 0.5))
    assert found["image_auc"] == pytest.approx((2 + 1.5 + 1) / 6)
    one_class = infer.image_summary([0.9, 0.1], [1, 1], 0.5)
    assert one_class["image_auc"] is None and one_class["image_spe"] is None
    assert one_class["image_f1_hm"] is None and one_class["image_acc"] == 0.5
    none = infer.image_summary([0.1, 0.2], [0, 0], 0.5)
    assert none["image_f1"] is None and none["image_sen"] is None and none["image_spe"] == 1.0
    assert infer.image_summary([0.1, 0.9], [1, 0], 0.5)["image_f1_hm"] == 0.0
    assert set(infer.image_summary([], [], 0.5).values()) == {None}


def test_rank_auc_ties():
    assert infer.rank_auc([1, 1, 1, 1], [0, 1, 0, 1]) == 0.5
    assert infer.rank_auc([3, 2, 1], [1, 0, 0]) == 1.0
    assert infer.rank_auc([1, 2, 2, 3], [0, 0, 1, 1]) == pytest.approx(3.5 / 4)


class Oracle(infer.SAPL):
    """Answers with the red channel of the picture, patch by patch; the score is its maximum."""

    def answer(self, image):
        grid = torch.nn.functional.avg_pool2d(image[:, 0], self.clip.visual.patch_size)    # (B, h, w)
        return grid, grid.flatten(1).max(dim=1).values


@pytest.fixture
def labelled_set(tmp_path):
    """Eleven pictures: red squares where manipulated, black where genuine; odd ones among them."""
    for folder in ("au", "tp", "mask"):
        (tmp_path / "set" / folder).mkdir(parents=True)
    for i in range(5):
        Image.new("RGB", (64, 64)).save(tmp_path / f"set/au/a{i}.png")
    for i in range(6):
        mask = np.zeros((64, 64), np.uint8)
        if i != 4:
            mask[16:48, 16:48] = 255
        picture = np.zeros((64, 64, 3), np.uint8)
        picture[16:48, 16:48, 0] = 255
        Image.fromarray(picture).save(tmp_path / f"set/tp/t{i}.png")
        if i != 5:
            Image.fromarray(mask).save(tmp_path / f"set/mask/t{i}.png")
    return tmp_path / "set"


def test_evaluate_a_perfect_model_scores_one(labelled_set):
    model = make_model(Oracle)
    pictures, _ = data.read_set(labelled_set)
    summary, rows = infer.evaluate(model, pictures, raw=True)
    assert summary["n"] == len(rows) == 11                        # the last batch is not dropped
    assert (summary["n_manipulated"], summary["n_genuine"], summary["n_masks"]) == (6, 5, 4)
    assert summary["excluded"] == {"empty mask (pixels)": 1, "no mask (pixels)": 1}
    # genuine pictures do not enter; the map is smooth between patches, so the border costs a little
    assert summary["pixel_f1"] > 0.95 and summary["pixel_auc"] == pytest.approx(1.0, abs=5e-3)
    assert summary["image_auc"] == summary["image_acc"] == summary["image_f1_hm"] == 1.0
    assert summary["fp_area"] == 0.0
    share = 32 * 32 / 64 / 64
    ones = summary["baselines"]["all_ones"]
    assert ones["pixel_f1"] == pytest.approx(2 * share / (1 + share)) and ones["pixel_auc"] == 0.5
    assert summary["baselines"]["centre"]["pixel_auc"] > 0.9      # the square lies in the middle
    assert set(summary["baselines"]) == {"all_ones", "centre", "edge"}


def test_evaluate_names_what_it_left_out(labelled_set):
    pictures, _ = data.read_set(labelled_set)
    pictures[0].path.write_text("not a picture any more")
    pictures.append(data.Picture(pictures[1].path, None))
    summary, rows = infer.evaluate(make_model(Oracle), pictures)
    assert summary["excluded"]["no answer"] == 1 and summary["excluded"]["no label"] == 1
    assert [row for row in rows if "error" in row][0]["path"] == str(pictures[0].path)
    with pytest.raises(ValueError, match="jpeg"):
        infer.evaluate(make_model(Oracle), pictures, attack="jpg:70")


def test_evaluation_command(labelled_set, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(infer, "ATTACKS", infer.ATTACKS[5::6])          # one of each kind, the strongest
    infer.save_checkpoint(tmp_path / "m.pt", make_model())
    status = infer.main(["--evaluate", str(labelled_set), str(labelled_set) + "/", "--robustness",
                         "--checkpoint", str(tmp_path / "m.pt"), "--out", str(tmp_path / "out")])
    assert status == 0
    printed = capsys.readouterr().out
    assert "all_ones" in printed and "n 11" in printed and "threshold 0.5" in printed
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert len(metrics) == 2
    for summary in metrics.values():
        assert {"pixel_f1", "pixel_f1_best", "pixel_f1_best_global", "pixel_auc", "image_auc", "comb_f1",
                "fp_area", "image_f1_hm", "baselines", "excluded", "n", "threshold"} <= summary.keys()
    assert len((tmp_path / "out/per_image.csv").read_text().splitlines()) == 1 + 2 * 11
    lines = (tmp_path / "out/robustness.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * 4 and "jpeg:50" in lines[2]
    assert Image.open(tmp_path / "out/robustness.png").width > 100
