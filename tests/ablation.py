"""What each part of SAPL brings: short trainings with parts switched on and off. Run by hand.

    python tests/ablation.py --clip FILE --photos GENUINE_PHOTOS --composites SET [--seeds 0 1 2]

Each run trains one variant on synthetic manipulations of the photos (every eighth photo is held out
and makes the test set "synthetic"), then goes on from there with the pictures and labels of SET/train
and is measured on SET/val. Image labels only; masks measure, they never train. Every variant has the
same data, steps and seeds (but "pairs beside the labels" and its control, "twice the steps": two
times the steps on the composites). Finished runs are kept in --out/runs.csv and not made again, so an
interrupted ablation goes on, and several may run side by side. Prints two Markdown tables: means, and
differences seed by seed.
"""
import argparse
import contextlib
import csv
import io
import shutil
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch                                                    # noqa: E402 (path first)

import clip                                                     # noqa: E402
import data                                                     # noqa: E402
import infer                                                    # noqa: E402
import train                                                    # noqa: E402

FIELDS = ("variant", "seed", "set", "n", "pixel_auc", "pixel_f1_best_global", "image_auc", "seconds")
PLAIN, BASE = "plain learned prompt", "SAPL, edges alone"
VARIANTS = {
    "multiple instances, no text": {"prompts": "none", "hecl": 0.0},
    PLAIN: {"prompts": "plain", "hecl": 0.0},
    "+ attention to patches (control)": {"prompts": "patches", "hecl": 0.0},
    "+ ECPL, edges alone": {"prompts": "edges", "hecl": 0.0},
    "+ ECPL": {"hecl": 0.0},
    "+ HECL": {"prompts": "plain"},
    "+ ECPL + HECL (SAPL)": {},
    BASE: {"prompts": "edges"},
} | {f"{BASE}, {name}": {"prompts": "edges"} | change for name, change in {
    # the changes were measured from this base on: what is better than it became the default later
    "tower frozen, no LoRA": {"tune": "none"},
    "pairs beside the labels": {"pairs": 0.5},           # of the composites' genuine pictures
    "twice the steps": {"epochs": 2},                    # on the composites
    "one level": {"levels": (6,)},
    "vv attention": {"dense": "vv"},
    "qq + kk attention": {"dense": "qqkk"},
    "edges from features": {"edge_source": "features"},
    "batch only, no queue": {"hecl_queue": 0},
    "mosaics 2 x 2": {"mosaic": 2},
    "no zoom": {"zoom": 1},
    "LoRA in all blocks": {"lora_share": 1.0},
    "LoRA in the last half": {"lora_share": 0.5},
    "whole tower trained": {"tune": "full", "lr_clip": 2e-4},
}.items()}


def prepare(args):
    """What all runs share: -> (CLIP file of the first blocks, photos to train on, synthetic set)."""
    backbone, kept, held = (args.out / name for name in ("clip.pt", "photos", "synthetic"))
    if not held.is_dir():
        files = sorted(Path(args.photos).iterdir())
        kept.mkdir(parents=True)
        for i, path in enumerate(files):
            if i % 8:
                shutil.copy(path, kept / path.name)
        model = clip.load(args.clip)
        del model.visual.transformer.resblocks[args.blocks:]
        torch.save(model.state_dict(), backbone)
        pairs = data.SynthesisSet(files[::8], size=192, count=200, seed=1)
        with contextlib.redirect_stdout(io.StringIO()):
            data.write_synthesis(pairs, held)
    return backbone, kept, held


def measure(name, seed, set_name, checkpoint, pictures, began):
    """Rows of the table: of a trained model, and once of the baselines."""
    model = infer.SAPL.load(checkpoint, "cpu")
    summary, _ = infer.evaluate(model, pictures, raw=True)
    found = {name: summary}
    if name == next(iter(VARIANTS)) and seed == 0:
        found |= {f"({key})": values for key, values in summary["baselines"].items()}
    return [{key: values.get(key, "") for key in FIELDS}
            | {"variant": label, "seed": seed, "set": set_name, "n": summary["n"],
               "seconds": round(time.time() - began)} for label, values in found.items()]


