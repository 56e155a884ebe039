"""Train SAPL from pictures that carry one label each, genuine or manipulated; masks are never read.

    python train.py --data FOLDER                    au/ and tp/ inside, or a list: path,label
    python train.py --synthesize PHOTOS              genuine photos; the manipulations are made here
    python train.py .. --resume                      go on after any interruption
    torchrun --nproc_per_node=4 train.py ..          the same training on several GPUs

Writes into --out: last.pt (everything, to resume), best.pt (for infer.py), log.csv, curves.png.
Shapes: B pictures, N = h * w patches, Dv image width.
"""
import argparse
import contextlib
import csv
import dataclasses
import functools
import io
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

def option(default, text, choices=None):
    """A setting: its default, its help text and, if they are few, its choices."""
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices})


@dataclasses.dataclass
class Config:
    """All settings of a run; the command line is made from it. Defaults without a source are ours."""
    data: str = option("", "pictures with labels: folder with au/ and tp/, or list file")
    synthesize: str = option("", "instead of --data: folder of genuine photos to manipulate")
    out: str = option("runs/sapl", "folder of the run")
    val: float = option(0.15, "share of the training pictures held out to choose and calibrate")
    size: int = option(224, "side of the training crops, pixels")
    count: int = option(8192, "pictures an epoch with --synthesize, half of them genuine")
    augment: bool = option(True, "random crops, scales, compression; the same for both classes")

    clip: str = option("tiny", "tiny, ViT-B/32, ViT-B/16, ViT-L/14, ViT-L/14@336px or a file")
    init: str = option("", "start from the weights and model settings of this SAPL checkpoint")
    tune: str = option("lora", "what of CLIP's image tower is trained", ("lora", "full", "none"))
    lora_rank: int = option(8, "rank of LoRA")
    lora_alpha: float = option(16.0, "LoRA's factor is alpha / rank")
    levels: tuple = option((), "blocks whose features are used, from 1; none: thirds of the tower")
    context: int = option(8, "learned context tokens of a prompt")
    class_words: tuple = option(("genuine", "manipulated"), "words that end the two prompts")
    edge_source: str = option("image", "where soft edges come from", ("image", "features"))
    prompts: str = option("edges", "what shapes the prompts", ("edges", "patches", "plain", "none"))
    dense: str = option("plain", "attention of the last block", ("plain", "vv", "qqkk"))
    rho: float = option(0.1, "share of the patches that make the image score")
    max_side: int = option(1024, "longest side of a picture at inference, pixels")

    hecl: float = option(0.1, "weight of the edge contrastive loss; 0 = off")
    hecl_dim: int = option(64, "width of the contrast space")
    hecl_queue: int = option(1024, "features a class and level in the queues; 0 = batch only")
    hecl_tau: float = option(0.1, "temperature of the contrast")
    hecl_share: float = option(0.4, "share of the patches that are edge patches")
    hecl_top: int = option(4, "patches a picture that are contrasted, of each kind")
    hecl_clean: float = option(0.5, "weight of the genuine patches of manipulated pictures")
    hecl_warmup: float = option(0.1, "share of the training in which the weight rises from 0")

    epochs: int = option(20, "passes over the training pictures")
    batch: int = option(32, "pictures a step, of all processes and parts together")
    accumulate: int = option(1, "parts a batch is computed in, to save memory")
    lr: float = option(5e-4, "learning rate of ECPL, HECL and LoRA")
    lr_clip: float = option(1e-5, "learning rate of CLIP's own weights, with --tune full")
    weight_decay: float = option(0.02, "AdamW's decay of matrices")
    warmup: float = option(0.05, "share of the training in which the learning rate rises")
    max_norm: float = option(1.0, "gradients are scaled down to this length")
    ema: float = option(0.0, "decay of averaged weights, used for best.pt; 0 = off, try 0.999")
    mosaic: int = option(1, "K: K x K crops form one picture, each cell with its label; 1 = off")

    seed: int = option(0, "of everything random")
    device: str = option("auto", "auto, cpu, cuda, mps")
    precision: str = option("fp32", "bf16 for GPUs that have it", ("fp32", "bf16"))
    recompute: bool = option(False, "recompute activations in the backward pass: less memory")
    workers: int = option(2, "processes that load pictures, for each training process")
    save_every: float = option(10.0, "minutes between two saves within an epoch")
    bad_limit: int = option(100, "unreadable pictures to tolerate")
    resume: bool = option(False, "go on from --out, if there is something")


