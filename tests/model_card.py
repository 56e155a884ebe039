"""The numbers of the README's model card, with intervals, and the mean map. Run by hand.

    python tests/model_card.py --sets NAME=SET [NAME=SET ..] [--checkpoint FILE ..] [--figure PNG]
                               [--processing GENUINE_PHOTOS]

For every set and checkpoint (default: the shipped model) a row of the README's table, at the thresholds
of the checkpoint, beside the trivial maps; 95 % bootstrap intervals over pictures. The figure is the
mean map over the genuine pictures of all sets, each resized to 16 x 16: a model that has learned where
manipulations usually lie, and not what they look like, would show a bright middle. --processing adds
what each part of the map's processing brings, every time with a threshold set on these photos alone.
"""
import argparse
import itertools
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import data                                                     # noqa: E402 (path first)
import infer                                                    # noqa: E402
import train                                                    # noqa: E402

COLUMNS = ("pixel_auc", "pixel_f1", "pixel_f1_best_global", "image_auc", "fp_area")


def interval(statistic, *columns, times=1000):
    """95 % bootstrap interval of statistic(*columns) over the rows of equally long columns."""
    rng, columns = np.random.default_rng(0), [np.asarray(column) for column in columns]
    picks = rng.integers(0, len(columns[0]), (times, len(columns[0])))
    found = [statistic(*(column[pick] for column in columns)) for pick in picks]
    low, high = np.quantile([value for value in found if value is not None], (0.025, 0.975))
    return f"{low:.3f}-{high:.3f}"


def print_rows(label, summary, rows):
    """Markdown rows of a model and, below, of the trivial maps."""
    for name, values in {label: summary, **summary["baselines"]}.items():
        cells = [values.get(column) for column in COLUMNS]
        print(f"| {name} | " + " | ".join("" if x is None else f"{x:.3f}" for x in cells) + " |")
    masked, scored = ([row for row in rows if key in row] for key in ("f1", "score"))
    auc = [row["auc"] for row in masked if row["auc"] is not None]
    print(f"    95 %: pixel AUC {interval(np.mean, auc)}, "
          f"pixel F1 {interval(np.mean, [row['f1'] for row in masked])}, image AUC "
          + interval(infer.rank_auc, [r["score"] for r in scored], [r["label"] for r in scored]))
    genuine = [row["score"] for row in scored if not row["label"]]
    called = np.mean(np.array(genuine) > summary["score_threshold"])
    print(f"    genuine pictures called manipulated: {called:.3f}")


def mean_map(model, pictures):
    """Mean of the maps of genuine pictures, each at 16 x 16 -> (16, 16) in [0, 1]."""
    maps = [torch.as_tensor(model.localize(p.path).map)[None, None] for p in pictures if p.label == 0]
    small = [F.interpolate(each, (16, 16), mode="area") for each in maps]      # [(1, 1, 16, 16)]
    return torch.cat(small).mean(dim=(0, 1)).numpy()                           # (16, 16)


def print_processing(model, photos, sets):
    """Markdown rows of the map without processing, with each part of it, and with all."""
    whole = infer.ecpl.regions
    steps = {"as it is": lambda grid, radius: grid, "closed, filled": lambda grid, radius: whole(grid),
             "smoothed": infer.ecpl.smooth, "closed, filled, smoothed": whole}
    print("\n| set | processing | threshold | " + " | ".join(COLUMNS) + " |\n" + "|---" * 8 + "|")
    for (name, pictures), (label, step) in itertools.product(sets.items(), steps.items()):
        infer.ecpl.regions = step
        train.set_thresholds(model, photos)
        summary, _ = infer.evaluate(model, pictures, threshold=model.threshold,
                                    score_threshold=model.score_threshold)
        print(f"| {name} | {label} | {model.threshold:.3f} | "
              + " | ".join(f"{summary[column]:.3f}" for column in COLUMNS) + " |", flush=True)
    infer.ecpl.regions = whole


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sets", nargs="+", required=True, help="NAME=FOLDER or list, with labels")
    parser.add_argument("--checkpoint", nargs="*", default=[None], help="default: the shipped model")
    parser.add_argument("--figure", help="PNG for the mean map of the first checkpoint")
    parser.add_argument("--processing", help="folder of genuine photos that trained nothing")
    args = parser.parse_args()
    sets = {name: data.read_set(path)[0] for name, path in (pair.split("=", 1) for pair in args.sets)}
    models = {str(path or "shipped model"): infer.SAPL.load(path) for path in args.checkpoint}
    for name, pictures in sets.items():
        print(f"\n| {name} | " + " | ".join(COLUMNS) + " |\n" + "|---" * (1 + len(COLUMNS)) + "|")
        for label, model in models.items():
            print_rows(label, *infer.evaluate(model, pictures, threshold=model.threshold,
                                              score_threshold=model.score_threshold))
    if args.figure:
        model, pictures = next(iter(models.values())), [p for each in sets.values() for p in each]
        grid = mean_map(model, pictures)
        y, x = np.mgrid[-1:1:16j, -1:1:16j]
        centre = np.exp(-2 * (x ** 2 + y ** 2))
        print(f"\nmean map of genuine pictures: {grid.min():.3f} to {grid.max():.3f}, middle 8 x 8 "
              f"{grid[4:12, 4:12].mean():.3f}, the rest {(grid.sum() - grid[4:12, 4:12].sum()) / 192:.3f}"
              f", correlation with a centred Gaussian {np.corrcoef(grid.ravel(), centre.ravel())[0, 1]:.2f}")
        heat = Image.fromarray((255 * grid + 0.5).astype(np.uint8))
        infer.colour(heat).resize((256, 256), Image.Resampling.NEAREST).save(args.figure)
    if args.processing:
        photos = sorted(Path(args.processing).iterdir())
        print_processing(next(iter(models.values())), photos, sets)


if __name__ == "__main__":
    main()
