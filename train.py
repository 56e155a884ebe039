"""Train SAPL from pictures that carry one label each, genuine or manipulated; masks are never read.

    python train.py --data FOLDER            au/ and tp/ inside, or a list of pictures and labels
    python train.py --synthesize PHOTOS      genuine photos; the manipulations are made on the way
    python train.py .. --resume              goes on after any interruption, bit for bit
    torchrun --nproc_per_node=4 train.py ..  the same training on several GPUs

Writes into --out: last.pt (everything, to resume), best.pt (for infer.py), log.csv, curves.png.
Shapes: B pictures, N = h * w patches, D joint width.
"""
import argparse, contextlib, copy, csv, dataclasses, functools, itertools, math, os, resource
import signal, sys, time
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
    pairs: float = option(0.0, "share of a batch made of the genuine pictures: one and its change")
    size: int = option(224, "side of the training crops, pixels")
    count: int = option(8192, "pictures an epoch with --synthesize, half of them genuine")
    clip: str = option("tiny", "tiny, ViT-B/32, ViT-B/16, ViT-L/14, ViT-L/14@336px or a file")
    init: str = option("", "start from this SAPL checkpoint and its model settings")
    clip_cache: str = option("", "folder of OpenAI's files; none: ~/.cache/clip")
    tune: str = option("lora", "what of CLIP is trained", "lora", "full", "none")
    lora_rank: int = option(8, "rank of LoRA")
    lora_alpha: float = option(16.0, "LoRA adds alpha / rank times its product")
    lora_share: float = option(0.25, "share of the tower's blocks that get LoRA, the last ones")
    levels: tuple = option((), "blocks whose features are used, from 1; none: thirds of the tower")
    context: int = option(8, "learned context tokens of a prompt")
    class_words: tuple = option(("genuine", "manipulated"), "words that end the two prompts")
    edge_source: str = option("image", "where soft edges come from", "image", "features")
    prompts: str = option("enhanced", "what shapes prompts", "enhanced", "edges", "patches",
                          "plain", "none")
    dense: str = option("plain", "attention of the last block", "plain", "vv", "qqkk")
    rho: float = option(0.1, "share of the patches that make the image score")
    zoom: int = option(1, "enlarge pictures so many times for the tower: finer maps, more work")
    max_side: int = option(1024, "longest side of a picture at inference, pixels")
    window: int = option(0, "judge pictures in windows of this side, pixels; 0 = as a whole")
    hecl: float = option(0.1, "weight of the edge contrastive loss; 0 = off")
    hecl_queue: int = option(1024, "features a class and level in the queues; 0 = the batch alone")
    hecl_tau: float = option(0.1, "temperature of the contrast")
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


SIGNALS = signal.SIGINT, signal.SIGTERM
LOSSES = "loss", "bce", "hecl"
CURVES = *LOSSES[1:], "val_loss", "val_auc", "map_genuine", "map_manipulated"
# what may change on --resume
FREE = {"out", "clip_cache", "device", "workers", "save_every", "bad_limit", "resume"}


def parse(arguments=None):
    """Command line, or a list of words -> Config. Exits with status 2 on what it does not know."""
    parser = argparse.ArgumentParser(prog="train.py", allow_abbrev=False,
                                     description=__doc__.split("\n\n")[0])
    for field in dataclasses.fields(Config):
        if field.type is bool:
            words = {"action": argparse.BooleanOptionalAction}
        else:
            kind, choices = field.type, field.metadata["choices"]
            words = {"nargs": "*"} if kind is tuple else {}
            kind = {"levels": int, "class_words": str}.get(field.name, kind)
            name = None if choices else {str: "TEXT", int: "N", float: "X"}[kind]
            words |= {"type": kind, "choices": choices, "metavar": name}
        shown = f" (default {field.default})" if field.default not in ("", (), False) else ""
        parser.add_argument("--" + field.name.replace("_", "-"), default=field.default,
                            help=field.metadata["help"] + shown, **words)
    values = vars(parser.parse_args(arguments))
    return Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


# -------------------------------------------------------------------------------------- pictures

