"""How good a model is: the field's metrics on labelled pictures, beside maps that know nothing.

    python tests/evaluate.py SET [SET ..] --out DIR      a table for each set, and files
    python tests/evaluate.py SET --attack jpeg:70        on pictures that were attacked first
    python tests/evaluate.py SET --robustness            after each attack of ATTACKS, too

SET is a folder or list as data.py reads it. Map and score are cut at 0.5: no other threshold
exists, and a metric that looks for a better one is an oracle and says so. Exit status: 0 all done,
1 some pictures could not be read (named, the others done), 2 wrong call or nothing to evaluate.

Reading order: formulas -> attacks and baselines -> one picture -> a set -> the command. Label 1
and mask 1 = manipulated. Shapes: H, W pixels of a picture or mask; n whatever is counted.
"""
import argparse
import csv
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
ORACLE = np.arange(1, 100) / 100           # (99,) what pixel_f1_best_global may choose from
RESAMPLES = 1000                           # of the bootstrap
NOTES = 10                                 # problems of a set that are printed in full

PIXEL_METRICS = ("pixel_f1", "pixel_auc", "pixel_precision", "pixel_recall", "pixel_iou",
                 "pixel_f1_best", "pixel_f1_best_global", "fp_area")
METRICS = (*PIXEL_METRICS, "image_auc", "image_acc", "image_sen", "image_spe", "image_f1",
           "image_f1_hm", "comb_f1")
MEANING = {"pixel_f1": "P-F1", "image_auc": "I-AUC", "image_f1_hm": "I-F1", "comb_f1": "C-F1",
           "pixel_f1_best": "oracle, per picture", "pixel_f1_best_global": "oracle, per set",
           "fp_area": "marked in genuine"}
BASELINES = ("all_ones", "centre", "edge")
COUNTS = ("TP", "FP", "FN", "TN")
ATTACKS = (                                # the grid of IMDL-BenCo, and half the size (ours)
    "jpeg:100", "jpeg:90", "jpeg:80", "jpeg:70", "jpeg:60", "jpeg:50",       # quality
    "blur:3", "blur:7", "blur:11", "blur:15", "blur:19", "blur:23",          # kernel, pixels
    "noise:3", "noise:7", "noise:11", "noise:15", "noise:19", "noise:23",    # variance of 0-255
    "size:50")                                                               # percent
ROW = ("set", "path", "label", "score", *COUNTS, "f1", "iou", "auc", "precision", "recall",
       "f1_best", "fp_area", "left_out", "error")                    # of per_image.csv


# ----------------------------------------------------------------------------------------- masks

def binarize(image, path):
    """A mask image of any kind -> (H, W) bool."""
    rgb = data.to_rgb(image, "black")
    if path.stem.endswith("_edgemask"):              # Columbia: green, bright or dark, and red
        red, green, _ = rgb.split()
        return np.asarray(green) > np.asarray(red)                                # (H, W)
    values = np.asarray(rgb.convert("L"))                                         # (H, W)
    top = values.max()
    if top > 127 or image.format == "JPEG":
        return values > 127
    return values > top / 2                          # 0 and 1, or a dark palette


def read_mask(picture):
    """Picture -> mask (H, W) uint8 {0, 1} of its own size, upright as the picture; ValueError if
    there is none."""
    size, turn = data.picture_size(picture.path)
    if picture.label == 0:
        return np.zeros(size, np.uint8)                                           # (H, W)
    if not picture.mask:
        raise ValueError(f"found no mask for {picture.path}, expected one to compare with")
    with data.opened(picture.mask) as image:
        mask = Image.fromarray(binarize(image, picture.mask) != picture.inverted)
    W, H = mask.size
    if (W, H) == size != (H, W):                     # on its side: as its picture was, else
        mask.getexif()[0x0112] = turn if turn >= 5 else 8              # ours: anticlockwise
        mask = ImageOps.exif_transpose(mask)
    return np.asarray(mask, dtype=np.uint8)                                       # (H, W)


def right_way_round(pictures, problems):
    """Pictures of a set whose masks are black where manipulated, as NIST16's and DSO-1's are, are
    marked so; masks that are mostly white without such a name are a problem."""
    masked = [picture for picture in pictures if picture.mask][:16]
    if not masked or masked[0].inverted:
        return pictures
    white = np.mean([read_mask(picture).mean() for picture in masked])
    if white <= 0.5:
        return pictures
    if re.search(r"(?<![a-z])(nist|nc2016|dso|splicing-)", str(masked[0].mask).lower()):
        return [picture._replace(inverted=True) for picture in pictures]
    problems.append(f"masks inverted? {white:.0%} of their pixels are white")
    return pictures


