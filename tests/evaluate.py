"""Evaluation: the field's metrics on labelled pictures, beside those of uninformed maps.

    python tests/evaluate.py SET [SET ..] --out DIR      a table for each set, and files
    python tests/evaluate.py SET --attack jpeg:70        on attacked pictures
    python tests/evaluate.py SET --robustness            also after each attack of ATTACKS

SET is a folder or list that data.py reads. The threshold of map and score is 0.5; metrics that
search for a better one are oracles and say so. Exit status: 0 all done, 1 some files could not be
read (they are named, the rest is done), 2 wrong call or nothing to evaluate.

Reading order: masks -> formulas -> attacks and baselines -> one picture -> a set -> the command.
Label 1 and mask 1 = manipulated. Shapes: H, W pixels of a picture or mask; n whatever is counted.
"""
import argparse
import csv
import io
import json
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import clip                                                     # noqa: E402 (path first)
import data                                                     # noqa: E402
import ecpl                                                     # noqa: E402
import infer                                                    # noqa: E402

THRESHOLD = 0.5                            # of map and score
GRID = np.arange(1, 100) / 100             # (99,) what pixel_f1_best_global may choose from
GENUINE_SHARE = 0.07                       # of genuine pixels, marked for pixel_f1_at_7
RESAMPLES = 1000                           # of the bootstrap
NOTES = 10                                 # problems of a set that are printed in full
INVERTED = re.compile("(?<![a-z])(nist|nc2016|dso|splicing-)")       # masks black where manipulated

PIXEL_METRICS = {                          # {metric: what the table adds to its name}
    "pixel_f1": "P-F1", "pixel_auc": "", "pixel_precision": "", "pixel_recall": "",
    "pixel_iou": "", "pixel_f1_best": "oracle, per picture",
    "pixel_f1_best_global": "oracle, per set", "pixel_f1_at_7": "oracle, 7 % of genuine",
    "fp_area": "marked in genuine"}
IMAGE_METRICS = {
    "image_auc": "I-AUC", "image_acc": "", "image_sen": "", "image_spe": "", "image_f1": "",
    "image_f1_hm": "I-F1", "comb_f1": "C-F1"}
METRICS = PIXEL_METRICS | IMAGE_METRICS
BASELINES = ("all_ones", "centre", "edge")
ATTACKS = (                                # the grid of IMDL-BenCo, and half the size (ours)
    "jpeg:100", "jpeg:90", "jpeg:80", "jpeg:70", "jpeg:60", "jpeg:50",       # quality
    "blur:3", "blur:7", "blur:11", "blur:15", "blur:19", "blur:23",          # kernel, pixels
    "noise:3", "noise:7", "noise:11", "noise:15", "noise:19", "noise:23",    # variance of 0-255
    "size:50")                                                               # percent
COLUMNS = ("set", "path", "label", "score", "TP", "FP", "FN", "TN", "f1", "iou", "auc", "precision",
           "recall", "f1_best", "f1_at_7", "fp_area", "left_out", "error")       # per_image.csv


# ----------------------------------------------------------------------------------------- masks

def binarize(rgb, path):
    """A mask, PIL RGB, and its path -> (H, W) bool."""
    if path.stem.endswith("_edgemask"):              # Columbia: light or dark green, and red
        red, green, _ = rgb.split()
        return np.asarray(green) > np.asarray(red)                                # (H, W)
    values = np.asarray(rgb.convert("L"))                                         # (H, W)
    top = values.max()
    if top > 127 or path.suffix.lower() in (".jpg", ".jpeg"):
        return values > 127
    return values > top / 2                          # 0 and 1, or a dark palette