class Tolerant(Dataset):
    """Puts another picture in the place of an unreadable one -> image, label, index, messages."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, index):
        count, bad = len(self.dataset), ""
        for i in range(index, index + 2 * count, 2):          # by 2: synthetic pairs alternate
            try:
                return *self.dataset[i % count], bad
            except data.BadPicture as error:
                bad += f"{error}\n"
        raise data.BadPicture(f"found no readable picture among {count}: {bad.splitlines()[0]}")


def deaf(worker):
    """Ctrl-C and torchrun signal whole groups: loaders go on until their training process ends."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def load(dataset, plan, config):
    """The batches of a plan, lists of indices, made ahead by --workers processes."""
    return DataLoader(Tolerant(dataset), batch_sampler=plan, num_workers=config.workers,
                      worker_init_fn=deaf, generator=torch.Generator())


def make_sets(config):
    """(training set, validation set, pictures of each): paths and labels only, no way to a mask."""
    if bool(config.data) == bool(config.synthesize):
        raise ValueError("found both or none of --data and --synthesize: name one of them")
    if config.data and pairs_in_batch(config) not in range(config.batch - 1):
        raise ValueError(f"found --pairs {config.pairs}, expected a share from 0 to below 1 that "
                         f"leaves pictures with labels in a batch of {config.batch}")
    source, classes = (config.data, {0, 1}) if config.data else (config.synthesize, {0})
    pictures = data.read_set(source, masks=False)[0]
    if config.synthesize:
        pictures = [p._replace(label=p.label or 0, source=p.source or p.path.stem)
                    for p in pictures]
    parts = data.split([p for p in pictures if p.label in classes], config.val, config.seed)
    if any({p.label for p in part} != classes for part in parts):
        raise ValueError(f"found {len(parts[0])} pictures to train, {len(parts[1])} to validate in "
                         f"{source}, expected of both classes: add some, or change --val")
    common = {"size": config.size, "seed": config.seed}
    if config.data:
        sets = [data.TrainingSet([(p.path, p.label) for p in part], augment=augment, **common)
                for part, augment in zip(parts, (True, False))]
        if made := pairs_in_batch(config):
            sets[0] = data.Mixture(sets[0], len(sets[0]) // (config.batch - made) * made)
    else:
        counts = config.count, max(32, min(512, int(config.val * config.count)))
        sets = [data.SynthesisSet([p.path for p in part], count=count // 2 * 2, **common)
                for part, count in zip(parts, counts)]
    return *sets, *parts


def pairs_in_batch(config):
    """How many pictures of a batch are synthetic, an even number."""
    return config.batch if config.synthesize else 2 * round(config.batch * config.pairs / 2)


def batches(labels, pairs, config, epoch):
    """The order of an epoch, from (seed, epoch) alone: indices (steps, batch).

    labels: of all pictures; the last `pairs` are synthetic. Of the others each class is spread
    evenly, so that every batch has both. Two of a pair lie in one batch, half of its synthetic
    part apart, so never in one mosaic: attention could compare them.
    """
    rng, made, parts = np.random.default_rng((config.seed, epoch)), pairs_in_batch(config), []
    if (count := len(labels) - pairs):
        B, place = config.batch - made, np.zeros(count)
        for label in (0, 1):
            members = rng.permutation(np.flatnonzero(np.array(labels[:count]) == label))
            place[members] = (np.arange(len(members)) + rng.random()) / len(members)
        order = place.argsort()[:count // B * B].reshape(-1, B)
        parts.append(rng.permuted(order, axis=1))                              # (steps, B)
    if pairs:
        order = rng.permuted(np.arange(count, len(labels)).reshape(-1, 2), axis=1)
        order = order[:pairs // made * made // 2].reshape(-1, made // 2, 2)
        parts.append(order.swapaxes(1, 2).reshape(-1, made))                   # (steps, made)
    return np.concatenate(parts, axis=1)


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
        x = *output.stages, output.edges, output.logits.flatten(1)
        *stages, edges, logits = (untile(x.float(), K, h, w) for x in x)     # [(B, N, D)], (B, N)
        score = infer.ecpl.pool_score(logits, self.model.ecpl.rho)               # (B,)
        bce = F.binary_cross_entropy_with_logits(score, labels.float(), pos_weight=self.balance)
        contrast = self.hecl(stages, edges, logits.sigmoid(), labels) if self.weight else 0 * bce
        return torch.stack([bce + self.weight * ramp * contrast, bce, contrast])


# ------------------------------------------------------------------------------- state of a run

KEPT = (*infer.ECPL_KEYS, "max_side", "window")        # what --init takes from its checkpoint


def make_model(config):
    """A new SAPL, or that of --init; its CLIP is tuned already, so it gets a name of its own."""
    settings = dict(vars(config))
    if config.init or config.clip == "tiny":
        old = infer.SAPL.load(config.init or None, device="cpu")   # its LoRA, if any, is merged
        settings["clip"] = old.clip.name = "tuned " + old.clip.name.removeprefix("tuned ")
        model = infer.SAPL(old.clip, settings | {k: old.config[k] for k in KEPT if k in old.config})
        model.ecpl.load_state_dict(old.ecpl.state_dict())
        return model
    backbone = clip.load(config.clip)
    depth = len(backbone.visual.transformer.resblocks)
    settings["levels"] = config.levels or sorted({max(1, depth * part // 3) for part in (1, 2, 3)})
    return infer.SAPL(backbone, settings)


def newest(out, name="last.pt"):
    """The newest whole file of a run, or None. A kill can leave only the one before the last."""
    return next(filter(Path.is_file, (Path(out, name), Path(out, name + ".previous"))), None)


def resumed(config):
    """(settings, checkpoint or None) of a run: with --resume it keeps its own settings."""
    path = newest(config.out)
    if not path:
        return config, None
    if not config.resume:
        raise ValueError(f"{config.out} holds a run: add --resume, or choose another --out")
    state, now = infer.load_checkpoint(path), vars(config)
    own = vars(Config()) | state["settings"] | {key: now[key] for key in FREE}
    changed = [f"--{key} {value}" for key, value in now.items()
               if value not in (own[key], getattr(Config, key))]
    if changed:
        raise ValueError(f"found {', '.join(changed)}, but --resume keeps the settings of {path}: "
                         "leave that out, or start anew with --init and another --out")
    return Config(**own), state


class Run:
    """All that a training is at a moment, saved as a whole: a resumed run is the same run."""

    def __init__(self, config, state=None, device="cpu", rank=0, world=1):
        self.config, self.device, self.rank, self.world = config, device, rank, world
        self.signal, self.saved = 0, time.time()
        self.kept, self.room = [], 1e9               # validation batches, see `validate`; bytes
        self.now = {"epoch": 0, "step": 0, "sums": [0.0] * 3, "history": [], "bad": []}
        torch.manual_seed(config.seed)
        model = infer.SAPL.load(newest(config.out), "cpu", merge=False) if state else None
        self.model = (model or make_model(config)).to(device).train()
        self.mean = copy.deepcopy(self.model) if config.ema else self.model      # averaged weights
        if config.recompute:
            for block in self.model.clip.visual.transformer.resblocks:
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        widths = [self.model.clip.visual.proj.shape[1]] * len(self.model.ecpl.levels)
        self.hecl = HECL(widths, queue=config.hecl_queue, tau=config.hecl_tau, dim=64, share=0.4,
                         top=4, clean=0.5).to(device).requires_grad_(config.hecl > 0)      # ours
        self.optimizer = torch.optim.AdamW(self.groups())
        if state:
            try:
                self.hecl.load_state_dict(state["hecl"])
            except RuntimeError as error:
                raise ValueError(f"{newest(config.out)} is of an older version with another HECL: "
                                 "start anew with --init BEST.PT and another --out") from error
            self.optimizer.load_state_dict(state["optimizer"])
            self.mean.load_state_dict(state["mean"], strict=False)
            self.now = state["now"]
            torch.set_rng_state(state["rng"])

    def groups(self):
        """AdamW's groups: CLIP's own weights at --lr-clip, new ones at --lr; matrices decay."""
        groups, config = {}, self.config
        for name, p in [*self.model.named_parameters(), *self.hecl.named_parameters("hecl")]:
            lr = config.lr_clip if infer.is_backbone(name) else config.lr
            group = {"lr": lr, "base": lr, "weight_decay": config.weight_decay * (p.ndim > 1)}
            if p.requires_grad:
                groups.setdefault(str(group), group | {"params": []})["params"].append(p)
        return list(groups.values())

    def save(self):
        """last.pt: what the training needs to go on, beside the weights."""
        mean = {key: p for key, p in self.mean.named_parameters() if p.requires_grad}
        self.write("last.pt", self.model, optimizer=self.optimizer.state_dict(), now=self.now,
                   mean=mean if self.config.ema else {}, hecl=self.hecl.state_dict(),
                   rng=torch.get_rng_state())
        self.saved = time.time()

    def write(self, name, model, **state):
        """Write a checkpoint; on a full disk OSError in one line, what was there stays."""
        path = Path(self.config.out, name)
        try:
            infer.save_checkpoint(path, model, settings=vars(self.config), **state)
        except (OSError, RuntimeError) as error:
            path.with_name(name + ".part").unlink(missing_ok=True)
            raise OSError(f"cannot write {path} ({str(error).splitlines()[0]}), the last good is "
                          f"{newest(path.parent)}: make room, go on with --resume") from error


# --------------------------------------------------------------------- validation, log, curves

@torch.no_grad()
def validate(run, dataset):
    """Image AUC and loss on held-out pictures by their labels, and what the maps look like.

    These pictures are the same every time: batches are kept with what the frozen blocks make of
    them, up to 1 GB (ours), so that only what is trained is computed again.
    """
    size, rows = run.config.batch // run.config.accumulate // run.world, []
    plan = torch.arange(run.rank, len(dataset), run.world).split(size)[len(run.kept):]
    fresh = load(dataset, [part.tolist() for part in plan], run.config)
    fresh = ((image, labels, {}) for image, labels, *_ in fresh)
    for i, (image, labels, memo) in enumerate(itertools.chain(run.kept[:], fresh)):
        output = run.mean(image.to(run.device), memo)
        if i == len(run.kept) and run.room > 0:
            run.kept.append((image, labels, memo))
            run.room -= sum(x.nbytes for x in (image, *memo.values()))
        maps = output.probability.flatten(1)                                     # (B, N)
        columns = output.score_logit, maps.mean(dim=1), maps.amin(dim=1), maps.amax(dim=1)
        rows += torch.stack([labels, *(x.cpu() for x in columns)], dim=1).tolist()     # B rows of 5
    if run.world > 1:
        parts = [None] * run.world
        dist.all_gather_object(parts, rows)
        rows = sum(parts, [])
    labels, logits, mean, low, high = np.array(rows).T
    losses = np.logaddexp(0, np.where(labels > 0, -logits, logits))
    row = {"val_loss": losses.mean(), "val_auc": infer.rank_auc(logits, labels),
           "map_genuine": mean[labels == 0].mean(), "map_manipulated": mean[labels == 1].mean(),
           "map_low": low.min(), "map_high": high.max()}
    return {key: float(value) for key, value in row.items()}


def log(history, out):
    """Print the last epoch in one line; log.csv and curves.png are made anew from all epochs."""
    row = history[-1]
    print("  ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
    with open(Path(out, "log.csv"), "w", newline="") as file:
        csv.writer(file).writerows([row, *(each.values() for each in history)])
    curves(history).save(Path(out, "curves.png"))
    if row["map_high"] < 0.5 or row["map_low"] > 0.5:
        print(f"warning: the maps are all {int(row['map_low'] > 0.5)} on the validation pictures "
              f"({row['map_low']:.2f} to {row['map_high']:.2f}): train longer, or change --lr",
              file=sys.stderr)


def curves(history):
    """A strip for each number over the epochs, from its least to its largest value -> PIL image."""
    image = Image.new("RGB", (640, 100 * len(CURVES)), "white")
    draw = ImageDraw.Draw(image)
    for top, key in zip(range(0, image.height, 100), CURVES):
        values = np.array([row[key] for row in history])                         # (epochs,)
        low, high = values.min(), values.max()
        x, y = np.linspace(20, 620, len(values)), (high - values) / max(high - low, 1e-9)
        draw.text((20, top + 4), f"{key}   {low:.3f} to {high:.3f}", "black")
        draw.line([*zip(x, top + 24 + 68 * y)], "blue", width=2)
    return image


# ------------------------------------------------------------------------------------------ loop

def train_step(run, objective, pictures, names, done):
    """One step of the optimizer, at a share `done` of the training -> whether to stop after it."""
    config, now, used = run.config, run.now, []
    total = torch.zeros(5, device=run.device)            # three losses, gradient, told to stop
    for _ in range(config.accumulate):
        image, labels, indices, bad = next(pictures)
        used += indices.tolist()
        for message in sorted(set("".join(bad).splitlines()) - set(now["bad"])):
            now["bad"].append(message)
            print(f"skipped {message}", file=sys.stderr)
        with torch.autocast(run.device.type, torch.bfloat16, config.precision == "bf16"):
            losses = objective(image.to(run.device), labels.to(run.device),
                               min(1.0, done / max(config.hecl_warmup, 1e-9)))
        (losses[0] / config.accumulate).backward()
        total[:3] += losses.detach() / config.accumulate
    rise, fall = done / max(config.warmup, 1e-9), 0.5 + 0.5 * math.cos(math.pi * done)
    for group in run.optimizer.param_groups:
        group["lr"] = group["base"] * min(rise, fall)
    weights = [p for group in run.optimizer.param_groups for p in group["params"]]
    total[3], total[4] = nn.utils.clip_grad_norm_(weights, 1.0), run.signal      # ours: length 1
    if run.world > 1:
        dist.all_reduce(total)
    *values, stop = (total / run.world).tolist()
    if len(now["bad"]) > config.bad_limit:
        raise ValueError(f"{len(now['bad'])} unreadable pictures, --bad-limit is "
                         f"{config.bad_limit}: look with `python data.py FOLDER`, or raise it")
    if not all(map(math.isfinite, values)):
        at = f"epoch {now['epoch'] + 1}, step {now['step'] + 1}"
        raise ValueError(f"loss {values[0]:.4g}, gradient {values[3]:.4g} in {at}, pictures "
                         f"{', '.join(str(names[i]) for i in used)}: lower --lr or look at them; "
                         f"the last good checkpoint is {newest(config.out)}")
    run.optimizer.step()
    run.optimizer.zero_grad()
    for mean, p in zip(run.mean.parameters(), run.model.parameters()):
        if config.ema and p.requires_grad:
            mean.data.lerp_(p.detach(), 1 - config.ema)
    now["sums"] = [a + b for a, b in zip(now["sums"], values)]
    now["step"] += 1
    return stop > 0


def run_epoch(run, objective, train_set, val_set, names):
    """What is left of an epoch, then its validation and its row of the log."""
    config, now, began = run.config, run.now, time.time()
    plan = batches(train_set.labels, train_set.pairs, config, now["epoch"])
    steps, first = len(plan), now["step"]
    plan = plan.reshape(steps, config.accumulate, run.world, -1)[first:, :, run.rank]   # (.., B)
    train_set.set_epoch(now["epoch"])
    pictures = iter(load(train_set, plan.reshape(-1, plan.shape[-1]).tolist(), config))
    while now["step"] < steps:
        done = (now["epoch"] * steps + now["step"] + 1) / (config.epochs * steps)
        stop = train_step(run, objective, pictures, names, done)
        if run.rank == 0 and (stop or time.time() - run.saved > 60 * config.save_every):
            run.save()
        if stop:
            raise SystemExit(128 + (run.signal or signal.SIGTERM))
        if run.rank == 0 and sys.stderr.isatty():
            print(f"epoch {now['epoch'] + 1} step {now['step']}/{steps} loss "
                  f"{now['sums'][0] / now['step']:.4f}", end="\r", file=sys.stderr)
    row = {"epoch": now["epoch"] + 1} | {k: v / steps for k, v in zip(LOSSES, now["sums"])}
    speed = (steps - first) * config.batch / (time.time() - began)
    memory = torch.cuda.max_memory_allocated() / 1e9 if run.device.type == "cuda" \
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6            # on Linux in KB
    row |= validate(run, val_set) | {"pictures_per_s": speed, "memory_gb": memory}
    row["minutes_left"] = (time.time() - began) * (config.epochs - row["epoch"]) / 60
    now["history"].append(row)
    now |= {"epoch": row["epoch"], "step": 0, "sums": [0.0] * 3}
    if run.rank == 0:
        if max(now["history"], key=lambda r: (r["val_auc"], -r["val_loss"])) is row:
            run.write("best.pt", run.mean, epoch=row["epoch"], metrics=row)
        run.save()
        log(now["history"], config.out)


def set_thresholds(model, genuine):
    """Set both thresholds of a SAPL (ours): at most 10 % of the pixels of these genuine pictures
    lie above `threshold`, at most 10 % of the pictures score above `score_threshold`."""
    pixels, scores = [], []
    for picture in genuine:
        with contextlib.suppress(data.BadPicture):
            found = model.localize(picture)
            scores.append(found.score)
            pixels.append(np.quantile(found.map, np.arange(1, 201) / 200, method="higher"))
    if scores:
        model.threshold = float(np.quantile(pixels, 0.9, method="higher"))
        model.score_threshold = float(np.quantile(scores, 0.9, method="higher"))


def calibrate(run, genuine):
    """Write best.pt again with thresholds from held-out genuine pictures."""
    path = newest(run.config.out, "best.pt")
    model, state = infer.SAPL.load(path, run.device, merge=False), infer.load_checkpoint(path)
    set_thresholds(model, genuine)
    run.write("best.pt", model, epoch=state["epoch"], metrics=state["metrics"])
    print(f"best.pt: epoch {state['epoch']}, val_auc {state['metrics']['val_auc']:.3f}, threshold "
          f"{model.threshold:.3f}, score threshold {model.score_threshold:.3f}", flush=True)


def connect(name):
    """(device, number of this process, how many there are): torchrun's, or one on its own."""
    device = infer.pick_device(name)
    if "RANK" not in os.environ:
        return device, 0, 1
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device, dist.get_rank(), dist.get_world_size()


def train(config):
    """Train as `config` says -> path of the best checkpoint, by image labels of held-out pictures.

    Raises ValueError or OSError with one line; after SIGINT or SIGTERM SystemExit 130 or 143.
    """
    clip.CACHE = config.clip_cache or clip.CACHE
    (config, state), (device, rank, world) = resumed(config), connect(config.device)
    train_set, val_set, pictures, held_out = make_sets(config)
    unit = math.lcm(2, config.accumulate * world * config.mosaic ** 2)
    if config.batch % unit or not len(batches(train_set.labels, train_set.pairs, config, 0)):
        raise ValueError(f"found --batch {config.batch}, expected a multiple of {unit} (of 2, "
                         "--accumulate x processes x --mosaic^2), at most the number of training "
                         f"pictures, {len(train_set)}: change --batch")
    if 0 < pairs_in_batch(config) < 2 * config.mosaic ** 2:
        raise ValueError(f"found {pairs_in_batch(config)} synthetic pictures a batch, expected at "
                         f"least {2 * config.mosaic ** 2}, so that no pair shares a mosaic: "
                         "raise --batch")
    labels = train_set.labels
    names = [p.path for p in pictures if config.data]
    names += [f"synthetic {i}" for i in range(len(names), len(labels))]
    run = Run(config, state, device, rank, world)
    objective = Objective(run.model, run.hecl, config, labels.count(0) / labels.count(1)).to(device)
    if world > 1:              # unused: what --dense leaves out of the last block
        objective = nn.parallel.DistributedDataParallel(
            objective, find_unused_parameters=config.tune == "full")
    if rank == 0:
        print("  ".join(f"{k}={v}" for k, v in run.model.config.items()))
        print(f"{len(labels)} pictures to train, {train_set.pairs} of them synthetic, "
              f"{len(val_set)} to validate, on {device} x {world}; epoch {run.now['epoch'] + 1}, "
              f"step {run.now['step'] + 1}", flush=True)

    def on_signal(number, frame):
        if run.signal:
            raise SystemExit(128 + number)              # told twice: at once, without saving
        run.signal = number

    before = {number: signal.signal(number, on_signal) for number in SIGNALS}
    try:
        while run.now["epoch"] < config.epochs:
            run_epoch(run, objective, train_set, val_set, names)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if rank == 0:
        calibrate(run, [p.path for p in held_out if not p.label])
    return Path(config.out, "best.pt")


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
