"""Train SAPL from pictures that carry one label each, genuine or manipulated; masks are never read.

    python train.py --data FOLDER            au/ and tp/ inside, or a list of pictures and labels
    python train.py --data PHOTOS            genuine photos alone: only self-made splices
    python train.py --out RUN --resume       continues after the last finished epoch
    torchrun --nproc_per_node=4 train.py ..  shares each step among several GPUs

Writes into --out after each epoch: log.csv, last.pt (to resume), best.pt (see `best_of`).

An image label says *whether* a picture is manipulated; it trains the score and so the map
[abstract]. A genuine label says more: *every* pixel is genuine. So a part of one genuine picture
pasted into another is manipulated by construction, and such splices train the map directly [ours;
CutPaste, Li et al. 2021; Cut, Paste and Learn, Dwibedi et al. 2017]. --splices 0 leaves them out.

Three lessons:
1. One view. Resampling erases traces, so training, validation and inference share `data.view`.
2. A window inherits the label of its picture but may miss the region; this costs image AUC.
3. In many sets, compression reveals the class. Randomly degrading both classes weakens this cue.
"""
import argparse
import csv
import math
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader

import clip
import data
import ecpl
import infer
from data import BadInput
from hecl import HECL
from weights import synthesis


# -------------------------------------------------------------------------------------- settings

# Every number is ours.
SIZES = {"context": 8, "rho": 0.05, "max_side": 512, "lora_share": 0.25}         # of ecpl.SAPL
WINDOW = 256              # pixels of the view: side of a training window; infer.py's are no larger
HECL_SIZES = {"dim": 64, "queue": 1024, "tau": 0.1, "share": 0.4, "top": 4}
FREE = ("out", "resume", "epochs", "device", "workers")     # may change on --resume
LEAST = {"batch": 2, "splices": 0, "epochs": 1, "lora_rank": 0, "lr": 0, "hecl": 0, "workers": 0,
         "seed": 0}


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", help="folder with au/ and tp/, list, or folder of genuine photos")
    add("--out", default="runs/sapl", help="folder of the run")
    add("--resume", action="store_true", help="continue the run in --out")
    add("--val", type=float, default=0.15, help="fraction of the pictures held out")
    add("--clip", default="tiny", help="start: tiny (the shipped SAPL), ViT-B/16 or another "
        "official CLIP, a file of CLIP weights, or a checkpoint of SAPL")
    add("--lora-rank", type=int, help="rank of LoRA, 0: no LoRA (None: depends on --clip)")
    add("--splices", type=int, default=16, help="self-made splices per step")
    add("--hecl", type=float, default=0.1, help="weight of HECL, 0: off")
    add("--epochs", type=int, default=4, help="passes over the pictures")
    add("--batch", type=int, default=32, help="labelled pictures per step")
    add("--lr", type=float, default=2e-3, help="learning rate")
    add("--seed", type=int, default=0, help="random seed")
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--precision", default="auto", help="auto (bf16 if the hardware has it), bf16, fp32")
    add("--workers", type=int, default=2, help="processes that load pictures")
    return parser


def read_settings(arguments):
    """The command line -> (settings, the last checkpoint of a resumed run or None); BadInput for
    settings that make no sense."""
    args = make_parser().parse_args(arguments)
    last = Path(args.out, "last.pt")
    state = None
    if args.resume:
        # words of the command line replace stored settings; defaults do not
        state = infer.load_checkpoint(last)
        if "settings" not in state:
            raise BadInput(f"found a best.pt in {last}, expected last.pt: use it as --clip instead")
        stored = state["settings"] | {"out": args.out}
        args = make_parser().parse_args(arguments, argparse.Namespace(**stored))
        for name, value in stored.items():
            if name not in FREE and getattr(args, name) != value:
                raise BadInput(f"found --{name.replace('_', '-')} {getattr(args, name)}, but the "
                               f"run in {args.out} has {value}: leave it out")
    elif last.exists():
        raise BadInput(f"found a run in {args.out}: add --resume, or choose another --out")

    if not args.data:
        raise BadInput("found no --data, expected a folder or list of pictures: name it")
    for name, least in LEAST.items():
        value = getattr(args, name)
        if value is not None and not value >= least:     # also catches NaN
            raise BadInput(f"found --{name.replace('_', '-')} {value}, expected at least {least}")
    if not 0 < args.val < 1:
        raise BadInput(f"found --val {args.val}, expected a number between 0 and 1")
    return args, state