def run(name, seed, args):
    """Train one variant with one seed, measure it -> rows for the table."""
    began, (backbone, kept, held) = time.time(), prepare(args)
    out = args.out / f"{name}-{seed}".replace(" ", "_")
    shutil.rmtree(out, ignore_errors=True)
    common = {"seed": seed, "epochs": 1, "workers": 0, "precision": args.precision,
              "max_side": 256} | VARIANTS[name]
    first = train.train(train.Config(**{
        "synthesize": str(kept), "out": str(out / "a"), "clip": str(backbone), "size": 64,
        "count": args.count, "batch": 24, "lr": 1e-3, "val": 0.03, "zoom": 2} | common
        | {"epochs": 1}))
    rows = measure(name, seed, "synthetic", first, data.read_set(held)[0], began)
    if args.composites:
        folder, began = Path(args.composites), time.time()
        second = train.train(train.Config(**{
            "data": str(folder / "train"), "out": str(out / "b"), "init": str(first), "size": 128,
            "batch": 16, "lr": 5e-4, "val": 0.1} | common))
        rows += measure(name, seed, "composites", second, data.read_set(folder / "val")[0][::2], began)
    shutil.rmtree(out)
    return rows


def table(rows):
    """Print the rows of the CSV as a Markdown table, mean +- standard deviation over seeds."""
    columns = [(s, m) for s in dict.fromkeys(row["set"] for row in rows) for m in FIELDS[4:7]]
    print("| variant | seeds | " + " | ".join(f"{s}: {m}" for s, m in columns) + " |")
    print("|---" * (2 + len(columns)) + "|")
    names = dict.fromkeys(row["variant"] for row in rows)
    for name in sorted(names, key=[*VARIANTS, *names].index):
        cells = []
        for s, metric in columns:
            values = [float(row[metric]) for row in rows
                      if (row["variant"], row["set"]) == (name, s) and row[metric]]
            cells.append(f"{statistics.mean(values):.3f}" if values else "-")
            if len(values) > 1:
                cells[-1] += f" ± {statistics.stdev(values):.3f}"
        seeds = len({row["seed"] for row in rows if row["variant"] == name})
        print(f"| {name} | {seeds} | " + " | ".join(cells) + " |")


def differences(rows):
    """Print what the parts bring to the plain prompt and the changes to BASE: mean +- deviation of
    the differences between runs with the same seed, from which the seeds' own are gone."""
    found = {(row["variant"], row["set"], row["seed"]): row for row in rows if row["image_auc"]}
    sets, seeds = (sorted({key[i] for key in found}, reverse=i == 1) for i in (1, 2))
    print("\n| difference | to | " + " | ".join(f"{s}: pixel AUC / image AUC" for s in sets) + " |")
    print("|---" * (2 + len(sets)) + "|")
    for name in VARIANTS:
        base = BASE if name.startswith(BASE + ",") else PLAIN
        cells = []
        for s in sets if name != base else ():
            pairs = [(found[name, s, seed], found[base, s, seed]) for seed in seeds
                     if (name, s, seed) in found and (base, s, seed) in found]
            values = [[float(a[metric]) - float(b[metric]) for a, b in pairs]
                      for metric in ("pixel_auc", "image_auc")]
            cells.append(" / ".join(f"{statistics.mean(x):+.3f} ± {statistics.stdev(x):.3f}"
                                    for x in values) if len(pairs) > 1 else "-")
        if cells:
            print(f"| {name} | {base} | " + " | ".join(cells) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--clip", required=True, help="pretrained CLIP, a name or file of clip.load")
    parser.add_argument("--photos", required=True, help="folder of genuine photos")
    parser.add_argument("--composites", help="folder with train/ and val/, labelled, val with masks")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--blocks", type=int, default=6, help="of the image tower, from the first")
    parser.add_argument("--count", type=int, default=6144, help="synthetic pictures of a run")
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), help="variants; default all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precision", default="fp32", help="of the training, fp32 or bf16")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    prepare(args)
    done = args.out / "runs.csv"
    for seed in args.seeds:
        for name in args.only:
            claim = args.out / f"{name}-{seed}.claimed".replace(" ", "_")
            if claim.exists():
                continue
            claim.touch()
            try:
                new = run(name, seed, args)
            except BaseException:
                claim.unlink()
                raise
            with done.open("a", newline="") as file:
                writer = csv.DictWriter(file, FIELDS)
                if not file.tell():
                    writer.writeheader()
                writer.writerows(new)
    rows = list(csv.DictReader(done.open()))
    table(rows)
    differences(rows)


if __name__ == "__main__":
    main()
