"""What each part of SAPL brings: heads with a part left out or replaced, on a frozen tower.

    python tests/ablation.py --train SET --test SET [--clip tiny] [--out runs/ablation]

1. Once: windows of the training set and as many splices are made (OUT/windows.pt), and the tower
   is asked about each of them and about what infer.py shows it of the test set (OUT/features).
2. Each run trains new heads with train.Objective, for as many epochs as train.py, and appends a row
   to OUT/runs.csv. Runs of one seed have the same pictures, in the same order.
3. Two Markdown tables: means over the seeds, and differences to the plain prompt of the same seed.

Unlike in train.py, windows of large pictures are random ones, and the last epoch counts, not the
best. Finished runs are not made again. About 1.5 MB of disk for each window of 256 pixels.
"""
import argparse
import csv
import hashlib
import itertools
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np                                              # noqa: E402 (path first)
import torch                                                    # noqa: E402
import torch.nn.functional as F                                 # noqa: E402
from torch.utils.data import DataLoader                         # noqa: E402

import data                                                     # noqa: E402
import ecpl                                                     # noqa: E402
import infer                                                    # noqa: E402
import train                                                    # noqa: E402
from evaluate import evaluate                                   # noqa: E402
from hecl import HECL                                           # noqa: E402

PASSES = 2                 # over the training set: how many windows of each picture are kept
KEY = ("variant", "splices", "seed")                            # columns of runs.csv
METRICS = ("image_auc", "pixel_auc", "pixel_f1_at_7", "text_change")


# -------------------------------------------------------------------------------------- variants

class NoText(ecpl.ECPL):
    """Two learned class vectors instead of text features."""

    def __init__(self, clip_model, **sizes):
        super().__init__(clip_model, **sizes)
        D = clip_model.visual.proj.shape[1]
        own = torch.Generator().manual_seed(torch.initial_seed())    # other heads start alike
        self.vectors = torch.nn.Parameter(torch.randn(len(ecpl.CLASSES), D, generator=own))

    def forward(self, clip_model, levels, edges, h, w):
        return F.normalize(self.vectors, dim=-1)[None]                         # (1, C, D)


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
VARIANTS = {                                             # {name: (module, uses HECL)}
    "no text": (NoText, False),
    PLAIN: (PlainPrompt, False),
    "prompts that read patches": (PatchPrompt, False),
    "ECPL": (ecpl.ECPL, False),
    "ECPL and HECL": (ecpl.ECPL, True)}


# -------------------------------------------------------------------------------------- features

class Frozen(ecpl.SAPL):
    """SAPL whose tower is asked once about each image; the answer is kept as a file in `folder`."""

    folder = None

    def read(self, image):
        """As in ecpl.SAPL, rounded to half precision."""
        kept = np.stack([self.recall(x) for x in image])         # (B, N, L * Dv + D + 1)
        kept = torch.from_numpy(kept).to(image.device).float()
        Dv, D = self.clip.visual.proj.shape
        widths = [Dv] * len(self.config["levels"]) + [D, 1]
        *levels, dense, edges = kept.split(widths, dim=2)
        return levels, dense, edges[..., 0]                      # [(B, N, Dv)], (B, N, D), (B, N)

    def recall(self, image):
        """image (3, H, W) -> what its patches have: levels, dense features, edges, in a row."""
        pixels = (255 * image).round().byte().cpu().numpy()                    # (3, H, W)
        digest = hashlib.sha1(pixels.tobytes()).hexdigest()
        _, H, W = pixels.shape
        file = self.folder / f"{H}x{W}-{digest}.npy"
        if not file.exists():
            with torch.no_grad():
                levels, dense, edges = super().read(image[None])
            features = torch.cat([*levels, dense, edges[..., None]], dim=2)    # (1, N, ..)
            part = file.with_suffix(".part.npy")
            np.save(part, features[0].half().cpu())
            part.replace(file)                           # never half a file under this name
        return np.load(file)                                                   # (N, ..)


def frozen(tower, config, kind, folder):
    """A Frozen with new heads, of which `kind` makes the prompts."""
    with mock.patch.object(ecpl, "ECPL", kind):          # SAPL makes its prompts with this class
        model = Frozen(tower, config)
    model.folder = folder
    return model.to(tower.visual.proj.device)