# -------------------------------------------------------------------------------------- formulas

def mean(values):
    """Mean of what is not None; None of nothing."""
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
        "f1": ratio(2 * TP, 2 * TP + FP + FN),
        "iou": ratio(TP, TP + FP + FN),
        "precision": ratio(TP, TP + FP),
        "recall": ratio(TP, TP + FN),
        "specificity": ratio(TN, TN + FP),
        "accuracy": ratio(TP + TN, truth.size),
    }


def rank_auc(values, labels):
    """Chance that a value of label 1 lies above one of label 0, a tie counts half; None if a label
    is missing. By ranks (Mann and Whitney): values [1, 2, 2, 3] have ranks [1, 2.5, 2.5, 4]."""
    labels = np.asarray(labels, dtype=bool).ravel()                               # (n,)
    positives = int(labels.sum())
    negatives = labels.size - positives
    if positives == 0 or negatives == 0:
        return None

    _, place, times = np.unique(values, return_inverse=True, return_counts=True)
    mid_rank = np.cumsum(times) - (times - 1) / 2        # of every distinct value
    rank_sum = mid_rank[place.ravel()][labels].sum()
    smallest = positives * (positives + 1) / 2           # with every positive below
    return float((rank_sum - smallest) / (positives * negatives))


def f1_curve(map, truth):
    """F1 of a picture over thresholds -> (the best of all in [0, 1), (99,) at those of ORACLE)."""
    order = np.argsort(map, axis=None)[::-1]
    values = map.ravel()[order].astype(np.float64)                                # (n,) falling
    hits = np.cumsum(truth.ravel()[order])                                        # (n,)
    marked = np.arange(1, values.size + 1)                                        # (n,)
    f1 = 2 * hits / (marked + truth.sum())               # (n,) if the first 1, 2, .. n are marked

    # a threshold lies between two values: equal ones stay together, and 0 is above none
    possible = np.append(values[:-1] > values[1:], values[-1] > 0)                # (n,)
    best = f1[possible].max(initial=0)
    above = np.searchsorted(-values, -ORACLE)            # (99,) how many values exceed each
    return float(best), np.append(0, f1)[above]


def interval(statistic, *columns):
    """95 % bootstrap interval [low, high] of statistic(*columns), pictures drawn with replacement.

    columns: lists of one length, an entry a picture. None for fewer than two pictures.
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
    if not found:
        return None
    return np.quantile(found, (0.025, 0.975)).tolist()


# ------------------------------------------------------------------------- attacks and baselines

def parse_attack(spec):
    """"jpeg:70" -> ("jpeg", 70); ValueError if there is no such attack."""
    kind, _, number = spec.partition(":")
    known = kind in ("jpeg", "blur", "noise", "size")
    if not known or not number.isdecimal() or not 1 <= int(number) <= 100:
        raise ValueError(f"found attack {spec!r}, expected jpeg:QUALITY, blur:KERNEL, "
                         "noise:VARIANCE or size:PERCENT with a number from 1 to 100: try jpeg:70")
    return kind, int(number)


def apply_attack(image, spec):
    """PIL RGB image after an attack such as "jpeg:70"; always the same noise."""
    kind, value = parse_attack(spec)
    if kind == "jpeg":
        return data.jpeg(image, value, subsampling=2)
    if kind == "noise":
        return data.add_noise(image, value ** 0.5, np.random.default_rng(0))
    if kind == "size":
        size = [max(1, round(side * value / 100)) for side in image.size]
        return image.resize(size, Image.Resampling.BICUBIC)
    sigma = 0.3 * ((value - 1) / 2 - 1) + 0.8            # OpenCV's for a kernel
    return image.filter(ImageFilter.GaussianBlur(sigma))


def baselines(image):
    """Maps (H, W) of a PIL RGB picture by rules that know nothing: what a network must beat."""
    x = np.linspace(-1, 1, image.width)[None]                                     # (1, W)
    y = np.linspace(-1, 1, image.height)[:, None]                                 # (H, 1)
    edges = ecpl.soft_edges(data.to_tensor(image)[None])                          # (1, 1, H, W)
    return {
        "all_ones": np.ones((image.height, image.width)),
        "centre": np.exp(-2 * (x ** 2 + y ** 2)),        # ours: sigma is a quarter of a side
        "edge": edges[0, 0].numpy(),
    }


# ----------------------------------------------------------------------------------- one picture

def resize(map, size):
    """A map, bilinearly resized to a mask's (H, W)."""
    map = torch.as_tensor(map)[None, None]                                        # (1, 1, .., ..)
    return F.interpolate(map, size, mode="bilinear", align_corners=False)[0, 0].numpy()