def read_mask(picture, size):
    """A Picture with a mask and its own (H, W) -> (H, W) bool in the mask's size, turned like its
    picture; data.BadInput if it cannot be read."""
    rgb = data.open_image(picture.mask, "black")
    mask = binarize(rgb, picture.mask)                                            # (H, W)
    if mask.mean() > 0.5 and INVERTED.search(str(picture.mask).lower()):
        mask = ~mask
    if mask.shape == size[::-1] != size:
        with Image.open(picture.path) as image:      # on its side: turn it as the picture was,
            turn = image.getexif().get(0x0112, 1)    # else anticlockwise (ours)
        image = Image.fromarray(mask)
        image.getexif()[0x0112] = turn if turn >= 5 else 8
        mask = np.asarray(ImageOps.exif_transpose(image))
    return mask


# -------------------------------------------------------------------------------------- formulas

def mean(values):
    """Mean of the values that are not None; None if there are none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def ratio(part, whole):
    """part / whole; None for 0 / 0."""
    return part / whole if whole else None


def harmonic(a, b):
    """Harmonic mean of two rates: 0 if both are 0, None if one is None."""
    if a is None or b is None:
        return None
    return ratio(2 * a * b, a + b) or 0.0


def rates(flags, truth):
    """Boolean arrays of one shape -> counts and rates; a rate is None for 0 / 0."""
    TP = int((flags & truth).sum())
    FP = int((flags & ~truth).sum())
    FN = int((~flags & truth).sum())
    TN = truth.size - TP - FP - FN
    return {
        "TP": TP, "FP": FP, "FN": FN, "TN": TN,
        "f1": ratio(2 * TP, 2 * TP + FP + FN), "iou": ratio(TP, TP + FP + FN),
        "precision": ratio(TP, TP + FP), "recall": ratio(TP, TP + FN),
        "specificity": ratio(TN, TN + FP), "accuracy": ratio(TP + TN, truth.size)}


def rank_auc(values, labels):
    """Probability that a value of label 1 exceeds one of label 0; a tie counts half. None if a
    label is missing. By ranks (Mann and Whitney): values [1, 2, 2, 3] have ranks [1, 2.5, 2.5, 4].
    """
    labels = np.asarray(labels, dtype=bool).ravel()                               # (n,)
    positives = int(labels.sum())
    negatives = labels.size - positives
    if positives == 0 or negatives == 0:
        return None

    _, place, times = np.unique(values, return_inverse=True, return_counts=True)
    mid_rank = np.cumsum(times) - (times - 1) / 2        # of each distinct value
    rank_sum = mid_rank[place.ravel()][labels].sum()
    smallest = positives * (positives + 1) / 2           # if all positives ranked lowest
    return float((rank_sum - smallest) / (positives * negatives))


def f1_curve(map, truth):
    """F1 of a picture -> (its best over all thresholds in [0, 1), (99,) at those of GRID)."""
    order = np.argsort(map, axis=None)[::-1]
    values = map.ravel()[order].astype(np.float64)                                # (n,) falling
    hits = np.cumsum(truth.ravel()[order])                                        # (n,)
    marked = np.arange(1, values.size + 1)                                        # (n,)
    f1 = 2 * hits / (marked + truth.sum())               # (n,) if the first 1, 2, .. n are marked

    # a threshold falls between two values: equal values stay together, and 0 exceeds none
    possible = np.append(values[:-1] > values[1:], values[-1] > 0)                # (n,)
    best = f1[possible].max(initial=0)
    above = np.searchsorted(-values, -GRID)              # (99,) how many values exceed each
    return float(best), np.append(0, f1)[above]


def interval(statistic, *columns):
    """95 % bootstrap interval [low, high] of statistic(*columns), resampling pictures.

    columns: lists of equal length, one entry per picture. None for fewer than two pictures.
    """
    columns = [np.asarray(column) for column in columns]
    n = len(columns[0])
    if n < 2:
        return None

    rng = np.random.default_rng(0)
    found = []
    for _ in range(RESAMPLES):
        drawn = rng.integers(0, n, n)
        found.append(statistic(*[column[drawn] for column in columns]))
    found = [value for value in found if value is not None]      # an AUC needs both classes
    return np.quantile(found, (0.025, 0.975)).tolist() if found else None


# ------------------------------------------------------------------------- attacks and baselines

def parse_attack(spec):
    """"jpeg:70" -> ("jpeg", 70); ValueError if there is no such attack."""
    kind, _, number = spec.partition(":")
    known = kind in ("jpeg", "blur", "noise", "size")
    if not known or not number.isdecimal() or not 1 <= int(number) <= 100:
        raise ValueError(f"found attack {spec!r}, expected jpeg:QUALITY, blur:KERNEL, "
                         "noise:VARIANCE or size:PERCENT with a number from 1 to 100: try jpeg:70")
    return kind, int(number)


def jpeg(image, quality):
    """Encode and decode a PIL RGB image, its colours at half the resolution as cameras do."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality, subsampling="4:2:0")
    return Image.open(file).convert("RGB")


