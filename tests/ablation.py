"""What each part of SAPL brings: short trainings with a part left out or replaced. Run by hand.

    python tests/ablation.py --clip FILE [FILE ..] --photos GENUINE_PHOTOS --composites SET

Each run trains one variant, CLIP frozen or with LoRA, on synthetic manipulations of the photos, by
image labels alone, as train.py does. All variants have the same pictures, steps and
seeds. Of the photos, sorted by name, every eighth never trains (nor did it in weights/make.py), and
every sixteenth makes the test set "synthetic"; "composites" is SET, which no run has trained on.

Finished runs, of one --count and --size, stay in --out/runs.csv and are not made again: an ended
ablation goes on, several may run side by side. Prints means, and differences seed by seed.
"""
import argparse
import csv
import fcntl
import itertools
import os
import re
import shutil
import statistics
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch                                                    # noqa: E402 (path first)
import torch.nn.functional as F                                 # noqa: E402

import data                                                     # noqa: E402
import ecpl                                                     # noqa: E402
import infer                                                    # noqa: E402
import train                                                    # noqa: E402
from evaluate import evaluate                                   # noqa: E402
from weights import synthesis                                   # noqa: E402

KEY = ("set", "tower", "tune", "variant", "seed")        # columns of runs.csv
METRICS = ("pixel_auc", "pixel_f1_best_global", "image_auc", "text_change")


# -------------------------------------------------------------------------------------- variants

class NoText(ecpl.ECPL):
    """Two learned class vectors instead of text features."""

    def __init__(self, clip_model, **sizes):
        super().__init__(clip_model, **sizes)
        D = clip_model.visual.proj.shape[1]
        own = torch.Generator().manual_seed(torch.initial_seed())        # others' numbers stay
        vectors = torch.randn(len(ecpl.CLASSES), D, generator=own)             # (C, D)
        self.vectors = torch.nn.Parameter(vectors * D ** -0.5)

    def forward(self, clip_model, levels, edges, h, w):
        return F.normalize(self.vectors, dim=-1)[None]                         # (1, C, D)


class PlainPrompt(ecpl.ECPL):
    """The learned context alone: it reads no picture."""

    def forward(self, clip_model, levels, edges, h, w):
        context = self.context.flatten(0, 1)[None]                             # (1, C * M, Dt)
        return self.encode(clip_model, context)                                # (1, C, D)


class PatchPrompt(ecpl.ECPL):
    """Prompts that read patches as they are, without their edges."""

    def enhance(self, levels, edges, h, w):
        return [x.detach() for x in levels]                                    # [(B, N, Dv)]


PLAIN = "plain prompt"
VARIANTS = {                                             # {name: (module, weight of HECL)}
    "no text": (NoText, 0.0),
    PLAIN: (PlainPrompt, 0.0),
    "prompts that read patches": (PatchPrompt, 0.0),
    "ECPL": (ecpl.ECPL, 0.0),
    "ECPL + HECL (SAPL)": (ecpl.ECPL, train.Config.hecl),
}


# ------------------------------------------------------------------------------------------ runs

def hold(path, how=fcntl.LOCK_EX):
    """Open a file that no other process may hold, until it is closed or this process ends."""
    file = open(path, "a+", newline="", encoding="utf-8")
    fcntl.flock(file, how)
    return file


def prepare(folder, out):
    """What all runs share, made once: a list of photos to train on, and the synthetic set."""
    train_list = out / "train.csv"
    with hold(out / "prepare.lock"):                     # others wait
        if train_list.exists():
            return train_list
        photos = sorted(Path(folder).resolve().iterdir())
        pairs = synthesis.PairSet(photos[::16], size=192, count=100, seed=1)
        synthesis.write(pairs, out / "synthetic")
        lines = [f'"{photo}",0' for i, photo in enumerate(photos) if i % 8]
        train_list.write_text("\n".join(["image,label", *lines]), encoding="utf-8")
    return train_list


def fit(tower, tune, variant, seed, train_list, folder, args):
    """Train a variant -> an infer.SAPL, in fp32: bf16 rounds small differences of text."""
    kind, hecl = VARIANTS[variant]
    rank = 8 if tune == "lora" else 0
    config = train.Config(synthesize=str(train_list), out=str(folder), clip=tower, lora_rank=rank,
                          hecl=hecl, seed=int(seed), size=args.size, count=args.count, epochs=1,
                          val=0.02, workers=0)
    shutil.rmtree(folder, ignore_errors=True)            # of a run that did not end
    with mock.patch.object(ecpl, "ECPL", kind):          # SAPL makes its prompts with this class
        model = infer.SAPL.load(train.train(config), precision="fp32")
    shutil.rmtree(folder)
    return model


