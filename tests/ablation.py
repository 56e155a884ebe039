"""What each part of SAPL brings: one short training with parts switched on and off. Run by hand.

    python tests/ablation.py --clip FILE --photos GENUINE_PHOTOS --sets NAME=FOLDER .. [--seeds 3]

Every eighth photo is held out: synthetic manipulations of these are the set "synthetic". Each run
is one `train.py` with image labels only; masks measure, they never train. The numbers of finished
runs are kept in --out and not made again, so an interrupted ablation goes on. Prints a Markdown
table, mean +- std over seeds.
"""
import argparse
import csv
import shutil
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch                                                    # noqa: E402 (path first)
from PIL import Image                                           # noqa: E402

import data                                                     # noqa: E402
import infer                                                    # noqa: E402
import train                                                    # noqa: E402

METRICS = ("pixel_auc", "pixel_f1", "pixel_f1_best_global", "image_auc")
VARIANTS = {
    "multiple instances, no text": {"prompts": "none", "hecl": 0.0},
    "plain learned prompt": {"prompts": "plain", "hecl": 0.0},
    "+ attention to patches (control)": {"prompts": "patches", "hecl": 0.0},
    "+ ECPL": {"prompts": "edges", "hecl": 0.0},
    "+ HECL": {"prompts": "plain"},
    "+ ECPL + HECL (SAPL)": {},
    "SAPL, one level": {"levels": (12,)},
    "SAPL, qq + kk attention": {"dense": "qqkk"},
    "SAPL, edges from features": {"edge_source": "features"},
    "SAPL, batch only, no queue": {"hecl_queue": 0},
    "SAPL, mosaics 2 x 2": {"mosaic": 2},
}


def prepare(photos, out, count, seed=1):
    """Split the photos -> (folder to train on, folder of the held-out set).

    The set has `count` pictures, every second one manipulated. Folders already there are kept.
    """
    files = sorted(Path(photos).iterdir())
    kept, held = out / "photos", out / "synthetic"
    if not held.is_dir():
        kept.mkdir(parents=True)
        for i, path in enumerate(files):
            if i % 8:
                shutil.copy(path, kept / path.name)
        source = data.SynthesisSet([p for i, p in enumerate(files) if i % 8 == 0],
                                   size=256, count=count, seed=seed)
        for name in ("au", "tp", "mask"):
            (held / name).mkdir(parents=True)
        for i in range(count):
            image, mask, _ = source.make(i // 2, i % 2)
            Image.fromarray(image).save(held / ("tp" if i % 2 else "au") / f"{i:04d}.png")
            if i % 2:
                Image.fromarray(mask * 255).save(held / "mask" / f"{i:04d}.png")
    return kept, held


def run(name, changes, seed, args, kept, sets):
    """Train one variant with one seed, measure it -> rows for the table."""
    out = args.out / f"{name}-{seed}".replace(" ", "_").replace("/", "_")
    shutil.rmtree(out, ignore_errors=True)
    config = train.Config(synthesize=str(kept), out=str(out), clip=args.clip, seed=seed, size=64,
                          count=args.count, epochs=1, batch=32, lr=2e-3, val=0.03, workers=0,
                          **changes)
    best = train.train(config)
    model = infer.SAPL.load(best, "cpu")
    rows = []
    for set_name, folder in sets.items():
        summary, _ = infer.evaluate(model, data.read_set(folder)[0][:: args.every], raw=True)
        baselines = {f"({k})": v for k, v in summary["baselines"].items()}
        first = name == next(iter(VARIANTS)) and seed == 0
        for label, values in {name: summary, **(baselines if first else {})}.items():
            rows.append({"variant": label, "seed": seed, "set": set_name, "n": summary["n"]}
                        | {metric: values.get(metric, "") for metric in METRICS})
    shutil.rmtree(out)
    return rows


def table(rows):
    """Print the rows of the CSV as a Markdown table: METRICS for each set, mean +- std."""
    sets = list(dict.fromkeys(row["set"] for row in rows))
    print("| variant | " + " | ".join(f"{s}: {m}" for s in sets for m in METRICS) + " |")
    print("|---" * (1 + len(sets) * len(METRICS)) + "|")
    for name in dict.fromkeys(row["variant"] for row in rows):
        cells = []
        for s in sets:
            for metric in METRICS:
                values = [float(row[metric]) for row in rows
                          if (row["variant"], row["set"]) == (name, s) and row[metric]]
                cells.append(f"{statistics.mean(values):.3f}" if values else "-")
                if len(values) > 1 and not name.startswith("("):
                    cells[-1] += f" +- {statistics.stdev(values):.3f}"
        print(f"| {name} | " + " | ".join(cells) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--clip", required=True,
                        help="pretrained CLIP, a name or file of clip.load")
    parser.add_argument("--photos", required=True, help="folder of genuine photos")
    parser.add_argument("--sets", nargs="*", default=[],
                        help="NAME=FOLDER of more test sets with masks")
    parser.add_argument("--every", type=int, default=1,
                        help="measure on every n-th picture of a set")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--count", type=int, default=4096, help="training pictures of a run")
    parser.add_argument("--only", nargs="*", help="variants; default all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    kept, held = prepare(args.photos, args.out, 200)
    sets = {"synthetic": held} | dict(pair.split("=", 1) for pair in args.sets)
    done = args.out / "runs.csv"
    rows = list(csv.DictReader(done.open())) if done.exists() else []
    for seed in range(args.seeds):
        for name in args.only or VARIANTS:
            if any((row["variant"], row["seed"]) == (name, str(seed)) for row in rows):
                continue
            rows += run(name, VARIANTS[name], seed, args, kept, sets)
            with done.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0].keys())
                writer.writeheader()
                writer.writerows(rows)
            rows = list(csv.DictReader(done.open()))
    table(rows)


if __name__ == "__main__":
    main()