def make_windows(model, pictures):
    """Worn windows as in training -> (images (2n, 3, S, S) uint8, labels (2n,), truth (2n, N)),
    n labelled ones, then n splices; see train.make_batch. Their features are kept."""
    windows = data.TrainingSet(pictures, max_side=model.config["max_side"], cell=model.cell,
                               window=model.config["window"], seed=0)
    genuine = np.flatnonzero([picture.label == 0 for picture in pictures])
    half = argparse.Namespace(batch=16, splices=16)
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    labelled = []
    splices = []
    for windows.epoch in range(PASSES):
        plan = train.plan_epoch(len(pictures), genuine, half, rng)
        for pixels, labels in DataLoader(windows, batch_sampler=plan.tolist()):
            pixels = pixels.to(model.bias.device)
            labels = labels.to(model.bias.device)
            image, labels, truth = train.make_batch(pixels, labels, 16, model.cell, rng)
            with model.autocast():
                model.read(image)
            image = (255 * image).round().byte()
            batch = [x.cpu() for x in (image, labels, truth)]
            labelled.append([x[:16] for x in batch])
            splices.append([x[16:] for x in batch])
            print(f"{32 * len(splices)} windows", end="\r", file=sys.stderr)
    return [torch.cat(column) for column in zip(*labelled, *splices)]


# ------------------------------------------------------------------------------------------ runs

def fit(model, use_hecl, windows, args):
    """Train the heads as train.py does. windows: of `make_windows`; args: train.py's settings."""
    model.train()
    images, labels, truth = windows
    count = len(images) // 2                             # labelled ones; the rest are splices
    D = model.clip.visual.proj.shape[1]
    hecl = HECL(levels=len(model.config["levels"]), width=D, **train.HECL_SIZES)
    hecl.requires_grad_(use_hecl)
    weight = args.hecl if use_hecl else 0.0
    objective = train.Objective(model, hecl, weight, labels[:count].numpy()).to(images.device)
    weights = [p for p in objective.parameters() if p.requires_grad]
    optimizer = train.make_optimizer(weights, model.depths.parameters())

    rng = np.random.default_rng(args.seed)
    plans = [train.plan_epoch(count, np.arange(count), args, rng)
             for _ in range(args.epochs // PASSES)]      # of windows: PASSES of them each
    plan = np.concatenate(plans)                                               # (steps, ..)
    for step, rows in enumerate(plan, start=1):
        done = step / len(plan)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * train.learning_rate(done) * group["times"]
        ramp = min(1, done / 0.05)
        losses = objective(images[rows] / 255, labels[rows], truth[rows], ramp)
        losses[0].backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def measure(model, pictures):
    """Frozen, test set -> the number of each of METRICS."""
    texts = []
    hook = model.ecpl.register_forward_hook(lambda module, inputs, text: texts.append(text[0]))
    summary, _ = evaluate(model, pictures)
    hook.remove()
    # text change: how much the text differs between windows, 0 if prompts read no picture
    texts = torch.stack(texts).double()                                        # (n, C, D)
    directions = F.normalize(texts[:, 1] - texts[:, 0], dim=-1)                # (n, D)
    apart = 1 - directions @ directions.T                                      # (n, n)
    n = len(texts)
    summary["text_change"] = apart.sum().item() / (n * n - n)
    return [summary[metric] for metric in METRICS]


def read(file):
    """runs.csv -> {(variant, splices, seed): [number of each of METRICS]}."""
    if not file.exists():
        return {}
    with open(file, newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    return {tuple(row[name] for name in KEY): [float(row[metric]) for metric in METRICS]
            for row in rows}


def less_plain(found):
    """Each row less the plain prompt's with the same splices and seed."""
    differences = {}
    for (variant, splices, seed), numbers in found.items():
        plain = found.get((PLAIN, splices, seed))
        if plain and variant != PLAIN:
            pairs = zip(numbers, plain)
            differences[variant, splices, seed] = [own - base for own, base in pairs]
    return differences


def print_table(title, found, form):
    """A Markdown table: mean ± standard deviation over the seeds."""
    print(f"\n| {title} | splices | seeds | {' | '.join(METRICS)} |")
    print("|---" * (3 + len(METRICS)) + "|")
    for variant, splices in itertools.product(VARIANTS, ("no", "yes")):
        rows = [row for key, row in found.items() if key[:2] == (variant, splices)]
        cells = []
        for numbers in zip(*rows):
            text = format(statistics.mean(numbers), form)
            if len(numbers) > 1:
                text += f" ± {statistics.stdev(numbers):.4f}"
            cells.append(text)
        if rows:
            print(f"| {variant} | {splices} | {len(rows)} | {' | '.join(cells)} |")