def pixel_scores(map, truth):
    """The metrics of one picture at 0.5: map (H, W) in [0, 1], truth (H, W) bool -> dict.

    Without a manipulated pixel there are counts and fp_area alone: then an F1 means nothing.
    """
    scores = rates(map > THRESHOLD, truth)
    if not truth.any():
        counts = {key: scores[key] for key in COUNTS}
        return counts | {"fp_area": scores["FP"] / truth.size}
    scores["precision"] = scores["precision"] or 0.0
    scores["auc"] = rank_auc(map, truth)
    scores["f1_best"], scores["f1_at"] = f1_curve(map, truth)
    return scores


def measure(model, picture, attack, raw):
    """A labelled picture -> (its row, {"model" or baseline: pixel_scores}, empty without a mask).

    Raises ValueError or MemoryError if it cannot be read or answered.
    """
    image = data.open_image(picture.path)
    if attack:
        image = apply_attack(image, attack)
    result = model.localize(image, raw)
    row = {"path": str(picture.path), "label": picture.label, "score": result.score}

    # what has no mask to compare with has an image score alone
    if picture.label == 1 and not picture.mask:
        return row | {"left_out": "no mask (pixel metrics)"}, {}
    truth = read_mask(picture).astype(bool)                                  # (H, W)
    if picture.label == 1 and not truth.any():
        return row | {"left_out": "empty mask (pixel metrics)"}, {}
    if truth.all():
        row["left_out"] = "fully manipulated (pixel_auc)"

    scores = {"model": pixel_scores(resize(result.map, truth.shape), truth)}
    for name, map in baselines(image).items():
        scores[name] = pixel_scores(resize(map, truth.shape), truth)
    own = {key: value for key, value in scores["model"].items() if key in ROW}
    return row | own, scores


# ----------------------------------------------------------------------------------------- a set

def pixel_summary(scores):
    """Means over the dicts of `pixel_scores`: pixel_* over pictures with a mask, fp_area over
    genuine ones; None where there are none."""
    masked = [each for each in scores if "f1" in each]
    summary = {}
    for name in ("f1", "auc", "precision", "recall", "iou", "f1_best"):
        summary[f"pixel_{name}"] = mean(each[name] for each in masked)
    curves = [each["f1_at"] for each in masked]          # [(99,)]
    summary["pixel_f1_best_global"] = float(np.mean(curves, axis=0).max()) if masked else None
    summary["fp_area"] = mean(each.get("fp_area") for each in scores)
    return summary


def image_summary(scores, labels):
    """Metrics of image scores in [0, 1] against labels {0, 1}, both (n,); None for 0 / 0."""
    truth = np.array(labels, dtype=bool)                                          # (n,)
    found = rates(np.array(scores) > THRESHOLD, truth)
    return {
        "image_auc": rank_auc(scores, truth),
        "image_acc": found["accuracy"],
        "image_sen": found["recall"],
        "image_spe": found["specificity"],
        "image_f1": found["f1"] if truth.any() else None,
        "image_f1_hm": harmonic(found["recall"], found["specificity"]),
    }


def intervals(rows):
    """95 % intervals of three metrics from the rows of a set -> {metric: [low, high] or None}."""
    f1 = [row["f1"] for row in rows if "f1" in row]
    auc = [row["auc"] for row in rows if row.get("auc") is not None]
    scores = [row["score"] for row in rows]
    labels = [row["label"] for row in rows]
    return {"pixel_f1": interval(np.mean, f1), "pixel_auc": interval(np.mean, auc),
            "image_auc": interval(rank_auc, scores, labels)}