def apply_attack(image, spec):
    """PIL RGB image after an attack such as "jpeg:70"; noise is always the same."""
    kind, value = parse_attack(spec)
    if kind == "jpeg":
        return jpeg(image, value)
    if kind == "noise":
        rng = np.random.default_rng(0)
        noise = rng.standard_normal((image.height, image.width, 3), dtype=np.float32)
        noisy = np.asarray(image) + value ** 0.5 * noise                          # (H, W, 3)
        return Image.fromarray((noisy + 0.5).clip(0, 255).astype(np.uint8))
    if kind == "size":
        size = [max(1, round(side * value / 100)) for side in image.size]
        return image.resize(size, Image.Resampling.BICUBIC)
    sigma = 0.3 * ((value - 1) / 2 - 1) + 0.8            # as OpenCV chooses it for a kernel
    return image.filter(ImageFilter.GaussianBlur(sigma))


def baselines(image):
    """Uninformed maps (H, W) of a PIL RGB picture, which a network must beat -> {name: map}."""
    x = np.linspace(-1, 1, image.width)[None]                                     # (1, W)
    y = np.linspace(-1, 1, image.height)[:, None]                                 # (H, 1)
    edges = ecpl.soft_edges(data.to_tensor(image)[None])                          # (1, 1, H, W)
    centre = np.exp(-2 * (x ** 2 + y ** 2))              # ours: sigma is a quarter of a side
    return {"all_ones": np.ones_like(centre), "centre": centre, "edge": edges[0, 0].numpy()}


# ----------------------------------------------------------------------------------- one picture

def resize(map, size):
    """A map, bilinearly resized to a mask's (H, W)."""
    map = torch.as_tensor(map)[None, None]                                        # (1, 1, .., ..)
    return F.interpolate(map, size, mode="bilinear", align_corners=False)[0, 0].numpy()


def pixel_scores(map, truth, threshold=None):
    """The metrics of one picture: map (H, W) in [0, 1], truth (H, W) bool -> dict.

    Without a manipulated pixel an F1 says nothing: then only counts, fp_area and 200 quantiles of
    the map. threshold: of pixel_f1_at_7, see `genuine_threshold`.
    """
    scores = rates(map > THRESHOLD, truth)
    if not truth.any():
        scores = {key: scores[key] for key in ("TP", "FP", "FN", "TN")}
        scores["fp_area"] = scores["FP"] / truth.size
        scores["quantiles"] = np.quantile(map, (np.arange(200) + 0.5) / 200)      # (200,)
        return scores

    scores["precision"] = scores["precision"] or 0.0
    scores["auc"] = rank_auc(map, truth)
    scores["f1_best"], scores["f1_on_grid"] = f1_curve(map, truth)
    if threshold is not None:
        scores["f1_at_7"] = rates(map > threshold, truth)["f1"]
    return scores


def genuine_threshold(scores):
    """The threshold above which GENUINE_SHARE of the pixels of genuine pictures lie, every picture
    with the same weight; None without genuine pictures. scores: dicts of `pixel_scores`."""
    quantiles = [each["quantiles"] for each in scores if "quantiles" in each]
    return np.quantile(quantiles, 1 - GENUINE_SHARE) if quantiles else None


