"""Train SAPL from pictures that carry one label each, genuine or manipulated; masks are never read.

    python train.py --data FOLDER            au/ and tp/ inside, or a list: path,label
    python train.py --synthesize PHOTOS      genuine photos; the manipulations are made on the way
    python train.py .. --resume              goes on after any interruption, bit for bit
    torchrun --nproc_per_node=4 train.py ..  the same training on several GPUs

Writes into --out: last.pt (everything, to resume), best.pt (for infer.py), log.csv, curves.png.
Shapes: B pictures, N = h * w patches, Dv image width.
"""
import argparse
import contextlib
import copy
import csv
import dataclasses
import functools
import math
import os
import resource
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

import clip
import data
import infer
from hecl import HECL


# -------------------------------------------------------------------------------------- settings

def option(default, text, *choices):
    """A setting: its default, its help text and, where they are few, its values."""
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices or None})


@dataclasses.dataclass
class Config:
    """All settings of a run, and the command line. Values are ours: the paper gives none."""
    data: str = option("", "pictures with labels: folder with au/ and tp/, or list file")
    synthesize: str = option("", "instead of --data: folder of genuine photos")
    out: str = option("runs/sapl", "folder of the run")
    val: float = option(0.15, "share of the training pictures held out to choose and calibrate")
    size: int = option(224, "side of the training crops, pixels")
    count: int = option(8192, "pictures an epoch with --synthesize, half of them genuine")
    augment: bool = option(True, "random windows and flips of --data, new in every epoch")
    clip: str = option("tiny", "tiny, ViT-B/32, ViT-B/16, ViT-L/14, ViT-L/14@336px or a file")
    init: str = option("", "start from this SAPL checkpoint and its model settings")
    tune: str = option("lora", "what of CLIP is trained", "lora", "full", "none")
    lora_rank: int = option(8, "rank of LoRA")
    lora_alpha: float = option(16.0, "LoRA adds alpha / rank times its product")
    levels: tuple = option((), "blocks whose features are used, from 1; none: thirds of the tower")
    context: int = option(8, "learned context tokens of a prompt")
    class_words: tuple = option(("genuine", "manipulated"), "words that end the two prompts")
    edge_source: str = option("image", "where soft edges come from", "image", "features")
    prompts: str = option("edges", "what shapes prompts", "edges", "patches", "plain", "none")
    dense: str = option("plain", "attention of the last block", "plain", "vv", "qqkk")
    rho: float = option(0.1, "share of the patches that make the image score")
    max_side: int = option(1024, "longest side of a picture at inference, pixels")
    hecl: float = option(0.1, "weight of the edge contrastive loss; 0 = off")
    hecl_dim: int = option(64, "width of the contrast space")
    hecl_queue: int = option(1024, "features a class and level in the queues; 0 = the batch alone")
    hecl_tau: float = option(0.1, "temperature of the contrast")
    hecl_share: float = option(0.4, "share of the patches that are edge patches")
    hecl_top: int = option(4, "patches a picture and kind that are contrasted")
    hecl_clean: float = option(0.5, "weight of the genuine patches of manipulated pictures")
    hecl_warmup: float = option(0.1, "share of the training in which the weight rises from 0")
    mosaic: int = option(1, "K: K x K crops are one picture, each cell has its label; 1 = off")
    epochs: int = option(20, "passes over the training pictures")
    batch: int = option(32, "pictures a step, of all processes and parts together")
    accumulate: int = option(1, "parts in which a batch is computed, to save memory")
    lr: float = option(5e-4, "learning rate of ECPL, HECL and LoRA")
    lr_clip: float = option(1e-5, "learning rate of CLIP's own weights, with --tune full")
    weight_decay: float = option(0.02, "AdamW's decay of matrices")
    warmup: float = option(0.05, "share of the training in which the learning rate rises")
    ema: float = option(0.0, "decay of the averaged weights of best.pt; 0 = off, try 0.999")
    seed: int = option(0, "of everything random")
    device: str = option("auto", "auto, cpu, cuda, mps")
    precision: str = option("fp32", "bf16 for GPUs that have it", "fp32", "bf16")
    recompute: bool = option(False, "recompute the image tower when going back: less memory")
    workers: int = option(2, "processes that load pictures, for each training process")
    save_every: float = option(10.0, "minutes between two saves within an epoch")
    bad_limit: int = option(100, "unreadable pictures to tolerate")
    resume: bool = option(False, "go on from --out, if there is something")