# -------------------------------------------------------------------------------------- pictures

def read_pictures(args, held_out):
    """Pictures to train on and pictures held out, no scene in both: two lists. held_out: paths
    that a resumed run holds out, else None."""
    pictures, _, problems = data.read_set(args.data, masks=False)
    for problem in problems:
        print(f"note: {problem}", file=sys.stderr)
    pictures = [p._replace(label=p.label or 0) for p in pictures]    # no label: genuine photos

    if held_out is None:
        train, val = data.split(pictures, args.val, args.seed)
    else:
        val = [p for p in pictures if str(p.path) in held_out]
        if len(val) < len(held_out):
            print(f"note: {len(held_out) - len(val)} held-out pictures are gone", file=sys.stderr)
        scenes = {p.scene for p in val}
        train = [p for p in pictures if p.scene not in scenes]

    # image labels alone need both classes
    needed = {0, 1} if args.splices == 0 else {0} | {p.label for p in pictures}
    for part, name in ((train, "to train on"), (val, "to hold out")):
        for label in needed - {p.label for p in part}:
            raise BadInput(f"found no {ecpl.CLASSES[label]} picture {name} in {args.data}, "
                           "expected some: add pictures or change --val")
    return train, val


def plan_epoch(labels, args, epoch):
    """The order of an epoch: indices (steps, batch + splices) into `data.TrainingSet`. Each row
    ends with genuine pictures to splice; indices from len(labels) on select other windows."""
    rng = np.random.default_rng((args.seed, epoch))
    count = len(labels)
    order = rng.permutation(count)
    order = np.resize(order, max(count, args.batch))     # fewer than a batch: repeated
    steps = len(order) // args.batch                     # the last, incomplete batch is left out
    labelled = order[:steps * args.batch].reshape(steps, args.batch)
    spliced = count + rng.choice(np.flatnonzero(labels == 0), (steps, args.splices))
    return np.concatenate([labelled, spliced], axis=1)