LOSSES = ("loss", "bce", "hecl")
FREE = {"out", "device", "workers", "save_every", "bad_limit", "resume"}   # may change on --resume


def parse(arguments=None):
    """The command line, or a list of words -> Config. Exits with status 2 on what it does not know."""
    parser = argparse.ArgumentParser(
        prog="train.py", allow_abbrev=False, description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for field in dataclasses.fields(Config):
        settings = {"help": field.metadata["help"], "default": field.default}
        if field.type is bool:
            settings["action"] = argparse.BooleanOptionalAction
        elif field.type is tuple:
            settings |= {"nargs": "*", "type": int if field.name == "levels" else str}
        else:
            settings |= {"type": field.type, "choices": field.metadata["choices"]}
        parser.add_argument("--" + field.name.replace("_", "-"), **settings)
    values = vars(parser.parse_args(arguments))
    return Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


# -------------------------------------------------------------------------------- what is trained

def make_model(config):
    """SAPL in its starting state: CLIP's weights and a new ECPL, or all of --init."""
    settings = dataclasses.asdict(config)
    settings["dense"] = None if config.dense == "plain" else config.dense
    if not config.init:
        backbone = clip.load(config.clip)
        depth = len(backbone.visual.transformer.resblocks)
        if not all(1 <= level <= depth for level in config.levels):
            raise ValueError(f"--levels {config.levels}: {config.clip} has blocks 1 to {depth}")
        settings["levels"] = config.levels or tuple(
            sorted({max(1, round(depth * part / 3)) for part in (1, 2, 3)}))
        return infer.SAPL(backbone, settings)
    old = infer.load_checkpoint(config.init)["config"]
    kept = {key: old[key] for key in infer.ECPL_KEYS + ("clip",)}
    if old["tune"] == config.tune == "lora":
        kept |= {key: old[key] for key in ("lora_rank", "lora_alpha")}
    same = old["tune"] == config.tune
    model = infer.SAPL.load(config.init, device="cpu", merge=not same)
    if same:
        model.config = settings | kept
        return model
    if old["tune"] == "lora":
        model.clip.name += " tuned"             # no longer OpenAI's: the checkpoint holds it in full
    start = infer.SAPL(model.clip, settings | kept)
    start.ecpl.load_state_dict(model.ecpl.state_dict())
    return start


def parameter_groups(model, hecl, config):
    """AdamW's groups: CLIP's own weights at --lr-clip, all that is new at --lr; decay for matrices."""
    groups = {}
    for name, parameter in [*model.named_parameters(), *hecl.named_parameters("hecl")]:
        if parameter.requires_grad:
            lr = config.lr_clip if infer.is_backbone(name) else config.lr
            decay = config.weight_decay if parameter.ndim >= 2 else 0.0
            groups.setdefault((lr, decay), []).append(parameter)
    return [{"params": group, "lr": lr, "base": lr, "weight_decay": decay}
            for (lr, decay), group in groups.items()]


def schedule(done, warmup):
    """Factor of the learning rate at a share `done` of the training: linear rise, then half a cosine."""
    if done < warmup:
        return done / warmup
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


def recompute_blocks(tower):
    """Gradient checkpointing: the blocks of a tower keep their input only."""
    for block in tower.resblocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


# ------------------------------------------------------------------------------------------ losses

def tile(image, K):
    """Mosaics: image (B, 3, H, W) -> (B / K^2, 3, K * H, K * W), row by row."""
    B, C, H, W = image.shape
    image = image.view(B // K ** 2, K, K, C, H, W).permute(0, 3, 1, 4, 2, 5)     # (b, C, K, H, K, W)
    return image.reshape(B // K ** 2, C, K * H, K * W)                           # (b, C, K * H, K * W)


def untile(x, K, h, w):
    """Back to cells: patches of mosaics x (B / K^2, K * h * K * w, ...) -> (B, h * w, ...)."""
    x = x.reshape(len(x), K, h, K, w, *x.shape[2:]).transpose(2, 3)              # (b, K, K, h, w, ..)
    return x.reshape(-1, h * w, *x.shape[5:])                                    # (B, N, ..)


def join(x):
    """The batches of all processes, (B, ..) -> (processes * B, ..), with gradients for one's own.

    DistributedDataParallel averages gradients over W processes, but each sends back only the
    share of its own rows of a loss that all compute alike: hence the factor W on these.
    """
    if not dist.is_initialized():
        return x
    W, parts = dist.get_world_size(), [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    if x.requires_grad:
        parts[dist.get_rank()] = x.detach() + W * (x - x.detach())
    return torch.cat(parts)


class Objective(nn.Module):
    """The model with its losses, so that one forward pass gives what is to be minimised."""

    def __init__(self, model, hecl, config, balance):
        super().__init__()
        self.model, self.hecl, self.mosaic, self.weight = model, hecl, config.mosaic, config.hecl
        self.register_buffer("balance", torch.tensor(balance))

    def forward(self, image, labels, ramp):
        """image (B, 3, H, W) in [0, 1], labels (B,) -> {"loss", "bce", "hecl"}: scalars."""
        K = self.mosaic
        output = self.model(tile(image, K))
        h, w = (side // K for side in output.logits.shape[1:])
        logits, edges = (untile(x.flatten(1), K, h, w) for x in (output.logits.flatten(1), output.edges))
        score = infer.ecpl.pool_score(logits.float(), self.model.ecpl.rho)       # (B,)
        bce = F.binary_cross_entropy_with_logits(score, labels.float(), pos_weight=self.balance)
        if not self.weight:
            return {"loss": bce, "bce": bce.detach(), "hecl": torch.zeros_like(bce)}
        levels = [join(untile(x.float(), K, h, w)) for x in output.levels]       # [(B, N, Dv)]
        contrast = self.hecl(levels, join(edges), join(logits.sigmoid().float()), join(labels))
        return {"loss": bce + self.weight * ramp * contrast, "bce": bce.detach(),
                "hecl": contrast.detach()}


# ---------------------------------------------------------------------------------------- pictures

class Tolerant(Dataset):
    """A training set whose unreadable pictures are replaced by the next of the same kind.

    Items are (image, label, index, [what was bad]); after `limit` in a row the error is raised.
    """

    def __init__(self, dataset, limit):
        self.dataset, self.limit = dataset, limit

    def __getitem__(self, index):
        bad = []
        while True:
            try:
                return *self.dataset[index], bad
            except data.BadPicture as error:
                bad.append(str(error))
                if len(bad) > self.limit:
                    raise
                index = (index + 2) % len(self.dataset)       # pairs alternate the classes


def collate(items):
    """Items -> image (B, 3, size, size), labels (B,), indices [B], messages."""
    images, labels, indices, bad = zip(*items)
    return torch.stack(images), torch.tensor(labels), list(indices), sum(bad, [])


def make_sets(config):
    """(training set, validation set, genuine validation paths); labels only, no way to a mask."""
    if bool(config.data) == bool(config.synthesize):
        raise ValueError("found both or neither of --data and --synthesize: name one of them")
    if config.data:
        pictures = [p for p in data.read_set(config.data, need_both=True)[0] if p.label is not None]
        train, val = data.split(pictures, config.val, config.seed)
        sets = [data.TrainingSet([(p.path, p.label) for p in part], size=config.size,
                                 seed=config.seed, augment=augment)
                for part, augment in ((train, config.augment), (val, False))]
        check = {p.label for p in val}
        if check != {0, 1}:
            raise ValueError(f"the validation part has {len(val)} pictures of class {sorted(check)}, "
                             "both classes are needed: give more pictures or a larger --val")
    else:
        found = [p for p in sorted(Path(config.synthesize).rglob("*"))
                 if p.suffix.lower() in data.EXTENSIONS]
        if len(found) < 4:
            raise ValueError(f"found {len(found)} photos in {config.synthesize}, expected a folder of "
                             "genuine photos, hundreds at best")
        train, val = data.split([data.Picture(p, 0, source=p.stem) for p in found],
                                config.val, config.seed)
        counts = config.count, min(512, max(32, round(config.val * config.count)))
        sets = [data.SynthesisSet([p.path for p in part], size=config.size, count=count // 2 * 2,
                                  seed=config.seed + place)
                for place, (part, count) in enumerate(zip((train, val), counts))]
    return *sets, [p.path for p in val if not p.label]


def batches(labels, config, epoch):
    """The order of an epoch, from (seed, epoch) alone: indices (steps, batch).

    Labelled pictures: each class is shuffled and spread evenly, so that every batch has both.
    Synthetic pairs (labels None): a picture and its own manipulation stay in one batch.
    """
    rng, count = np.random.default_rng((config.seed, epoch)), len(labels) if labels else config.count
    if labels:
        labels, place = np.array(labels), np.zeros(len(labels))
        for label in (0, 1):
            members = np.flatnonzero(labels == label)
            place[rng.permutation(members)] = (np.arange(len(members)) + rng.random()) / len(members)
        order = place.argsort()
    else:
        order = np.arange(count // 2 * 2)
    if len(order) < config.batch:
        raise ValueError(f"found {len(order)} training pictures, --batch is {config.batch}: lower it")
    order = order[:len(order) // config.batch * config.batch].reshape(-1, config.batch)
    return rng.permuted(order, axis=1)


# ------------------------------------------------------------------------------------- validation

@torch.no_grad()
def validate(run, dataset):
    """Image AUC and loss on held-out pictures by their labels, and what the maps look like."""
    rank, world, rows = *ranks(), []
    mine = list(range(rank, len(dataset), world))
    size = max(1, run.config.batch // world)
    loader = DataLoader(Tolerant(dataset, run.config.bad_limit), collate_fn=collate,
                        batch_sampler=[mine[i:i + size] for i in range(0, len(mine), size)],
                        num_workers=run.config.workers)
    with run.averaged():
        run.model.eval()
        for image, labels, _, _ in loader:
            with run.autocast():
                output = run.model(image.to(run.device))
            maps = output.probability.float().flatten(1)                         # (B, N)
            rows += zip(labels.tolist(), output.score_logit.float().tolist(), maps.mean(1).tolist(),
                        maps.amin(1).tolist(), maps.amax(1).tolist())
            if run.signal:
                break
        run.model.train()
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, rows)
        rows = sum(parts, [])
    label, logit, mean, low, high = np.array(rows).T
    loss = F.binary_cross_entropy_with_logits(torch.tensor(logit), torch.tensor(label))
    return {"val_loss": loss.item(), "val_auc": infer.rank_auc(logit, label),
            "map_genuine": mean[label == 0].mean().item(),
            "map_manipulated": mean[label == 1].mean().item(),
            "map_low": low.min().item(), "map_high": high.max().item()}


def calibrate(model, paths, share=0.05):
    """The threshold above which `share` of the pixels of genuine pictures lie; no mask is used."""
    values = []
    for path in paths:
        with contextlib.suppress(data.BadPicture):
            values.append(np.quantile(model.localize(path).map, np.linspace(0, 1, 201)))
    return float(np.quantile(values, 1 - share)) if values else 0.5


# --------------------------------------------------------------------------------- state of a run

class Run:
    """All that a training is at a moment: saved as a whole, so a resumed run is the same run."""

    def __init__(self, config, model, hecl, device):
        self.config, self.model, self.hecl, self.device = config, model, hecl, device
        self.optimizer = torch.optim.AdamW(parameter_groups(model, hecl, config))
        self.trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
        self.ema = {k: p.detach().clone() for k, p in self.trained.items()} if config.ema else {}
        self.weights = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.epoch, self.step, self.history, self.sums, self.bad = 0, 0, [], {}, []
        self.signal, self.saved = 0, time.time()

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, self.config.precision == "bf16")

    @contextlib.contextmanager
    def averaged(self):
        """Inside, the model has its averaged weights, if --ema is on."""
        own = {k: self.trained[k].detach().clone() for k in self.ema}
        for k, value in self.ema.items():
            self.trained[k].data.copy_(value)
        yield
        for k, value in own.items():
            self.trained[k].data.copy_(value)

    def save(self):
        """Write last.pt. What the training needs beyond the weights goes along."""
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state()
        write(Path(self.config.out) / "last.pt", self.model, optimizer=self.optimizer.state_dict(),
              hecl=self.hecl.state_dict(), ema=self.ema, rng=rng, epoch=self.epoch, step=self.step,
              history=self.history, sums=self.sums, bad=self.bad)
        self.saved = time.time()

    def restore(self, state):
        """Take over everything of a checkpoint but the model's weights, which are loaded already."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.hecl.load_state_dict(state["hecl"])
        for k, value in state["ema"].items():
            self.ema[k].copy_(value)
        torch.set_rng_state(state["rng"]["cpu"])
        if self.device.type == "cuda" and "cuda" in state["rng"]:
            torch.cuda.set_rng_state(state["rng"]["cuda"])
        for key in ("epoch", "step", "history", "sums", "bad"):
            setattr(self, key, state[key])


def write(path, model, **state):
    """save_checkpoint with one line for a full disk; the checkpoint that was there stays."""
    try:
        infer.save_checkpoint(path, model, **state)
    except (OSError, RuntimeError) as error:
        path.with_name(path.name + ".part").unlink(missing_ok=True)
        reason = str(error).splitlines()[0]
        raise OSError(f"cannot write {path} ({reason}); the last good checkpoint is kept: make room, "
                      "then go on with --resume") from error


def last_checkpoint(out):
    """The newest whole checkpoint of a run, or None: a kill can leave only the previous one."""
    return next((path for path in (Path(out) / "last.pt", Path(out) / "last.pt.previous")
                 if path.is_file()), None)


def start(config, device):
    """A new Run, or with --resume the one found in --out."""
    found = last_checkpoint(config.out)
    if found and not config.resume:
        raise ValueError(f"{config.out} holds a run: go on with --resume, or choose another --out")
    torch.manual_seed(config.seed)
    state = infer.load_checkpoint(found) if found else None
    if state:
        now = dataclasses.asdict(config)
        changed = [f"--{key.replace('_', '-')} {now[key]} instead of {state['config'][key]}"
                   for key in now.keys() - FREE - {"levels", "dense"} - set(infer.ECPL_KEYS)
                   if state["config"].get(key) != now[key]]
        if changed:
            raise ValueError(f"--resume found {', '.join(sorted(changed))}: a run is resumed with its "
                             "own settings")
        model = infer.SAPL.load(found, device="cpu", merge=False)
    else:
        model = make_model(config)
    model.to(device).train()
    widths = [model.clip.visual.proj.shape[0]] * len(model.ecpl.levels)
    hecl = HECL(widths, dim=config.hecl_dim, queue=config.hecl_queue, tau=config.hecl_tau,
                share=config.hecl_share, top=config.hecl_top, clean=config.hecl_clean).to(device)
    if config.recompute:
        recompute_blocks(model.clip.visual.transformer)
    run = Run(config, model, hecl, device)
    if state:
        run.restore(state)
        print(f"resumed from {found}: epoch {run.epoch + 1}, step {run.step}")
    return run


# -------------------------------------------------------------------------------------------- log

def log(run, row):
    """Print an epoch in one line, and write log.csv and curves.png anew from the whole history."""
    out = Path(run.config.out)
    print("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                    for key, value in row.items()), flush=True)
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, run.history[0].keys())
    table.writeheader()
    table.writerows(run.history)
    out.joinpath("log.csv").write_text(text.getvalue())
    curves(run.history).save(out / "curves.png")
    if row["map_high"] < 0.5 or row["map_low"] > 0.5:
        print(f"warning: the maps are all {0 if row['map_high'] < 0.5 else 1} on the validation pictures "
              f"({row['map_low']:.2f} to {row['map_high']:.2f}): train longer, or raise --lr",
              file=sys.stderr)


def curves(history, width=640, height=200):
    """Panels over the epochs: losses, image AUC, mean of the maps -> PIL image."""
    panels = [("bce", "hecl", "val_loss"), ("val_auc",), ("map_genuine", "map_manipulated")]
    image = Image.new("RGB", (width, height * len(panels)), "white")
    draw, colors = ImageDraw.Draw(image), ("#1f6fb4", "#d62728", "#2c9b3c")
    for top, keys in zip(range(0, image.height, height), panels):
        values = [row[key] for row in history for key in keys]
        low, high = min(values), max(max(values), min(values) + 1e-6)
        x = [50 + (width - 70) * i / max(1, len(history) - 1) for i in range(len(history))]
        draw.rectangle((50, top + 24, width - 20, top + height - 10), outline="#cccccc")
        draw.text((4, top + 24), f"{high:.3f}", "black")
        draw.text((4, top + height - 22), f"{low:.3f}", "black")
        for i, (key, color) in enumerate(zip(keys, colors)):
            y = [top + 24 + (height - 34) * (high - row[key]) / (high - low) for row in history]
            draw.text((60 + 130 * i, top + 6), key, color)
            draw.line(list(zip(x, y)), color, width=2)
            draw.ellipse((x[-1] - 2, y[-1] - 2, x[-1] + 2, y[-1] + 2), color)
    return image


def memory(device):
    """Highest memory use so far, GB: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


# ------------------------------------------------------------------------------------------- loop

def ranks():
    """(number of this process, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def train_step(run, objective, parts, done):
    """One optimizer step over the parts of a batch, at a share `done` of the training.

    Returns whether any process was told to stop. Raises ValueError for a non-finite loss or gradient.
    """
    config, world = run.config, ranks()[1]
    total, indices = torch.zeros(5, device=run.device), []
    for part in range(config.accumulate):
        image, labels, numbers, bad = next(parts)
        indices += numbers
        report_bad(run, bad)
        share = world > 1 and part + 1 == config.accumulate       # gradients are exchanged once a step
        with contextlib.nullcontext() if share or world == 1 else objective.no_sync():
            with run.autocast():
                losses = objective(image.to(run.device), labels.to(run.device),
                                   min(1.0, done / max(config.hecl_warmup, 1e-9)))
            (losses["loss"] / config.accumulate).backward()
        total[:3] += torch.stack([losses[k].detach() for k in LOSSES]) / config.accumulate
    for group in run.optimizer.param_groups:
        group["lr"] = group["base"] * schedule(done, config.warmup)
    total[3] = nn.utils.clip_grad_norm_(run.weights, config.max_norm)
    total[4] = run.signal
    if world > 1:
        dist.all_reduce(total)
        total[:3] /= world
    *values, stop = total.tolist()
    if not all(map(math.isfinite, values)):
        raise ValueError(
            f"the loss is {values[0]:.4g}, the gradient's length {values[3]:.4g} in epoch {run.epoch + 1}, "
            f"step {run.step + 1}, pictures {indices[:16]}: lower --lr or look at them; the last good "
            f"checkpoint is {last_checkpoint(config.out)}")
    run.optimizer.step()
    run.optimizer.zero_grad()
    for key, value in run.ema.items():
        value.lerp_(run.trained[key].detach(), 1 - config.ema)
    for key, value in zip(LOSSES, values):
        run.sums[key] = run.sums.get(key, 0.0) + value
    run.step += 1
    return stop > 0


def report_bad(run, messages):
    """Name each unreadable picture once; ValueError when there are more than --bad-limit."""
    for message in messages:
        if message not in run.bad:
            run.bad.append(message)
            print(f"skipped {message}", file=sys.stderr)
    if len(run.bad) > run.config.bad_limit:
        raise ValueError(f"{len(run.bad)} unreadable pictures, --bad-limit is {run.config.bad_limit}: "
                         "look at the data with `python data.py FOLDER`, or raise the limit")


def run_epoch(run, objective, train_set, val_set):
    """What is left of an epoch, its validation and its row of the log. False when told to stop."""
    config, (rank, world), began, first = run.config, ranks(), time.time(), run.step
    plan = batches(getattr(train_set, "labels", None), config, run.epoch)          # (steps, batch)
    parts = plan.reshape(len(plan), config.accumulate, world, -1)[:, :, rank]
    train_set.set_epoch(run.epoch)
    loader = iter(DataLoader(
        Tolerant(train_set, config.bad_limit), collate_fn=collate, num_workers=config.workers,
        batch_sampler=parts[run.step:].reshape(-1, parts.shape[-1]).tolist(),
        generator=torch.Generator(), pin_memory=run.device.type == "cuda"))
    while run.step < len(plan):
        done = (run.epoch * len(plan) + run.step + 1) / (config.epochs * len(plan))
        stop = train_step(run, objective, loader, done)
        if rank == 0 and (stop or time.time() - run.saved > 60 * config.save_every):
            run.save()
        if stop:
            return False
        if rank == 0 and sys.stderr.isatty():
            print(f"\repoch {run.epoch + 1}  step {run.step}/{len(plan)}  loss "
                  f"{run.sums['loss'] / run.step:.4f} ", end="\r", file=sys.stderr)
    seconds, trained = time.time() - began, (run.step - first) * config.batch
    row = {"epoch": run.epoch + 1, **{k: v / len(plan) for k, v in run.sums.items()}}
    row |= validate(run, val_set)
    if run.signal:
        run.save()
        return False
    took = time.time() - began
    row |= {"pictures_per_s": trained / seconds, "memory_gb": memory(run.device), "seconds": took,
            "minutes_left": took * (config.epochs - run.epoch - 1) / 60}
    run.history.append(row)
    run.epoch, run.step, run.sums = run.epoch + 1, 0, {}
    if rank == 0:
        if max(run.history, key=lambda r: (r["val_auc"], -r["val_loss"])) is row:
            with run.averaged():
                write(Path(config.out) / "best.pt", run.model, epoch=run.epoch, metrics=row)
        run.save()
        log(run, row)
    return True


def train(config):
    """Train as `config` says -> path of the best checkpoint, by image labels of held-out pictures.

    Raises ValueError or OSError with one line; SystemExit 130 or 143 after SIGINT or SIGTERM,
    when all is saved.
    """
    device = infer.pick_device(config.device)
    if "RANK" in os.environ and not dist.is_initialized():
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, world = ranks()
    if config.batch % (config.accumulate * world * config.mosaic ** 2):
        raise ValueError(f"--batch {config.batch} must be a multiple of processes x --accumulate x "
                         f"--mosaic^2 = {world} x {config.accumulate} x {config.mosaic ** 2}")
    train_set, val_set, genuine = make_sets(config)
    run = start(config, device)
    labels = getattr(train_set, "labels", [0, 1])
    objective = Objective(run.model, run.hecl, config, labels.count(0) / labels.count(1)).to(device)
    if world > 1:        # unused: what of CLIP the map does not need, for instance the class token's end
        objective = nn.parallel.DistributedDataParallel(objective, broadcast_buffers=False,
                                                        find_unused_parameters=True)
    if rank == 0:
        print("  ".join(f"{k}={v}" for k, v in run.model.config.items()), flush=True)
        print(f"{len(train_set)} pictures to train, {len(val_set)} to validate, "
              f"{sum(p.numel() for p in run.weights):,} weights on {device} x {world}", flush=True)

    def on_signal(number, frame):
        if run.signal:
            raise SystemExit(128 + number)                # told twice: at once, without saving
        run.signal = number

    before = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        while run.epoch < config.epochs:
            if not run_epoch(run, objective, train_set, val_set):
                raise SystemExit(128 + (run.signal or signal.SIGTERM))
        best = Path(config.out) / "best.pt"
        if rank == 0:
            finish(best, genuine)
        return best
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def finish(best, genuine):
    """Calibrate the threshold of best.pt on the genuine held-out pictures."""
    state = infer.load_checkpoint(best)
    model = infer.SAPL.load(best, merge=False)
    model.threshold = calibrate(model, genuine)
    write(best, model, epoch=state["epoch"], metrics=state["metrics"])
    print(f"best: epoch {state['epoch']}, image AUC {state['metrics']['val_auc']:.3f}, threshold "
          f"{model.threshold:.3f}  {best}", flush=True)


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