def summarize(rows, scores, unlabelled):
    """Rows of a set, {map: [pixel_scores]}, number of pictures without label -> the summary."""
    answered = [row for row in rows if "error" not in row]
    if not answered:
        reason = rows[0]["error"] if rows else f"{unlabelled} without a label"
        raise ValueError(f"found no picture that could be evaluated ({reason}), expected genuine "
                         "and manipulated ones: check the files and their labels")

    labels = [row["label"] for row in answered]
    excluded = Counter(row["left_out"] for row in rows if "left_out" in row)
    excluded["no label"] = unlabelled
    summary = {
        "n": len(labels),
        "n_manipulated": labels.count(1),
        "n_genuine": labels.count(0),
        "n_masks": len([row for row in answered if "f1" in row]),
        "excluded": dict(+excluded),                     # without what did not happen
        "threshold": THRESHOLD,
    }
    summary |= pixel_summary(scores["model"])
    summary |= image_summary([row["score"] for row in answered], labels)
    summary["comb_f1"] = harmonic(summary["pixel_f1"], summary["image_f1_hm"])
    summary["intervals"] = intervals(answered)
    summary["baselines"] = {name: pixel_summary(scores[name]) for name in BASELINES}
    return summary


def evaluate(model, pictures, *, attack=None, raw=False):
    """Metrics of an infer.SAPL and of the baselines on [data.Picture] -> (summary, rows).

    summary: what metrics.json holds of a set; `excluded` says what could not count, {reason: n}.
    rows: a dict a labelled picture with keys of ROW, `error` if it could not be read. attack: see
    `apply_attack`. raw: see infer. Raises ValueError if there is nothing to evaluate.
    """
    if attack:
        parse_attack(attack)                             # a wrong one stops here
    labelled = [picture for picture in pictures if picture.label is not None]

    rows = []
    scores = {name: [] for name in ("model", *BASELINES)}
    for number, picture in enumerate(labelled, start=1):
        if sys.stderr.isatty():
            print(f"{number} of {len(labelled)}", end="\r", file=sys.stderr)
        try:
            row, found = measure(model, picture, attack, raw)
        except (ValueError, MemoryError) as error:       # the picture's fault: go on
            reason = str(error).removeprefix(f"{picture.path}: ") or type(error).__name__
            row = {"path": str(picture.path), "label": picture.label, "left_out": "no answer",
                   "error": reason}
            found = {}

        rows.append(row)
        for name, values in found.items():
            scores[name].append(values)
    summary = summarize(rows, scores, len(pictures) - len(labelled))
    return summary | {"attack": attack, "raw": raw}, rows


# ----------------------------------------------------------------------------------- the command

def read(name, limit):
    """A set -> (pictures, number of unreadable files); says what is wrong with it."""
    pictures, report = data.read_set(name)
    pictures = right_way_round(pictures, report.problems)
    if not any(picture.label is not None for picture in pictures):
        raise ValueError(f"found no labels in {name}, expected genuine and manipulated pictures: "
                         "put them into folders au/ and tp/, or write a list image,label,mask")

    unreadable = [line for line in report.problems if line.startswith("bad file")]
    notes = [line for line in report.problems if line not in unreadable]
    if len(notes) > NOTES:
        notes[NOTES:] = [f"and {len(notes) - NOTES} more: see `python data.py {name}`"]
    if limit and limit < len(pictures):
        notes.append(f"{limit} of its {len(pictures)} pictures, evenly spread")
        chosen = np.linspace(0, len(pictures) - 1, limit).round().astype(int)
        pictures = [pictures[i] for i in chosen]

    for line in unreadable:
        print(f"error: {line}", file=sys.stderr)
    for line in notes:
        print(f"note: {name}: {line}", file=sys.stderr)
    return pictures, len(unreadable)


def cell(value):
    """A number, or None, as a table shows it."""
    return "null" if value is None else f"{value:.3f}"


def print_table(name, summary):
    """One set on the screen: the model with its intervals, the baselines beside."""
    left_out = [f"{number} {reason}" for reason, number in summary["excluded"].items()]
    print(f"\n{name}, attack: {summary['attack'] or 'none'}, threshold {THRESHOLD}\n"
          f"n {summary['n']}: {summary['n_genuine']} genuine, {summary['n_manipulated']} "
          f"manipulated, {summary['n_masks']} with a mask; left out: "
          f"{', '.join(left_out) or 'none'}")

    print(f"{'':42}{'model':>6}  {'95 % interval':14}" + "".join(f"{x:>9}" for x in BASELINES))
    for metric in METRICS:
        label = f"{metric} ({MEANING[metric]})" if metric in MEANING else metric
        bounds = summary["intervals"].get(metric) or []
        text = " - ".join(cell(bound) for bound in bounds)
        line = f"{label:42}{cell(summary[metric]):>6}  {text:14}"
        if metric in PIXEL_METRICS:
            for baseline in summary["baselines"].values():
                line += f"{cell(baseline[metric]):>9}"
        print(line.rstrip())