@torch.no_grad()
def make_batch(windows, labels, splices, cell, rng):
    """Compress some windows, splice the last `splices` of them, then degrade about half of all.

    windows (B, 3, S, S) uint8, labels (B,) -> image (B, 3, S, S) in [0, 1], labels (B,), truth
    (B, N): 1 where a patch is manipulated, 0 where it is genuine, -1 where nobody knows.
    """
    images = synthesis.older_jpeg(windows.float(), rng)
    count = (images.shape[-1] // cell) ** 2                                    # N
    # what labels know: every patch of a genuine picture is genuine
    truth = -labels[:, None].repeat(1, count)                                  # (B, N)

    if splices > 0:
        photo = images[-splices:]                                              # (splices, 3, S, S)
        made = synthesis.splice(photo, photo.roll(1, 0), rng)
        inside = F.avg_pool2d(made.region, cell).flatten(1)                    # (splices, N)
        # what cannot be seen, or fills no patch, stays a genuine photo
        seen = made.seen & (inside > 0.5).any(dim=1)                           # (splices,)
        images[-splices:] = torch.where(seen[:, None, None, None], made.image, photo)
        labels[-splices:] = seen
        # unknown: a patch on the border, 5 to 50 % of it manipulated
        known = torch.where(inside > 0.5, 1, torch.where(inside < 0.05, 0, -1))
        truth[-splices:] = known * seen[:, None]                               # (splices, N)
    return synthesis.wear(images, rng) / 255, labels, truth


# -------------------------------------------------------------------------------- model and loss

def make_model(args):
    """A new SAPL around a CLIP, or the SAPL of a checkpoint (of a resumed run: its last). All
    defaults that depend on --clip are set here."""
    torch.manual_seed(args.seed)
    start = clip.TINY if args.clip == "tiny" else Path(args.clip).expanduser()
    if args.resume:
        start = Path(args.out, "last.pt")
    if "format" in infer.read_dict(start):
        model = infer.load(start, "cpu", "fp32")
        rank = model.config["lora_rank"]
        if args.lora_rank not in (None, rank):
            raise BadInput(f"found --lora-rank {args.lora_rank}, but --clip {args.clip} keeps its "
                           f"own ({rank}): leave it out")
        return model

    try:
        tower = clip.load(args.clip)
    except ValueError as error:
        raise BadInput(str(error)) from error
    # OpenAI's towers never learned to see traces. So LoRA adapts them [digest], and pictures are
    # enlarged until a patch covers about 8 x 8 of their pixels. Our own tower, the one with a stem,
    # was pretrained on traces and stays frozen.
    zoom = {32: 4, 16: 2, 14: 2}.get(tower.visual.patch_size, 1)
    cell = tower.visual.patch_size // zoom
    rank = args.lora_rank
    if rank is None:
        rank = 8 if tower.visual.stem is None else 0

    depth = len(tower.visual.transformer.resblocks)
    own = {"clip": args.clip, "levels": [depth // 3, 2 * depth // 3, depth], "zoom": zoom,
           "lora_rank": rank, "window": WINDOW // cell * cell}
    return ecpl.SAPL(tower, SIZES | own)


class Objective(nn.Module):
    """The model with its losses. labels (n,): those of the training set. Every weight is ours."""

    def __init__(self, model, hecl_weight, labels):
        super().__init__()
        self.model = model
        D = model.clip.visual.proj.shape[1]
        self.hecl = HECL(levels=len(model.config["levels"]), width=D, **HECL_SIZES)
        self.hecl_weight = hecl_weight
        # in a set of genuine photos, image labels have nothing to tell apart
        self.label_weight = 1.0 if (labels == 1).any() else 0.0

    def forward(self, image, labels, truth):
        """image (B, 3, S, S) in [0, 1], labels (B,), truth (B, N) -> (4,): the weighted sum, label
        loss, patch loss, HECL."""
        with self.model.autocast():                      # the losses stay in fp32
            output = self.model(image)
        logits = output.logits.flatten(1).float()                              # (B, N)
        score = output.score.float()                                           # (B,)
        is_splice = (truth == 1).any(dim=1)                                    # (B,)

        # Whether: image labels against scores. Without this term the score knows splices alone, not
        # the manipulations of the set.
        label_loss = F.binary_cross_entropy_with_logits(
            score[~is_splice], labels[~is_splice].float())                     # ()

        # Where: the known patches of splices and, in a set of genuine photos, of all. Manipulated
        # ones are few and count four times. Without this term, genuine photos alone give no map.
        judged = is_splice | (self.label_weight == 0)                          # (B,)
        inside = (truth == 1).float()                                          # (B, N)
        known = ((truth >= 0) & judged[:, None]).float()                       # (B, N)
        errors = F.binary_cross_entropy_with_logits(logits, inside, reduction="none")
        weight = known + 3 * inside                                            # (B, N)
        patch_loss = (weight * errors).sum() / known.sum().clamp(min=1)

        # Contrast: edge patches of a class attract each other across pictures and repel the others.
        depths = [z.float() for z in output.depths]                            # [(B, N, D)]
        contrast = self.hecl(depths, output.edges, logits, labels, truth)      # ()

        total = self.label_weight * label_loss + patch_loss + self.hecl_weight * contrast
        return torch.stack([total, label_loss, patch_loss, contrast])


# -------------------------------------------------------------------- validation and checkpoints

def auc(values, labels):
    """Probability that a value of label 1 exceeds one of label 0, ties count half: arrays (n,)."""
    differences = values[labels == 1][:, None] - values[labels == 0]
    return float(0.5 + np.sign(differences).mean() / 2)


def validate(model, pictures):
    """Score held-out pictures as infer.py does, uncalibrated, then calibrate on the genuine ones ->
    {"val_auc": image AUC}, {} if none is manipulated. Each process judges all: none has to wait."""
    model.eval()
    labels = np.array([p.label for p in pictures])                             # (n,)
    scores = np.zeros(len(pictures))                                           # (n,)
    genuine_pixels = []
    for i, picture in enumerate(pictures):
        map, score = infer.logits_of(model, data.open_image(picture.path))
        scores[i] = score.item()
        if picture.label == 0:
            # 200 quantiles of each picture, so that all pictures count the same
            pixels = np.quantile(map.numpy(), np.arange(1, 201) / 200, method="higher")
            genuine_pixels.append(pixels)
    model.train()

    # Make 0.5 the operating point: at most 6.5 % of the pixels of genuine pictures, and at most
    # 10 % of these pictures, lie above it [ours].
    model.map_shift.fill_(np.quantile(genuine_pixels, 0.935, method="higher"))
    model.score_shift.fill_(np.quantile(scores[labels == 0], 0.9, method="higher"))
    return {"val_auc": auc(scores, labels)} if labels.any() else {}


def best_of(history):
    """The row of the latest epoch whose val_auc is at most 0.02 below the highest [ours]: smaller
    differences may be chance; late epochs have a low learning rate. Without val_auc, the last."""
    highest = max(row.get("val_auc", 0) for row in history)
    return [row for row in history if row.get("val_auc", 0) >= highest - 0.02][-1]


def save_checkpoint(path, model, **state):
    """Write SAPL and `state` (tensors, plain types), then rename the file: an interruption leaves
    the previous one intact. An official CLIP is stored by name alone. Raises OSError."""
    weights = {key: x.cpu() for key, x in model.state_dict().items()}
    own = {key: x for key, x in weights.items() if not infer.is_backbone(key)}
    backbone = {key.removeprefix("clip."): x for key, x in weights.items() if key not in own}
    if model.config["clip"] in clip.OFFICIAL:
        backbone = {"name": model.config["clip"]}
    content = {"format": infer.FORMAT, "config": model.config, "clip": backbone, "model": own}
    part = Path(f"{path}.part")
    with part.open("wb") as file:                        # given a path, torch would hide an OSError
        torch.save(content | state, file)
    part.replace(path)


# -------------------------------------------------------------------------------------- the loop

def learning_rate(done):
    """Learning-rate multiplier after a fraction `done` of training: linear warm-up, cosine decay to
    a tenth. A run prolonged by --resume --epochs follows the longer schedule: its rate rises."""
    if done < 0.05:
        return done / 0.05
    return 0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi * done))


def connect(name):
    """(device, rank of this process, number of processes), the last two as torchrun set them."""
    device = infer.pick_device(name)
    if "RANK" not in os.environ:
        return device, 0, 1
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device, dist.get_rank(), dist.get_world_size()


class Run:
    """All state of a training run. A wrong call fails here, before the first step, with a BadInput
    or OSError of one line."""

    def __init__(self, args, state):
        self.args = args
        self.device, self.rank, self.world = connect(args.device)
        if args.batch % self.world or args.splices % self.world or args.splices == self.world:
            raise BadInput(f"found --batch {args.batch} and --splices {args.splices}, expected "
                           f"multiples of {self.world} (processes), no or several splices each")
        # model
        model = make_model(args).to(self.device)
        model.dtype = infer.pick_dtype(args.precision, self.device)
        self.model = model.train()

        # pictures
        pictures, self.held_out = read_pictures(args, state and state["held_out"])
        self.labels = np.array([p.label for p in pictures])
        self.train_set = data.TrainingSet(
            pictures, max_side=model.config["max_side"], cell=model.cell,
            window=model.config["window"], seed=args.seed)

        # losses and optimizer
        self.objective = Objective(model, args.hecl, self.labels).to(self.device)
        trained = [p for p in self.objective.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trained)

        self.history = []                                        # one row per epoch
        if state:
            self.objective.hecl.load_state_dict(state["hecl"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.history = state["history"]
        Path(args.out).mkdir(parents=True, exist_ok=True)

    def end_epoch(self, row):
        """Append the row; rank 0 writes best.pt (if `best_of` picks it), last.pt and log.csv."""
        self.history.append(row)
        if self.rank > 0:
            return
        out = self.args.out
        if best_of(self.history) is row:
            save_checkpoint(Path(out, "best.pt"), self.model)
        save_checkpoint(Path(out, "last.pt"), self.model, history=self.history,
                        held_out=[str(p.path) for p in self.held_out], settings=vars(self.args),
                        hecl=self.objective.hecl.state_dict(),
                        optimizer=self.optimizer.state_dict())
        print("  ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
        with open(Path(out, "log.csv"), "w", newline="") as file:
            writer = csv.DictWriter(file, row)
            writer.writeheader()
            writer.writerows(self.history)


def train_epoch(run, objective, epoch):
    """One pass over the pictures -> its mean losses, a dict."""
    args = run.args
    run.train_set.epoch = epoch
    # of W processes, each takes every W-th column: its share of both kinds
    plan = plan_epoch(run.labels, args, epoch)[:, run.rank::run.world]
    loader = DataLoader(run.train_set, batch_sampler=plan.tolist(), num_workers=args.workers)

    rng = np.random.default_rng((args.seed, epoch, run.rank))
    torch.manual_seed(int(rng.integers(2 ** 31)))        # for the noise and colours of synthesis
    total = torch.zeros(4, device=run.device)
    for step, (windows, labels) in enumerate(loader):
        done = (epoch * len(plan) + step + 1) / (args.epochs * len(plan))
        for group in run.optimizer.param_groups:
            group["lr"] = args.lr * learning_rate(done)

        # pictures
        image, labels, truth = make_batch(windows.to(run.device), labels.to(run.device),
                                          args.splices // run.world, run.model.cell, rng)
        # losses and gradients
        losses = objective(image, labels, truth)
        losses[0].backward()
        nn.utils.clip_grad_norm_(run.objective.parameters(), 1.0)      # ours: norm at most 1

        # update
        run.optimizer.step()
        run.optimizer.zero_grad()
        total += losses.detach()

    if run.world > 1:
        dist.all_reduce(total)
    means = (total / len(plan) / run.world).tolist()
    return dict(zip(("loss", "label_loss", "patch_loss", "hecl"), means))


def train(run):
    """Train until `run` has all its epochs."""
    args = run.args
    if run.rank == 0:
        trained = sum(p.numel() for p in run.objective.parameters() if p.requires_grad)
        print(f"{len(run.labels)} pictures to train on, {len(run.held_out)} held out; "
              f"{trained:,} weights, {run.model.dtype} on {run.device} x {run.world}", flush=True)
    objective = run.objective
    if run.world > 1:
        objective = nn.parallel.DistributedDataParallel(objective)

    for epoch in range(len(run.history), args.epochs):
        began = time.time()
        losses = train_epoch(run, objective, epoch)
        if not math.isfinite(losses["loss"]):
            raise BadInput(f"found loss {losses['loss']} in epoch {epoch + 1}, expected a number: "
                           "lower --lr and start anew")
        row = {"epoch": epoch + 1} | losses | validate(run.model, run.held_out)
        row["minutes"] = (time.time() - began) / 60
        run.end_epoch(row)
    if run.rank == 0:
        print(f"finished: best.pt is from epoch {best_of(run.history)['epoch']}; next: "
              f"`python infer.py PICTURES --checkpoint {args.out}/best.pt`", flush=True)
    if run.world > 1:
        dist.destroy_process_group()


def main(arguments=None):
    """The command line; returns the exit status: 0 done, 2 stopped by an error."""
    try:
        train(Run(*read_settings(arguments)))
        return 0
    except torch.OutOfMemoryError:
        line = "found too little memory on the GPU: lower --batch or --splices"
    except (BadInput, OSError) as error:
        line = str(error).strip().rpartition("\n")[2]    # a worker sends its whole traceback
    print(f"error: {line.removeprefix('data.BadInput: ')}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)   # Ctrl-C ends at once: finished epochs are kept
    sys.exit(main())