def read_truth(picture, size):
    """A labelled Picture and its (H, W) -> (mask (H, W) bool, or None without a usable one;
    remarks for its row, {} if all is well)."""
    if picture.label == 0:
        return np.zeros(size, bool), {}                                           # (H, W)
    if not picture.mask:
        return None, {"left_out": "no mask (pixel metrics)"}
    try:
        truth = read_mask(picture, size)                                          # (H, W)
    except data.BadInput as error:
        return None, {"left_out": "unreadable mask (pixel metrics)", "error": str(error)}
    if not truth.any():
        return None, {"left_out": "empty mask (pixel metrics)"}
    return truth, {"left_out": "fully manipulated (pixel_auc)"} if truth.all() else {}


def measure(model, picture, attack, thresholds):
    """A labelled Picture -> (its row, {"model" or baseline: pixel_scores}).

    Without a mask to compare with there are no pixel_scores; a picture without an answer has no
    score in its row. thresholds: {"model" or baseline: `genuine_threshold`}.
    """
    row = {"path": str(picture.path), "label": picture.label}
    try:
        image = data.open_image(picture.path)
        attacked = apply_attack(image, attack) if attack else image
        result = infer.localize(model, attacked)
    except data.BadInput as error:
        return row | {"left_out": "no answer", "error": str(error)}, {}

    row["score"] = result.score
    truth, remarks = read_truth(picture, (image.height, image.width))
    row |= remarks
    if truth is None:
        return row, {}

    scores = {}
    for name, map in {"model": result.map, **baselines(attacked)}.items():
        scores[name] = pixel_scores(resize(map, truth.shape), truth, thresholds[name])
    own = {key: value for key, value in scores["model"].items() if key in COLUMNS}
    return row | own, scores


# ----------------------------------------------------------------------------------------- a set

def pixel_summary(scores):
    """Means over dicts of `pixel_scores`: pixel_* over pictures with a mask, fp_area over genuine
    ones; None where there are none."""
    masked = [each for each in scores if "f1" in each]
    summary = {}
    for name in ("f1", "auc", "precision", "recall", "iou", "f1_best", "f1_at_7"):
        summary[f"pixel_{name}"] = mean(each.get(name) for each in masked)
    curves = [each["f1_on_grid"] for each in masked]     # [(99,)]
    summary["pixel_f1_best_global"] = float(np.mean(curves, axis=0).max()) if masked else None
    summary["fp_area"] = mean(each.get("fp_area") for each in scores)
    return summary


def image_summary(scores, labels):
    """Metrics of image scores in [0, 1] against labels {0, 1}, both (n,); None for 0 / 0."""
    truth = np.array(labels, dtype=bool)                                          # (n,)
    found = rates(np.array(scores) > THRESHOLD, truth)
    sen = found["recall"]
    spe = found["specificity"]
    return {"image_auc": rank_auc(scores, truth), "image_acc": found["accuracy"],
            "image_sen": sen, "image_spe": spe, "image_f1": found["f1"] if truth.any() else None,
            "image_f1_hm": harmonic(sen, spe)}


def summarize(rows, scores, unlabelled):
    """Rows of a set, {map: [pixel_scores]}, number of pictures without label -> the summary."""
    answered = [row for row in rows if "score" in row]
    if not answered:
        reason = rows[0]["error"] if rows else f"{unlabelled} without a label"
        raise data.BadInput(f"found no picture that could be evaluated ({reason}), expected "
                            "genuine and manipulated ones: check the files and their labels")

    labels = [row["label"] for row in answered]
    points = [row["score"] for row in answered]
    f1 = [row["f1"] for row in answered if "f1" in row]
    auc = [row["auc"] for row in answered if row.get("auc") is not None]
    excluded = Counter(row["left_out"] for row in rows if "left_out" in row)
    excluded["no label"] = unlabelled
    summary = {"n": len(labels), "n_manipulated": labels.count(1), "n_genuine": labels.count(0),
               "n_masks": len(f1), "threshold": THRESHOLD,
               "excluded": dict(+excluded)}              # `+` drops counts of 0
    summary |= pixel_summary(scores["model"]) | image_summary(points, labels)
    summary["comb_f1"] = harmonic(summary["pixel_f1"], summary["image_f1_hm"])
    summary["intervals"] = {"pixel_f1": interval(np.mean, f1), "pixel_auc": interval(np.mean, auc),
                            "image_auc": interval(rank_auc, points, labels)}
    summary["baselines"] = {name: pixel_summary(scores[name]) for name in BASELINES}
    return summary