def write_csv(path, columns, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def robustness(name, model, pictures, summary, raw):
    """The set again after each attack -> rows of robustness.csv; the first: without attack."""
    rows = [summary | {"set": name, "attack": "none"}]
    for attack in ATTACKS:
        found, _ = evaluate(model, pictures, attack=attack, raw=raw)
        rows.append(found | {"set": name, "attack": attack})

    columns = ("pixel_f1", "pixel_auc", "image_auc", "image_acc", "fp_area")
    print(f"\n{'attack':12}" + "".join(f"{column:>11}" for column in columns))
    for row in rows:
        print(f"{row['attack']:12}" + "".join(f"{cell(row[column]):>11}" for column in columns))
    return rows


def write(out, summaries, images, grid):
    """metrics.json, per_image.csv and, if there is a grid of attacks, robustness.csv."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "metrics.json").write_text(json.dumps(summaries, indent=1), encoding="utf-8")
    write_csv(out / "per_image.csv", ROW, images)
    if grid:
        write_csv(out / "robustness.csv", ("set", "attack", "n", *METRICS), grid)


def check(args):
    """Refuse a wrong call before anything is read: ValueError of one line."""
    if args.attack:
        parse_attack(args.attack)
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"found --limit {args.limit}, expected at least 1: leave it out for all")
    if args.out and Path(args.out).exists() and not Path(args.out).is_dir():
        raise ValueError(f"found a file, {args.out}, expected a folder: choose another --out")


def run(args):
    """Evaluate every set, print and write -> exit status."""
    check(args)
    sets = {name: read(name, args.limit) for name in dict.fromkeys(args.sets)}
    model = infer.SAPL.load(args.checkpoint, args.device, args.precision)
    print(f"model: {args.checkpoint or clip.TINY}; intervals: {RESAMPLES} resamples of pictures")

    summaries = {}
    images = []                                          # rows of per_image.csv
    grid = []                                            # rows of robustness.csv
    status = 0
    for name, (pictures, unreadable) in sets.items():
        summary, rows = evaluate(model, pictures, attack=args.attack, raw=args.raw)

        failed = [row for row in rows if "error" in row]
        for row in failed:
            print(f"error: {row['path']}: {row['error']}", file=sys.stderr)
        if unreadable:
            summary["excluded"]["unreadable"] = unreadable
        if unreadable or failed:
            status = 1

        summaries[name] = summary
        print_table(name, summary)
        images += [{"set": name} | row for row in rows]

        if args.robustness:
            grid += robustness(name, model, pictures, summary, args.raw)
        if args.out:                                     # after every set: an end keeps the rest
            write(Path(args.out), summaries, images, grid)

    if len(summaries) > 1:
        values = [summary["comb_f1"] for summary in summaries.values()]
        print(f"\ncomb_f1 (C-F1), mean over the sets: {cell(mean(values))}")
    return status


def parse(arguments=None):
    """The command line. Exits with status 2 on what it does not know."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("sets", nargs="+", metavar="SET", help="folder or list, with labels")
    parser.add_argument("--checkpoint", metavar="FILE",
                        help="file that train.py wrote (default: the shipped weights/tiny.pt)")
    parser.add_argument("--out", metavar="DIR", help="folder for metrics.json, per_image.csv and, "
                        "with --robustness, robustness.csv")
    attacks = parser.add_mutually_exclusive_group()
    attacks.add_argument("--attack", help="first jpeg:QUALITY, blur:KERNEL or noise:VARIANCE")
    attacks.add_argument("--robustness", action="store_true", help=f"also {', '.join(ATTACKS)}")
    parser.add_argument("--raw", action="store_true",
                        help="the map before it is smoothed")
    parser.add_argument("--limit", type=int, metavar="N", help="N pictures of each set, spread")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default auto)")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto",
                        help="of matrix products (default auto: bf16 where the hardware has it)")
    return parser.parse_args(arguments)


def main(arguments=None):
    args = parse(arguments)
    try:
        return run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: with --out, the sets that were finished are kept", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