SIGNALS = (signal.SIGINT, signal.SIGTERM)
LOSSES = ("loss", "bce", "hecl")
FREE = {"out", "device", "workers", "save_every", "bad_limit", "resume"}    # may change on --resume


def parse(arguments=None):
    """Command line, or a list of words -> Config. Exits with status 2 on what it does not know."""
    parser = argparse.ArgumentParser(
        prog="train.py", allow_abbrev=False, description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for field in dataclasses.fields(Config):
        words = {"type": field.type, "choices": field.metadata["choices"]}
        if field.type is bool:
            words = {"action": argparse.BooleanOptionalAction}
        elif field.type is tuple:
            words = {"nargs": "*", "type": int if field.name == "levels" else str}
        parser.add_argument("--" + field.name.replace("_", "-"), default=field.default,
                            help=field.metadata["help"], **words)
    values = vars(parser.parse_args(arguments))
    return Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


# -------------------------------------------------------------------------------------- pictures

class Tolerant(Dataset):
    """Puts another picture in the place of an unreadable one: image, label, index, [messages]."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, index):
        bad = []
        for _ in range(len(self.dataset)):
            try:
                return *self.dataset[index], bad
            except data.BadPicture as error:
                bad.append(str(error))
                index = (index + 2) % len(self.dataset)       # by 2: synthetic pairs alternate
        raise data.BadPicture(f"found no readable picture, expected {len(self.dataset)}: {bad[-1]}")


def collate(items):
    """Items -> image (B, 3, size, size), labels (B,), indices [B], messages."""
    image, labels, indices, bad = zip(*items)
    return torch.stack(image), torch.tensor(labels), list(indices), sum(bad, [])


def deaf(worker):
    """Ctrl-C and torchrun signal whole groups: loaders go on until their training process ends."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def load(dataset, plan, config):
    """The batches of a plan, lists of indices, made ahead by --workers processes."""
    return DataLoader(Tolerant(dataset), batch_sampler=plan, collate_fn=collate,
                      worker_init_fn=deaf, num_workers=config.workers, generator=torch.Generator())


def make_sets(config):
    """(training set, validation set, names of training pictures, genuine validation pictures).

    Paths and labels only: no way to a mask.
    """
    if bool(config.data) == bool(config.synthesize):
        raise ValueError("found both or none of --data and --synthesize: name one of them")
    if config.data:
        pictures = [p for p in data.read_set(config.data, masks=False)[0] if p.label is not None]
    else:
        files = sorted(Path(config.synthesize).rglob("*"))
        pictures = [data.Picture(path, 0, source=path.stem) for path in files
                    if path.suffix.lower() in data.EXTENSIONS]
    sets, names, common = [], [], {"size": config.size, "seed": config.seed}
    for part, held_out in zip(data.split(pictures, config.val, config.seed), (False, True)):
        if {p.label for p in part} != ({0, 1} if config.data else {0}):
            raise ValueError(f"found {len(part)} pictures to {'validate' if held_out else 'train'} "
                             f"in {config.data or config.synthesize}, expected both classes with "
                             "--data, photos with --synthesize: add pictures, or change --val")
        if config.data:
            names = names or [str(p.path) for p in part]
            sets.append(data.TrainingSet([(p.path, p.label) for p in part], **common,
                                         augment=config.augment and not held_out))
        else:
            count = max(32, min(512, config.val * config.count)) if held_out else config.count
            count = int(count) // 2 * 2                                           # in pairs
            sets.append(data.SynthesisSet([p.path for p in part], count=count, **common))
    return *sets, names, [p.path for p in part if not p.label]


def batches(labels, count, config, epoch):
    """The order of an epoch, from (seed, epoch) alone: indices (steps, batch).

    labels: each class is shuffled and spread evenly, so that every batch has both. None: synthetic
    pairs, new in every epoch; a picture and its own manipulation stay in one batch.
    """
    rng, place = np.random.default_rng((config.seed, epoch)), np.arange(count, dtype=float)
    for label in (0, 1) if labels else ():
        members = rng.permutation(np.flatnonzero(np.array(labels) == label))
        place[members] = (np.arange(len(members)) + rng.random()) / len(members)
    if count < config.batch:
        raise ValueError(f"found {count} training pictures, --batch is {config.batch}: lower it")
    order = place.argsort()[:count // config.batch * config.batch]
    return rng.permuted(order.reshape(-1, config.batch), axis=1)


# ------------------------------------------------------------------------------- model and losses

def tile(image, K):
    """Mosaics (after CLIM): image (B, 3, H, W) -> (B / K^2, 3, K * H, K * W), row by row."""
    return image.unflatten(0, (-1, K, K)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def untile(x, K, h, w):
    """Patches of mosaics -> of their cells: x (B / K^2, K * h * K * w, ..) -> (B, h * w, ..)."""
    return x.unflatten(1, (K, h, K, w)).transpose(2, 3).flatten(0, 2).flatten(1, 2)


class Objective(nn.Module):
    """The model with its losses: image-level cross-entropy + weight * HECL."""

    def __init__(self, model, hecl, config, balance):
        super().__init__()
        self.model, self.hecl, self.mosaic, self.weight = model, hecl, config.mosaic, config.hecl
        self.register_buffer("balance", torch.tensor(balance))    # both classes weigh the same

    def forward(self, image, labels, ramp):
        """image (B, 3, H, W) in [0, 1], labels (B,), ramp of HECL in [0, 1] -> (3,), see LOSSES."""
        output, K = self.model(tile(image, self.mosaic)), self.mosaic
        h, w = (side // K for side in output.logits.shape[1:])
        x = *output.levels, output.edges, output.logits.flatten(1)
        *levels, edges, logits = (untile(x.float(), K, h, w) for x in x)    # [(B, N, Dv)], (B, N)
        score = infer.ecpl.pool_score(logits, self.model.ecpl.rho)               # (B,)
        bce = F.binary_cross_entropy_with_logits(score, labels.float(), pos_weight=self.balance)
        contrast = self.hecl(levels, edges, logits.sigmoid(), labels) if self.weight else 0 * bce
        return torch.stack([bce + self.weight * ramp * contrast, bce, contrast])


# ------------------------------------------------------------------------------- state of a run

def make_model(config):
    """SAPL in its starting state: CLIP's weights with a new ECPL, or all of --init.

    What is tuned is not OpenAI's own any more: under its new name, checkpoints hold it in full.
    """
    settings = vars(config) | {"dense": None if config.dense == "plain" else config.dense}
    if config.init or config.clip == "tiny":
        old = infer.SAPL.load(config.init or None, device="cpu")   # its LoRA, if any, is merged
        settings["clip"] = old.clip.name = "tuned " + old.clip.name.removeprefix("tuned ")
        model = infer.SAPL(old.clip, settings | {key: old.config[key] for key in infer.ECPL_KEYS})
        model.ecpl.load_state_dict(old.ecpl.state_dict())
        return model
    backbone = clip.load(config.clip)
    depth = len(backbone.visual.transformer.resblocks)
    settings["levels"] = config.levels or sorted({max(1, depth * part // 3) for part in (1, 2, 3)})
    if not all(1 <= level <= depth for level in settings["levels"]):
        raise ValueError(f"found --levels {config.levels}, {config.clip} has blocks 1 to {depth}")
    return infer.SAPL(backbone, settings)


def last_checkpoint(out):
    """The newest whole state of a run, or None. A kill can leave only the one before the last."""
    names = "last.pt", "last.pt.previous"
    return next((path for name in names if (path := Path(out, name)).is_file()), None)


def resumed(config):
    """(settings, checkpoint or None) of a run: with --resume it keeps its own settings."""
    found = last_checkpoint(config.out)
    if found and not config.resume:
        raise ValueError(f"{config.out} holds a run: add --resume, or choose another --out")
    if not found:
        return config, None
    state, now, default = infer.load_checkpoint(found), vars(config), vars(Config())
    own = state["settings"] | {key: now[key] for key in FREE}
    changed = [f"--{key} {now[key]}" for key in now if now[key] not in (default[key], own[key])]
    if changed:
        raise ValueError(f"--resume keeps the settings of {found}, found {', '.join(changed)}: "
                         "leave that out, or start anew with --init and another --out")
    return Config(**own), state


class Run:
    """All that a training is at a moment, saved as a whole: a resumed run is the same run."""

    def __init__(self, config, state, device, names):
        self.config, self.device, self.names = config, device, names
        self.signal, self.saved = 0, time.time()
        self.now = {"epoch": 0, "step": 0, "sums": [0.0] * 3, "history": [], "bad": []}
        torch.manual_seed(config.seed)
        self.model = (infer.SAPL.load(last_checkpoint(config.out), "cpu", merge=False) if state
                      else make_model(config)).to(device).train()
        self.mean = copy.deepcopy(self.model) if config.ema else self.model      # averaged weights
        if config.recompute:
            for block in self.model.clip.visual.transformer.resblocks:
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        self.hecl = HECL([len(self.model.clip.visual.proj)] * len(self.model.ecpl.levels),
                         dim=config.hecl_dim, queue=config.hecl_queue, tau=config.hecl_tau,
                         share=config.hecl_share, top=config.hecl_top, clean=config.hecl_clean)
        self.hecl.to(device).requires_grad_(config.hecl > 0)
        self.optimizer = torch.optim.AdamW(self.groups())
        if state:
            self.optimizer.load_state_dict(state["optimizer"])
            self.hecl.load_state_dict(state["hecl"])
            self.mean.load_state_dict(state["mean"], strict=False)
            self.now = state["now"]
            torch.set_rng_state(state["rng"])

    def groups(self):
        """AdamW's groups: CLIP's own weights at --lr-clip, new ones at --lr; matrices decay."""
        groups, config = {}, self.config
        for name, p in [*self.model.named_parameters(), *self.hecl.named_parameters("hecl")]:
            if p.requires_grad:
                lr = config.lr_clip if infer.is_backbone(name) else config.lr
                groups.setdefault((lr, config.weight_decay if p.ndim > 1 else 0.0), []).append(p)
        return [{"params": ps, "lr": lr, "base": lr, "weight_decay": decay}
                for (lr, decay), ps in groups.items()]

    def save(self):
        """last.pt: what the training needs to go on, beside the weights."""
        mean = dict(self.mean.named_parameters()) if self.config.ema else {}
        mean = {key: p for key, p in mean.items() if p.requires_grad}
        self.write("last.pt", self.model, optimizer=self.optimizer.state_dict(), now=self.now,
                   mean=mean, hecl=self.hecl.state_dict(), rng=torch.get_rng_state())
        self.saved = time.time()

    def write(self, name, model, **state):
        """Write a checkpoint; on a full disk OSError in one line, what was there stays."""
        path = Path(self.config.out, name)
        try:
            infer.save_checkpoint(path, model, settings=vars(self.config), **state)
        except (OSError, RuntimeError) as error:
            path.with_name(name + ".part").unlink(missing_ok=True)
            reason, last = str(error).splitlines()[0], last_checkpoint(path.parent)
            raise OSError(f"cannot write {path} ({reason}); the last good one is kept ({last}): "
                          "make room, then go on with --resume") from error


# --------------------------------------------------------------------- validation, log, curves

@torch.no_grad()
def validate(run, dataset):
    """Image AUC and loss on held-out pictures by their labels, and what the maps look like."""
    (rank, world), rows = ranks(), []
    size = max(1, run.config.batch // run.config.accumulate // world)
    plan = torch.arange(rank, len(dataset), world).split(size)
    for image, labels, _, _ in load(dataset, [part.tolist() for part in plan], run.config):
        output = run.mean(image.to(run.device))
        maps = output.probability.flatten(1).cpu()                               # (B, N)
        rows += torch.stack([labels, output.score_logit.cpu(), maps.mean(dim=1), maps.amin(dim=1),
                             maps.amax(dim=1)], dim=1).tolist()
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, rows)
        rows = sum(parts, [])
    labels, logits, mean, low, high = np.array(rows).T
    return {"val_loss": float(np.logaddexp(0, np.where(labels > 0, -logits, logits)).mean()),
            "val_auc": float(infer.rank_auc(logits, labels)),
            "map_genuine": mean[labels == 0].mean().item(),
            "map_manipulated": mean[labels == 1].mean().item(),
            "map_low": low.min().item(), "map_high": high.max().item()}


def log(row, history, out):
    """Print an epoch in one line; log.csv and curves.png are made anew from all rows so far."""
    print("  ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
    with open(Path(out, "log.csv"), "w", newline="") as file:
        table = csv.DictWriter(file, row)
        table.writeheader()
        table.writerows(history)
    curves(history).save(Path(out, "curves.png"))
    if row["map_high"] < 0.5 or row["map_low"] > 0.5:
        print(f"warning: the maps are all {int(row['map_low'] > 0.5)} on the validation pictures "
              f"({row['map_low']:.2f} to {row['map_high']:.2f}): train longer, or change --lr",
              file=sys.stderr)


def curves(history, width=640, height=200):
    """Panels over the epochs: losses, image AUC, mean of the maps -> PIL image."""
    image = Image.new("RGB", (width, 3 * height), "white")
    draw = ImageDraw.Draw(image)
    panels = ("bce", "hecl", "val_loss"), ("val_auc",), ("map_genuine", "map_manipulated")
    for top, keys in zip(range(0, image.height, height), panels):
        values = [row[key] for row in history for key in keys]
        low, high = min(values), max(max(values), min(values) + 1e-6)
        draw.text((4, top + 20), f"{high:.3f}", "black")
        draw.text((4, top + height - 24), f"{low:.3f}", "black")
        for i, (key, color) in enumerate(zip(keys, ("blue", "red", "green"))):
            points = [(60 + (width - 80) * j / max(1, len(history) - 1),
                       top + 24 + (height - 40) * (high - row[key]) / (high - low))
                      for j, row in enumerate(history)]
            draw.text((60 + 130 * i, top + 4), key, color)
            draw.line(points, color, width=2)
    return image


# ------------------------------------------------------------------------------------------ loop

def ranks():
    """(number of this process, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def schedule(done, warmup):
    """Factor of the learning rate at a share `done` of the training: a rise, then half a cosine."""
    if done < warmup:
        return done / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (done - warmup) / (1 - warmup))


def train_step(run, objective, pictures, done):
    """One step of the optimizer, at a share `done` of the training -> whether to stop after it."""
    config, now, world, names = run.config, run.now, ranks()[1], []
    total = torch.zeros(5, device=run.device)            # three losses, gradient, told to stop
    for part in range(config.accumulate):
        image, labels, numbers, bad = next(pictures)
        names += [run.names[i] if run.names else f"number {i}" for i in numbers]
        for message in set(bad) - set(now["bad"]):
            now["bad"].append(message)
            print(f"skipped {message}", file=sys.stderr)
        alone = world > 1 and part + 1 < config.accumulate     # gradients are exchanged once a step
        with objective.no_sync() if alone else contextlib.nullcontext():
            with torch.autocast(run.device.type, torch.bfloat16, config.precision == "bf16"):
                losses = objective(image.to(run.device), labels.to(run.device),
                                   min(1.0, done / max(config.hecl_warmup, 1e-9)))
            (losses[0] / config.accumulate).backward()
        total[:3] += losses.detach() / config.accumulate
    for group in run.optimizer.param_groups:
        group["lr"] = group["base"] * schedule(done, config.warmup)
    weights = [p for group in run.optimizer.param_groups for p in group["params"]]
    total[3], total[4] = nn.utils.clip_grad_norm_(weights, 1.0), run.signal      # ours: length 1
    if world > 1:
        dist.all_reduce(total)
    *values, stop = (total / world).tolist()
    if len(now["bad"]) > config.bad_limit:
        raise ValueError(f"{len(now['bad'])} unreadable pictures, --bad-limit is "
                         f"{config.bad_limit}: look with `python data.py FOLDER`, or raise it")
    if not all(map(math.isfinite, values)):
        raise ValueError(f"loss {values[0]:.4g}, gradient {values[3]:.4g} in epoch "
                         f"{now['epoch'] + 1}, step {now['step'] + 1}, pictures "
                         f"{', '.join(names)}: lower --lr or look at them; the last good "
                         f"checkpoint is {last_checkpoint(config.out)}")
    run.optimizer.step()
    run.optimizer.zero_grad()
    for mean, p in zip(run.mean.parameters(), run.model.parameters()):
        if config.ema and p.requires_grad:
            mean.data.lerp_(p.detach(), 1 - config.ema)
    now["sums"] = [a + b for a, b in zip(now["sums"], values)]
    now["step"] += 1
    return stop > 0


def run_epoch(run, objective, train_set, val_set):
    """What is left of an epoch, then its validation and its row of the log."""
    config, now, (rank, world) = run.config, run.now, ranks()
    began, first = time.time(), now["step"]
    plan = batches(getattr(train_set, "labels", None), len(train_set), config, now["epoch"])
    mine = plan.reshape(len(plan), config.accumulate, world, -1)[:, :, rank]     # (steps, parts, B)
    train_set.set_epoch(now["epoch"])
    pictures = iter(load(train_set, mine[first:].reshape(-1, mine.shape[-1]).tolist(), config))
    while now["step"] < len(plan):
        done = (now["epoch"] * len(plan) + now["step"] + 1) / (config.epochs * len(plan))
        stop = train_step(run, objective, pictures, done)
        if rank == 0 and (stop or time.time() - run.saved > 60 * config.save_every):
            run.save()
        if stop:
            raise SystemExit(128 + (run.signal or signal.SIGTERM))
        if rank == 0 and sys.stderr.isatty():
            print(f"epoch {now['epoch'] + 1} step {now['step']}/{len(plan)} loss "
                  f"{now['sums'][0] / now['step']:.4f}", end="\r", file=sys.stderr)
    speed = (now["step"] - first) * config.batch / (time.time() - began)
    row = {"epoch": now["epoch"] + 1} | {k: v / len(plan) for k, v in zip(LOSSES, now["sums"])}
    memory = torch.cuda.max_memory_allocated() / 1e9 if run.device.type == "cuda" \
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6            # on Linux in KB
    row |= validate(run, val_set) | {"pictures_per_s": speed, "memory_gb": memory}
    row["minutes_left"] = (time.time() - began) * (config.epochs - row["epoch"]) / 60
    now["history"].append(row)
    now |= {"epoch": row["epoch"], "step": 0, "sums": [0.0] * 3}
    if rank == 0:
        if max(now["history"], key=lambda r: (r["val_auc"], -r["val_loss"])) is row:
            run.write("best.pt", run.mean, epoch=row["epoch"], metrics=row)
        run.save()
        log(row, now["history"], config.out)


def train(config):
    """Train as `config` says -> path of the best checkpoint, by image labels of held-out pictures.

    Raises ValueError or OSError with one line; after SIGINT or SIGTERM SystemExit 130 or 143.
    """
    device = infer.pick_device(config.device)
    if "RANK" in os.environ and not dist.is_initialized():         # started by torchrun
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    (rank, world), (config, state) = ranks(), resumed(config)
    if config.batch % (unit := config.accumulate * world * config.mosaic ** 2):
        raise ValueError(f"found --batch {config.batch}, expected a multiple of {unit} = "
                         "--accumulate x processes x --mosaic^2")
    train_set, val_set, names, genuine = make_sets(config)
    run = Run(config, state, device, names)
    labels = getattr(train_set, "labels", [0, 1])
    balance = labels.count(0) / labels.count(1)
    objective = Objective(run.model, run.hecl, config, balance).to(device)
    if world > 1:        # unused: what of CLIP the map does not need, such as the last class token
        objective = nn.parallel.DistributedDataParallel(
            objective, find_unused_parameters=config.tune == "full")
    if rank == 0:
        print("  ".join(f"{k}={v}" for k, v in run.model.config.items()))
        print(f"{len(train_set)} pictures to train, {len(val_set)} to validate, on {device} x "
              f"{world}; epoch {run.now['epoch'] + 1}, step {run.now['step'] + 1}", flush=True)

    def on_signal(number, frame):
        if run.signal:
            raise SystemExit(128 + number)              # told twice: at once, without saving
        run.signal = number

    before = {number: signal.signal(number, on_signal) for number in SIGNALS}
    try:
        while run.now["epoch"] < config.epochs:
            run_epoch(run, objective, train_set, val_set)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if rank == 0:
        calibrate(run, genuine)
    return Path(config.out, "best.pt")


def calibrate(run, genuine, share=0.05):
    """Threshold of best.pt (ours): above it lie `share` of the pixels of genuine pictures."""
    path, values = Path(run.config.out, "best.pt"), []
    model, state = infer.SAPL.load(path, run.device, merge=False), infer.load_checkpoint(path)
    for picture in genuine:
        with contextlib.suppress(data.BadPicture):
            values.append(np.quantile(model.localize(picture).map, np.linspace(0, 1, 201)))
    model.threshold = float(np.quantile(values, 1 - share)) if values else 0.5
    run.write("best.pt", model, epoch=state["epoch"], metrics=state["metrics"])
    print(f"{path}: epoch {state['epoch']}, image AUC {state['metrics']['val_auc']:.3f}, threshold "
          f"{model.threshold:.3f} from {len(values)} genuine pictures", flush=True)


def main(arguments=None):
    config = parse(arguments)
    try:
        train(config)
    except (ValueError, OSError) as error:
        print(f"error: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