def evaluate(model, pictures, attack=None):
    """Metrics of an ecpl.SAPL and of the baselines on [data.Picture] -> (summary, rows).

    summary: what metrics.json holds for a set; `excluded` counts what was left out, {reason: n}.
    rows: one dict per labelled picture with keys of COLUMNS, genuine pictures first; `error` if a
    file could not be read. attack: see `apply_attack`. data.BadInput if there is nothing to do.
    """
    if attack:
        parse_attack(attack)                             # reject a wrong one before any work
    labelled = [picture for picture in pictures if picture.label is not None]
    scores = {name: [] for name in ("model", *BASELINES)}
    rows = []
    for label in (0, 1):                                 # genuine maps set the thresholds first
        thresholds = {name: genuine_threshold(found) for name, found in scores.items()}
        for picture in labelled:
            if picture.label != label:
                continue
            if sys.stderr.isatty():
                print(f"{len(rows)} of {len(labelled)}", end="\r", file=sys.stderr)
            row, found = measure(model, picture, attack, thresholds)
            rows.append(row)
            for name, values in found.items():
                scores[name].append(values)
    summary = summarize(rows, scores, len(pictures) - len(labelled))
    return summary | {"attack": attack}, rows


# ----------------------------------------------------------------------------------- the command

def read(name, limit):
    """A set -> (pictures, lines about unreadable files); prints what is wrong with it."""
    pictures, _, problems = data.read_set(name)
    if not any(picture.label is not None for picture in pictures):
        raise ValueError(f"found no labels in {name}, expected genuine and manipulated pictures: "
                         "put them into folders au/ and tp/, or write a list image,label,mask")

    bad = [line for line in problems if line.startswith("bad ")]
    notes = [line for line in problems if line not in bad]
    if len(notes) > NOTES:
        notes[NOTES:] = [f"and {len(notes) - NOTES} more: see `python data.py {name}`"]
    if limit and limit < len(pictures):
        notes.append(f"{limit} of its {len(pictures)} pictures, evenly spread")
        chosen = np.linspace(0, len(pictures) - 1, limit).round().astype(int)
        pictures = [pictures[i] for i in chosen]

    for line in bad:
        print(f"error: {line}", file=sys.stderr)
    for line in notes:
        print(f"note: {name}: {line}", file=sys.stderr)
    return pictures, bad


def cell(value):
    """A number, or None, as the table shows it."""
    return "null" if value is None else f"{value:.3f}"


def print_table(name, summary):
    """Print one set: the model with its intervals, beside the baselines."""
    left_out = [f"{number} {reason}" for reason, number in summary["excluded"].items()]
    print(f"\n{name}, attack: {summary['attack'] or 'none'}, threshold {THRESHOLD}\n"
          f"n {summary['n']}: {summary['n_genuine']} genuine, {summary['n_manipulated']} "
          f"manipulated, {summary['n_masks']} with a mask; left out: "
          f"{', '.join(left_out) or 'none'}")

    print(f"{'':42}{'model':>6}  {'95 % interval':14}" + "".join(f"{x:>9}" for x in BASELINES))
    for metric, meaning in METRICS.items():
        label = f"{metric} ({meaning})" if meaning else metric
        bounds = summary["intervals"].get(metric) or []
        text = " - ".join(cell(bound) for bound in bounds)
        line = f"{label:42}{cell(summary[metric]):>6}  {text:14}"
        if metric in PIXEL_METRICS:
            for baseline in summary["baselines"].values():
                line += f"{cell(baseline[metric]):>9}"
        print(line.rstrip())