@torch.no_grad()
def text_change(model, pictures):
    """How much the text features of two pictures differ: 1 - cosine of their t_1 - t_0, mean over
    all pairs of pictures; 0 if prompts read no picture."""
    found = []
    for picture in pictures:
        image = model.view(data.open_image(picture.path))[None]                # (1, 3, H, W)
        text = model(image.to(model.bias.device)).text                         # (1, C, D)
        found.append(text[0, 1] - text[0, 0])
    directions = F.normalize(torch.stack(found).double(), dim=-1)              # (n, D)
    apart = (1 - directions @ directions.T).clamp(min=0)                       # (n, n)
    return apart.sum().item() / (len(found) ** 2 - len(found))


def measure(model, name, pictures, key, out):
    """Measure a trained variant on a set, add a row to runs.csv."""
    summary, _ = evaluate(model, pictures, raw=True)
    genuine = [picture for picture in pictures if picture.label == 0]
    summary["text_change"] = text_change(model, genuine[:32])
    row = [name, *key] + [f"{summary[metric]:.6f}" for metric in METRICS]
    print(" | ".join(row), flush=True)
    with hold(out / "runs.csv") as file:
        writer = csv.writer(file)
        if file.seek(0, os.SEEK_END) == 0:
            writer.writerow((*KEY, *METRICS))
        writer.writerow(row)


def read(out):
    """runs.csv as {(set, tower, tune, variant, seed): [number of each of METRICS]}."""
    found = {}
    with hold(out / "runs.csv") as file:
        file.seek(0)
        for row in csv.DictReader(file):
            key = tuple(row[name] for name in KEY)
            found[key] = [float(row[metric]) for metric in METRICS]
    return found


def less_plain(found):
    """Each row less the plain prompt's of the same set, tower, tune and seed."""
    differences = {}
    for key, numbers in found.items():
        plain = found.get((*key[:3], PLAIN, key[4]))
        if plain and key[3] != PLAIN:
            differences[key] = [own - base for own, base in zip(numbers, plain)]
    return differences


def spread(numbers, form):
    """Mean and, of several, standard deviation, as text."""
    if len(numbers) == 1:
        return format(numbers[0], form)
    return f"{statistics.mean(numbers):{form}} ± {statistics.stdev(numbers):.4f}"


def print_table(title, found, form):
    """A Markdown table of means over the seeds."""
    print(f"\n| set | tower | tune | {title} | seeds | {' | '.join(METRICS)} |")
    print("|---" * (5 + len(METRICS)) + "|")
    keys = sorted(found, key=lambda key: (*key[:3], list(VARIANTS).index(key[3])))
    for group, of_group in itertools.groupby(keys, key=lambda key: key[:4]):
        rows = [found[key] for key in of_group]
        cells = [spread(column, form) for column in zip(*rows)]
        print(f"| {' | '.join(group)} | {len(rows)} | {' | '.join(cells)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--clip", nargs="+", required=True, help="files of CLIP weights")
    parser.add_argument("--photos", required=True, help="folder of genuine photos")
    parser.add_argument("--composites", metavar="SET", help="labelled set with masks, to measure")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--count", type=int, default=6144, help="pictures of a run")
    parser.add_argument("--size", type=int, default=train.Config.size, help="their pixels")
    parser.add_argument("--tune", nargs="+", choices=("none", "lora"), default=["none", "lora"])
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    for tower in args.clip:
        if train.is_sapl(tower):
            parser.error(f"found {tower}, a trained SAPL, expected weights of a CLIP alone")

    args.out.mkdir(parents=True, exist_ok=True)
    train_list = prepare(args.photos, args.out)
    sets = {"synthetic": data.read_set(args.out / "synthetic")[0]}
    if args.composites:
        sets["composites"] = data.read_set(args.composites)[0]

    keys = itertools.product(args.clip, args.tune, args.only, map(str, args.seeds))
    for key in sorted(keys, key=lambda key: key[3]):     # a seed of all before the next
        folder = args.out / re.sub(r"\W+", "_", "-".join(key))
        try:
            lock = hold(f"{folder}.lock", fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:                          # another process makes this run
            continue
        with lock:
            found = read(args.out)
            if all((name, *key) in found for name in sets):
                continue
            model = fit(*key, train_list, folder, args)
            for name, pictures in sets.items():
                measure(model, name, pictures, key, args.out)
    found = read(args.out)
    print_table("variant", found, ".4f")
    print_table(f"variant, less the {PLAIN}", less_plain(found), "+.4f")


if __name__ == "__main__":
    main()
