"""What each part of SAPL brings: heads with a part left out or replaced, on a frozen tower.

    python tests/ablation.py --train SET --test SET [--clip tiny] [--out runs/ablation]

Each run is a training of train.py with its defaults, but with new heads, so that no variant has a
head start, and all runs see the same images in the same order. So the tower reads each image once,
during the first runs; its features stay in --out, 1.5 MB for a window of 256 pixels. Seeds differ
in the first weights of the heads. Windows of large pictures are not aimed, as that depends on the
heads, and the last epoch is measured, not the best. Finished runs are not made again.
"""
import argparse
import csv
import hashlib
import itertools
import sys
import time
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np                                              # noqa: E402 (path first)
import torch                                                    # noqa: E402
import torch.nn.functional as F                                 # noqa: E402

import clip                                                     # noqa: E402
import data                                                     # noqa: E402
import ecpl                                                     # noqa: E402
import train                                                    # noqa: E402
from evaluate import evaluate                                   # noqa: E402

KEY = ("train", "test", "tower", "variant", "splices", "seed")          # columns of runs.csv
METRICS = ("image_auc", "pixel_auc", "pixel_f1_at_7", "text_change")


# -------------------------------------------------------------------------------------- variants

class NoText(ecpl.ECPL):
    """Two learned class vectors: the mean context token of each class, without the text tower."""

    def forward(self, clip_model, levels, edges, h, w):
        token = self.context.mean(dim=1)                                       # (C, Dt)
        vectors = token @ clip_model.text_projection                           # (C, D)
        return F.normalize(vectors, dim=-1)[None]                              # (1, C, D)


class PlainPrompt(ecpl.ECPL):
    """The learned context alone, which reads no picture."""

    def forward(self, clip_model, levels, edges, h, w):
        context = self.context.flatten(0, 1)[None]                             # (1, C * M, Dt)
        return self.encode(clip_model, context)                                # (1, C, D)


class PatchPrompt(ecpl.ECPL):
    """Prompts that read patches without their edges."""

    def enhance(self, levels, edges, h, w):
        return [x.detach() for x in levels]                                    # [(B, N, Dv)]


PLAIN = "plain prompt"
VARIANTS = {                                             # {name: (module, words for train.py)}
    "no text": (NoText, ["--hecl", "0"]),
    PLAIN: (PlainPrompt, ["--hecl", "0"]),
    "prompts that read patches": (PatchPrompt, ["--hecl", "0"]),
    "ECPL": (ecpl.ECPL, ["--hecl", "0"]),
    "ECPL and HECL": (ecpl.ECPL, []),
}


# ----------------------------------------------------------------------------------------- a run

class Frozen(ecpl.SAPL):
    """SAPL whose tower reads each image once; features are kept in `folder`, in half precision."""

    def __init__(self, clip_model, config, folder):
        super().__init__(clip_model, config)
        self.folder = folder

    def read(self, image):
        """See ecpl.SAPL."""
        kept = np.stack([self.recall(x) for x in image])                       # (B, N, K)
        kept = torch.from_numpy(kept).to(image.device).float()
        Dv, D = self.clip.visual.proj.shape
        widths = [Dv] * len(self.config["levels"]) + [D, 1]                    # their sum is K
        *levels, dense, edges = kept.split(widths, dim=2)
        return levels, dense, edges[..., 0]                      # [(B, N, Dv)], (B, N, D), (B, N)

    def recall(self, image):
        """image (3, H, W) -> (N, K): levels, dense features and edges side by side."""
        digest = hashlib.sha1(image.cpu().numpy()).hexdigest()
        file = self.folder / f"{digest}-{image.shape[1]}.npy"
        if not file.exists():
            with torch.no_grad():
                levels, dense, edges = super().read(image[None])
            features = torch.cat([*levels, dense, edges[..., None]], dim=2)    # (1, N, K)
            part = file.with_suffix(".part.npy")
            np.save(part, features[0].half().cpu())
            part.replace(file)                           # never half a file under this name
        return np.load(file)