def robustness(name, model, pictures, summary):
    """The set again after each attack -> rows of robustness.csv; the first is without attack."""
    rows = [summary | {"set": name, "attack": "none"}]
    for attack in ATTACKS:
        found, _ = evaluate(model, pictures, attack)
        rows.append(found | {"set": name})

    columns = ("pixel_f1", "pixel_auc", "image_auc", "image_acc", "fp_area")
    print(f"\n{'attack':12}" + "".join(f"{column:>11}" for column in columns))
    for row in rows:
        print(f"{row['attack']:12}" + "".join(f"{cell(row[column]):>11}" for column in columns))
    return rows


def write_csv(path, columns, rows):
    with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def prepare(args):
    """Check the call -> ({set: (pictures, lines about unreadable files)}, model)."""
    if args.attack:
        parse_attack(args.attack)
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"found --limit {args.limit}, expected at least 1: leave it out for all")
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
    sets = {name: read(name, args.limit) for name in args.sets}
    return sets, infer.load(args.checkpoint, args.device, args.precision)


def run(sets, model, args):
    """Evaluate each set, print and write -> exit status."""
    print(f"model: {args.checkpoint or clip.TINY}; intervals: {RESAMPLES} resamples of pictures")
    summaries = {}
    images = []                                          # rows of per_image.csv
    grid = []                                            # rows of robustness.csv
    status = 0
    for name, (pictures, bad) in sets.items():
        summary, rows = evaluate(model, pictures, args.attack)
        unreadable = [line for line in bad if line.startswith("bad file")]
        if unreadable:
            summary["excluded"]["unreadable"] = len(unreadable)
        failed = [row for row in rows if "error" in row]
        for row in failed:
            reason = row["error"].removeprefix(f"{row['path']}: ")
            print(f"error: {row['path']}: {reason}", file=sys.stderr)
        if bad or failed:
            status = 1

        summaries[name] = summary
        images += [{"set": name} | row for row in rows]
        print_table(name, summary)
        white = summary["baselines"]["all_ones"]["pixel_precision"]
        if white and white > 0.5:
            print(f"note: {name}: masks inverted? {white:.0%} of their pixels are white",
                  file=sys.stderr)
        if args.robustness:
            grid += robustness(name, model, pictures, summary)
        if args.out:                                     # after each set: an interruption keeps it
            text = json.dumps(summaries, indent=1)
            Path(args.out, "metrics.json").write_text(text, encoding="utf-8")
            write_csv(Path(args.out, "per_image.csv"), COLUMNS, images)
        if args.out and grid:
            write_csv(Path(args.out, "robustness.csv"), ("set", "attack", "n", *METRICS), grid)

    if len(summaries) > 1:
        combined = mean(summary["comb_f1"] for summary in summaries.values())
        print(f"\ncomb_f1 (C-F1), mean over the sets: {cell(combined)}")
    return status


def main(arguments=None):
    """The command line -> exit status; argparse exits with 2 on what it does not know."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("sets", nargs="+", metavar="SET", help="folder or list, with labels")
    parser.add_argument("--checkpoint", help="of train.py (default: the shipped weights/tiny.pt)")
    parser.add_argument("--out", metavar="DIR", help="for metrics.json, per_image.csv and, with "
                        "--robustness, robustness.csv")
    attacks = parser.add_mutually_exclusive_group()
    attacks.add_argument("--attack", help="jpeg:QUALITY, blur:KERNEL, noise:VARIANCE, size:PERCENT")
    attacks.add_argument("--robustness", action="store_true", help=f"also {', '.join(ATTACKS)}")
    parser.add_argument("--limit", type=int, metavar="N",
                        help="N pictures of each set, evenly spread")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    parser.add_argument("--precision", default="auto", help="auto, bf16, fp32")
    args = parser.parse_args(arguments)
    try:
        sets, model = prepare(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        return run(sets, model, args)
    except (data.BadInput, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: with --out, the finished sets are kept", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
