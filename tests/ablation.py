"""What each part of SAPL brings: heads with a part left out or replaced, on a frozen tower.

    python tests/ablation.py --train SET --test SET [--clip tiny] [--out runs/ablation]

Each run is a training run of train.py with its defaults, but with new heads: no variant has a head
start. All runs see the same images in the same order, so the tower reads each image only once; its
features stay in --out, 1.5 MB a window. Seeds differ in the heads' initial weights. The last epoch
is measured, not the best. Finished runs stay in runs.csv; other settings need another --out.
"""
import csv
import hashlib
import itertools
import sys
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

METRICS = ["image_auc", "pixel_auc", "pixel_f1_at_7", "text_change"]


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
FULL = "ECPL and HECL"
VARIANTS = {
    "no text": NoText,
    PLAIN: PlainPrompt,
    "prompts that read patches": PatchPrompt,
    "ECPL": ecpl.ECPL,
    FULL: ecpl.ECPL,
}


class Frozen(ecpl.SAPL):
    """SAPL whose tower reads each image once; config["kept"]: folder of its features, as halves."""

    def read(self, image):
        kept = torch.stack([self.recall(x) for x in image])                    # (B, N, K)
        D = self.clip.visual.proj.shape[1]
        levels, dense, edges = kept.tensor_split((-D - 1, -1), dim=2)          # (B, N, ..)
        levels = levels.chunk(len(self.config["levels"]), dim=2)               # [(B, N, Dv)]
        return levels, dense, edges[..., 0]                                    # .., .., (B, N)

    def recall(self, image):
        """image (3, H, W) -> (N, K): levels, dense features and edges side by side."""
        digest = hashlib.sha1(image.cpu().numpy()).hexdigest()
        file = Path(self.config["kept"], digest)
        if not file.exists():
            with torch.no_grad():
                levels, dense, edges = super().read(image[None])
            features = torch.cat([*levels, dense, edges[..., None]], dim=2)    # (1, N, K)
            part = file.with_suffix(".part")
            torch.save(features[0].half(), part)
            part.rename(file)                            # never half a file under this name
        return torch.load(file).float()


def fit(base, args, variant, splices, seed):
    """Train new heads on the tower of `base` -> Frozen. args: settings of train.py."""
    def make_model(args):
        return Frozen(base.clip, base.config)

    torch.manual_seed(int(seed))
    with mock.patch("train.make_model", make_model), mock.patch("ecpl.ECPL", VARIANTS[variant]):
        run = train.Run(args, None)
    if variant != FULL:
        run.objective.hecl_weight = 0.0

    def losses(image, labels, truth):
        n = len(image) if splices == "yes" else args.batch         # splices come last
        return run.objective(image[:n], labels[:n], truth[:n])

    for epoch in range(args.epochs):
        train.train_epoch(run, losses, epoch)
    return run.model.eval()


def measure(model, pictures):
    """Measure a trained variant -> (4,), the number of each of METRICS. Text change: 1 - cosine of
    the steps from "genuine" to "manipulated", mean over all pairs of test windows."""
    texts = []

    def note(module, inputs, text):
        texts.append(text[0].double())                                         # (C, D)

    model.dtype = torch.float32                          # bf16 rounds small changes of the text
    hook = model.ecpl.register_forward_hook(note)
    summary, _ = evaluate(model, pictures)
    hook.remove()
    genuine, manipulated = torch.stack(texts, dim=1)                           # (n, D) each
    steps = F.normalize(manipulated - genuine, dim=-1)                         # (n, D)
    distances = F.pdist(steps)                           # (pairs,), roots of 2 - 2 cosine
    summary["text_change"] = distances.square().mean().item() / 2
    return np.array([summary[metric] for metric in METRICS], float)            # None becomes NaN


def print_table(title, found):
    """A Markdown table: mean ± standard deviation over the seeds."""
    print("\n", title, "splices", "seeds", *METRICS, "", sep=" | ")
    print(" |", 7 * "---|")
    for group, rows in found.items():
        mean = np.mean(rows, axis=0)                                           # (4,)
        spread = np.std(rows, axis=0, ddof=1)                                  # (4,)
        cells = [f"{m:.4f} ± {s:.4f}" for m, s in zip(mean, spread)]
        print("", *group, len(rows), *cells, "", sep=" | ")


def main():
    parser = train.make_parser()
    parser.description = __doc__.partition("\n")[0]
    parser.set_defaults(out="runs/ablation", lora_rank=0)
    add = parser.add_argument
    add("--train", dest="data", required=True, help="folder or list, with labels")
    add("--test", required=True, help="folder or list, with labels and masks")
    add("--seeds", nargs="+", default=["0", "1", "2"])
    add("--only", nargs="+", choices=VARIANTS, default=VARIANTS)
    args = parser.parse_args()
    file = clip.TINY if args.clip == "tiny" else Path(args.clip).expanduser()
    try:
        tower = clip.OFFICIAL.get(args.clip) or clip.sha256_of(file)
        folder = Path(args.out, tower[:12])
        base = train.Run(args, None).model
        pictures, _, _ = data.read_set(args.test)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    folder.mkdir(exist_ok=True)
    base.config["kept"] = str(folder)

    file = open(folder / "runs.csv", "a+", buffering=1, newline="")
    file.seek(0)
    rows = {tuple(row[:5]): row[5:] for row in csv.reader(file)}
    runs = csv.writer(file)
    if not rows:
        runs.writerow(["train", "test", "variant", "splices", "seed", *METRICS])
    groups = itertools.product(args.only, ("no", "yes"))
    found = {group: [] for group in groups}              # {group: [numbers of a seed (4,)]}
    for seed, group in itertools.product(args.seeds, found):
        key = (args.data, args.test, *group, seed)
        if key not in rows:
            model = fit(base, args, *group, seed)
            rows[key] = measure(model, pictures)
            runs.writerow([*key, *rows[key]])
            print(*key, *rows[key], flush=True)
        found[group].append(np.array(rows[key], float))

    print_table("variant", found)
    less = {}
    for (variant, splices), numbers in found.items():
        if PLAIN in args.only:
            less[variant, splices] = np.subtract(numbers, found[PLAIN, splices])
    print_table(f"variant, less the {PLAIN}", less)


if __name__ == "__main__":
    main()