def fit(base, folder, kind, splices, seed, words):
    """Train the tower of `base` with new heads -> Frozen. words: the command line of train.py."""
    def make_model(args):
        torch.manual_seed(int(seed))
        with mock.patch.object(ecpl, "ECPL", kind):
            return Frozen(base.clip, base.config, folder)

    args = train.make_parser().parse_args(words)
    with mock.patch.object(train, "make_model", make_model):
        run = train.Run(args, None)
    objective = train.Objective(run.model, run.hecl, args.hecl, run.labels).to(run.device)

    def losses_of(image, labels, truth, ramp):
        n = len(image) if splices == "yes" else args.batch         # splices come last
        return objective(image[:n], labels[:n], truth[:n], ramp)

    for epoch in range(args.epochs):
        loss, *_ = train.train_epoch(run, losses_of, epoch)
        print(f"epoch {epoch + 1}, loss {loss:.3f}", end="\r", file=sys.stderr)
    return run.model.eval()


def measure(model, pictures):
    """The number of each of METRICS. Text change: 1 - cosine of the directions from "genuine" to
    "manipulated", mean over all pairs of test windows; 0 if prompts read no picture."""
    texts = []
    hook = model.ecpl.register_forward_hook(lambda module, inputs, text: texts.append(text[0]))
    summary, _ = evaluate(model, pictures)
    hook.remove()

    texts = torch.stack(texts).double()                                        # (n, C, D)
    directions = F.normalize(texts[:, 1] - texts[:, 0], dim=-1)                # (n, D)
    apart = 1 - directions @ directions.T                                      # (n, n)
    n = len(apart)
    summary["text_change"] = apart.sum().item() / (n * n - n)
    return np.array([summary[metric] for metric in METRICS], float)            # None becomes NaN


def read(file, start):
    """Rows of runs.csv that begin with `start` -> {(variant, splices, seed): numbers (4,)}."""
    with open(file, newline="", encoding="utf-8") as lines:
        rows = [row for row in csv.reader(lines) if row[:3] == start]
    return {tuple(row[3:6]): np.array(row[6:], float) for row in rows}


def print_table(title, found):
    """A Markdown table: mean ± standard deviation over the seeds."""
    print(f"\n| {title} | splices | seeds | {' | '.join(METRICS)} |")
    print("|---" * (3 + len(METRICS)) + "|")
    for group in itertools.product(VARIANTS, ("no", "yes")):
        rows = [numbers for key, numbers in found.items() if key[:2] == group]
        if rows:
            mean = np.mean(rows, axis=0)                                       # (4,)
            spread = np.std(rows, axis=0, ddof=min(1, len(rows) - 1))          # (4,)
            cells = [f"{m:.4f} ± {s:.4f}" for m, s in zip(mean, spread)]
            print(f"| {' | '.join(group)} | {len(rows)} | {' | '.join(cells)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--train", required=True, metavar="SET", help="folder or list, with labels")
    parser.add_argument("--test", required=True, metavar="SET", help="the same, with masks")
    parser.add_argument("--clip", default="tiny", help="as of train.py")
    parser.add_argument("--out", default="runs/ablation")
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    args = parser.parse_args()
    words = ["--data", args.train, "--clip", args.clip, "--out", args.out, "--lora-rank", "0"]
    try:
        base = train.Run(train.make_parser().parse_args(words), None).model
        pictures, _ = data.read_set(args.test)
    except (ValueError, OSError) as error:
        parser.error(str(error))

    file = Path(clip.TINY if args.clip == "tiny" else args.clip)
    tower = clip.sha256_of(file)[:12] if file.is_file() else args.clip
    folder = Path(args.out, tower)
    folder.mkdir(parents=True, exist_ok=True)
    runs = Path(args.out, "runs.csv")
    if not runs.exists():
        runs.write_text(",".join(KEY + METRICS) + "\n", encoding="utf-8")

    start = [args.train, args.test, tower]
    for key in itertools.product(args.seeds, args.only, ("no", "yes")):
        seed, variant, splices = key
        if (variant, splices, seed) in read(runs, start):
            continue
        began = time.time()
        kind, more = VARIANTS[variant]
        model = fit(base, folder, kind, splices, seed, words + more)
        trained = time.time()
        numbers = measure(model, pictures)
        print(variant, splices, seed, numbers.round(4), f"trained in {trained - began:.0f} s,"
              f" measured in {time.time() - trained:.0f} s", flush=True)
        with open(runs, "a", newline="", encoding="utf-8") as lines:
            csv.writer(lines).writerow([*start, variant, splices, seed, *numbers])

    found = read(runs, start)
    print_table("variant", found)
    less = {}
    for (variant, splices, seed), numbers in found.items():
        if variant != PLAIN and (PLAIN, splices, seed) in found:
            less[variant, splices, seed] = numbers - found[PLAIN, splices, seed]
    print_table(f"variant, less the {PLAIN}", less)


if __name__ == "__main__":
    main()
