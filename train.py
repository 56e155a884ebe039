"""Train SAPL from pictures that carry one label each, genuine or manipulated; masks are never read.

    python train.py --data FOLDER            au/ and tp/ inside, or a list of pictures and labels
    python train.py --synthesize PHOTOS      genuine photos; the manipulations are made on the way
    python train.py .. --resume              goes on after the last whole epoch, as if never stopped
    torchrun --nproc_per_node=4 train.py ..  the same training on several GPUs

Writes into --out after each epoch: last.pt (to resume), best.pt (for infer.py), log.csv.
Reading order: settings, pictures, model, loss, validation and log, state of a run, loop (`train`).
"""
import argparse
import csv
import dataclasses
import math
import os
import sys
import time
import warnings
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
from hecl import HECL
from weights import synthesis


# -------------------------------------------------------------------------------------- settings

def option(default, text, choices=None, least=None, most=None):
    """A setting: its default, its help text and the values that it may have."""
    metadata = {"help": text, "choices": choices, "least": least, "most": most}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class Config:
    """All settings of a run, and the command line. Every value is ours."""
    data: str = option("", "pictures with labels: folder with au/ and tp/, or list file")
    synthesize: str = option("", "instead of --data: folder of genuine photos")
    out: str = option("runs/sapl", "folder of the run")
    resume: bool = option(False, "go on with the run in --out")
    # pictures
    size: int = option(128, "side of the training crops, pixels", least=16)
    count: int = option(3200, "pictures an epoch with --synthesize, half of them genuine", least=2)
    val: float = option(0.15, "share held out to choose and calibrate", least=0.01, most=0.9)
    # model
    clip: str = option("tiny", "start: tiny (the shipped SAPL), ViT-B/32, ViT-B/16, ViT-L/14, "
                               "ViT-L/14@336px, a file of CLIP weights, or a checkpoint of SAPL")
    context: int = option(8, "learned context tokens of a prompt", least=1)
    rho: float = option(0.05, "share of the patches that make the image score", least=0, most=1)
    zoom: int = option(1, "enlarge pictures so many times for the tower: finer maps, more work")
    max_side: int = option(512, "longest side of a picture at inference, pixels", least=16)
    window: int = option(256, "side of the windows to judge in, pixels; 0 = as a whole", least=0)
    lora_rank: int = option(0, "rank of LoRA; 0: CLIP stays as it is", least=0)
    lora_share: float = option(0.25, "share of the blocks with LoRA, the last", least=0, most=1)
    # loss
    hecl: float = option(0.1, "weight of the edge contrastive loss; 0 = off", least=0)
    hecl_queue: int = option(1024, "features in each of its queues; 0 = the batch alone", least=0)
    hecl_tau: float = option(0.1, "its temperature", least=0.001)
    hecl_share: float = option(0.4, "share of the patches that are edge patches", least=0, most=1)
    hecl_top: int = option(4, "edge patches of a kind taken of a picture", least=1)
    # training
    epochs: int = option(5, "passes over the training pictures", least=1)
    batch: int = option(32, "pictures a step, of all processes together", least=2)
    lr: float = option(5e-4, "learning rate", least=0)
    seed: int = option(0, "of everything random", least=0)
    device: str = option("auto", "auto, cpu, cuda, mps")
    precision: str = option("auto", "auto: bf16 if the hardware has it", ("auto", "bf16", "fp32"))
    workers: int = option(2, "processes that load pictures, for each training process", least=0)


MODEL = ("levels", "context", "rho", "zoom", "max_side", "window")   # a SAPL checkpoint has its own
FREE = ("out", "resume", "epochs", "device", "workers")  # may change on --resume
WARMUP = 0.05            # ours: share of the training in which learning rate and HECL rise from 0


def flag(name):
    return "--" + name.replace("_", "-")


def parse(arguments=None):
    """Words of the command line -> {setting: value} of those given; exits with 2 on others."""
    parser = argparse.ArgumentParser(prog="train.py", allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS,
                                     description=__doc__.split("\n\n")[0])
    for field in dataclasses.fields(Config):
        name = flag(field.name)
        text = field.metadata["help"]
        if field.type is not bool and field.default != "":
            text += f" (default {field.default})"

        if field.type is bool:
            parser.add_argument(name, action="store_true", help=text)
        else:
            parser.add_argument(name, type=field.type, choices=field.metadata["choices"], help=text)
    return vars(parser.parse_args(arguments))


def check(config, given):
    """Raise ValueError for a setting that makes no sense, or that would be ignored."""
    for field in dataclasses.fields(Config):
        value = getattr(config, field.name)
        least = field.metadata["least"]
        most = field.metadata["most"]
        if least is not None and not value >= least:
            raise ValueError(f"found {flag(field.name)} {value}, expected at least {least}")
        if most is not None and not value <= most:
            raise ValueError(f"found {flag(field.name)} {value}, expected at most {most}")
    if bool(config.data) == bool(config.synthesize):
        raise ValueError("found both or none of --data and --synthesize, expected one: name it")

    ignored = {}
    if config.data:
        ignored["count"] = "--data"
    if config.lora_rank == 0:
        ignored["lora_share"] = "--lora-rank 0"
    if config.hecl == 0:
        ignored |= dict.fromkeys(("hecl_queue", "hecl_tau", "hecl_share", "hecl_top"), "--hecl 0")
    for name in given:
        if name in ignored:
            raise ValueError(f"found {flag(name)}, which {ignored[name]} ignores: leave it out")


# -------------------------------------------------------------------------------------- pictures

def read_pictures(config):
    """Pictures of the training and of the validation part, no scene in both: two lists."""
    source = config.data or config.synthesize
    pictures, report = data.read_set(source, masks=False, decode=True)
    if config.synthesize:            # a folder of photos, or the genuine ones of a labelled set
        pictures = [p._replace(label=0) for p in pictures if p.label != 1]
    else:
        pictures = [p for p in pictures if p.label is not None]

    for problem in report.problems:
        if config.data or problem.startswith("bad file"):
            print(f"note: {problem}", file=sys.stderr)
    train, val = data.split(pictures, config.val, config.seed)

    for part, name in ((train, "train"), (val, "validate")):
        for label, word in enumerate(ecpl.CLASSES):
            count = len([p for p in part if p.label == label])
            if count == 0 and (label == 0 or config.data):
                raise ValueError(f"found no {word} picture to {name} in {source} ({len(part)} "
                                 "in that part), expected some: add pictures, or change --val")
    return train, val


def make_sets(config, train, val):
    """Training and validation set of these pictures: paths and labels only, no way to a mask."""
    common = {"size": config.size, "seed": config.seed}
    if config.data:
        train = [(p.path, p.label) for p in train]
        val = [(p.path, p.label) for p in val]
        return data.TrainingSet(train, **common), data.TrainingSet(val, augment=False, **common)

    train = [p.path for p in train]
    val = [p.path for p in val]
    count = config.count // 2 * 2
    few = max(32, min(512, int(config.val * count) // 2 * 2))
    return (synthesis.PairSet(train, count=count, **common),
            synthesis.PairSet(val, count=few, **common))


def batches(labels, config, epoch):
    """The order of an epoch, from (seed, epoch) alone: indices (steps, batch). The two of a
    synthetic pair lie in one batch."""
    rng = np.random.default_rng((config.seed, epoch))
    order = rng.permutation(len(labels))
    if config.synthesize:
        pairs = order[order % 2 == 0]
        order = np.stack([pairs, pairs + 1], axis=1).flatten()                   # pair after pair

    steps = len(order) // config.batch
    if steps == 0:
        raise ValueError(f"found {len(order)} pictures to train, expected at least --batch "
                         f"{config.batch}: add some, or lower --batch")
    return order[:steps * config.batch].reshape(steps, config.batch)


# ----------------------------------------------------------------------------------------- model

def is_sapl(name):
    """Whether --clip names a checkpoint of SAPL, not a CLIP."""
    try:
        with warnings.catch_warnings(action="ignore"):   # torch's word on OpenAI's archives
            return name == "tiny" or "format" in torch.load(name, "cpu", weights_only=True)
    except Exception:            # the name of a CLIP, an archive of OpenAI, or no file at all
        return False


def make_model(config, given):
    """A new SAPL around a CLIP, or one that goes on from a checkpoint of SAPL."""
    torch.manual_seed(config.seed)
    settings = dataclasses.asdict(config)

    if not is_sapl(config.clip):
        tower = clip.load(config.clip)
        depth = len(tower.visual.transformer.resblocks)
        thirds = {max(1, depth // 3), max(1, 2 * depth // 3), depth}
        settings["levels"] = sorted(thirds)              # ours
        return ecpl.SAPL(tower, settings)

    old = ecpl.SAPL.load(None if config.clip == "tiny" else config.clip, device="cpu")
    for name in MODEL:
        if name in given:
            raise ValueError(f"found {flag(name)}, but --clip {config.clip} keeps its own "
                             f"({old.config[name]}): leave it out, or start from a CLIP")
        settings[name] = old.config[name]

    if old.config["lora_rank"] > 0:
        clip.merge_lora(old.clip)
        old.clip.name = f"tuned {old.clip.name.removeprefix('tuned ')}"
    settings["clip"] = old.clip.name
    own = {key: x for key, x in old.state_dict().items() if not ecpl.is_backbone(key)}
    model = ecpl.SAPL(old.clip, settings)
    model.load_state_dict(own, strict=False)         # CLIP is in it already, LoRA starts anew
    model.map_shift.zero_()                          # calibrated anew in the end
    model.score_shift.zero_()
    return model


# ------------------------------------------------------------------------------------------ loss

class Objective(nn.Module):
    """The model with its losses: entropy + weight * HECL. Entropy: the image label's, and that of
    the picture's less suspicious half against "genuine" [ours]."""

    def __init__(self, model, hecl, weight, balance):
        super().__init__()
        self.model = model
        self.hecl = hecl
        self.weight = weight
        self.register_buffer("balance", torch.tensor(balance))    # both classes weigh the same

    def forward(self, image, labels, ramp):
        """image (B, 3, H, W) in [0, 1], labels (B,), ramp of HECL -> (3,): sum, entropy, HECL."""
        output = self.model(image)

        entropy = F.binary_cross_entropy_with_logits(output.score.float(), labels.float(),
                                                     pos_weight=self.balance)
        # taken for granted: at least half of any picture is genuine. Without it all patches of a
        # manipulated one may rise, as each can see the others (see weights/README.md)
        logits = output.logits.flatten(1).float()                                # (B, N)
        half = -ecpl.pool_score(-logits, 0.5)                                    # (B,)
        entropy = entropy + F.softplus(half).mean()
        contrast = torch.zeros_like(entropy)
        if self.weight > 0:
            contrast = self.hecl(output.depths, output.edges, logits, labels)

        return torch.stack([entropy + ramp * self.weight * contrast, entropy, contrast])


# ------------------------------------------------------------------------------ validation, log

def auc(values, labels):
    """Chance that a value of label 1 lies above one of label 0, ties half: arrays (n,)."""
    differences = values[labels == 1][:, None] - values[labels == 0]
    return float(0.5 + np.sign(differences).mean() / 2)


@torch.no_grad()
def validate(run, dataset):
    """Loss and image AUC on held-out pictures, by their labels."""
    loader = DataLoader(dataset, run.config.batch, num_workers=run.config.workers)
    found = []
    run.model.eval()
    for image, label, _ in loader:
        with run.model.autocast():
            output = run.model(image.to(run.device))
        found.append(torch.stack([label.float(), output.score.float().cpu()]))   # (2, B)
    run.model.train()

    labels, scores = torch.cat(found, dim=1)                                     # each (n,)
    loss = F.binary_cross_entropy_with_logits(scores, labels)
    return {"val_loss": loss.item(), "val_auc": auc(scores.numpy(), labels.numpy())}


def log(history, out):
    """Print the last epoch in one line; log.csv is made anew from all epochs."""
    row = history[-1]
    print("  ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
    with open(Path(out, "log.csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerows(history)


def best_of(history):
    """The row of the best epoch: by image labels of held-out pictures alone."""
    return max(history, key=lambda row: (row["val_auc"], -row["val_loss"]))


def worn(path, rng):
    """A picture as it may reach people, resized and degraded as in training -> PIL RGB."""
    picture = data.open_image(path)
    scale = rng.uniform(0.5, 1.25)
    size = (round(scale * picture.width), round(scale * picture.height))
    return data.degrade(picture, size, rng)


def calibrate(model, genuine):
    """Shift map and score of an infer.SAPL: of these genuine pictures (paths) at most 7 % of the
    pixels, and at most 10 % of the pictures, lie above 0.5 then, when `worn` [ours]."""
    rng = np.random.default_rng(0)
    pixels = []
    scores = []
    for path in genuine:
        try:
            map, score = model.logits_of(worn(path, rng))
        except ValueError:
            continue                             # too small to judge
        scores.append(score.item())
        # 200 of its pixels, spread evenly over its values: all pictures weigh the same
        pixels.append(np.quantile(map.numpy(), np.arange(1, 201) / 200, method="higher"))

    if len(scores) < 20:
        print(f"note: only {len(scores)} genuine pictures to calibrate on, so 0.5 is a rough guess",
              file=sys.stderr)
    if scores:
        model.map_shift.fill_(float(np.quantile(pixels, 0.93, method="higher")))
        model.score_shift.fill_(float(np.quantile(scores, 0.9, method="higher")))


# ------------------------------------------------------------------------------------ a run's state

def settings_of(given):
    """{setting: value} from the command line -> (Config, checkpoint to go on from or None)."""
    config = Config(**given)
    out = Path(config.out)
    last = out / "last.pt"
    for path in (out, *out.parents):
        if path.is_file():
            raise ValueError(f"found a file, {path}, expected a folder: choose another --out")
    if not config.resume:
        if last.exists():
            raise ValueError(f"found a run in {out}, expected an empty folder: add --resume, or "
                             "choose another --out")
        check(config, given)
        return config, None

    if not (last.exists() and (out / "best.pt").exists()):
        raise ValueError(f"found no last.pt and best.pt in {out}, expected those of a run for "
                         "--resume: leave that out to start, or name its --out")
    state = ecpl.load_checkpoint(last)
    own = state.get("settings", {})
    if set(own) != set(vars(config)):
        raise ValueError(f"found {last}, which holds no training of this version, expected one: "
                         "start anew")
    for name, value in given.items():
        if name not in FREE and value != own[name]:
            raise ValueError(f"found {flag(name)} {value}, but the run in {out} has {own[name]}: "
                             "leave it out, or start anew")

    config = Config(**own | given)
    check(config, ())
    done = len(state["history"])
    if config.epochs < done:
        raise ValueError(f"found --epochs {config.epochs}, but the run in {out} has done {done}, "
                         f"expected more: --epochs {2 * done}")
    return config, state


def connect(name):
    """(device, number of this process, how many there are): torchrun's, or one on its own."""
    device = ecpl.pick_device(name)
    if "RANK" not in os.environ:
        return device, 0, 1
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device, dist.get_rank(), dist.get_world_size()


class Run:
    """What a training consists of and saves as a whole: a resumed run is the same run."""

    def __init__(self, config, state, given):
        self.config = config
        self.device, self.rank, self.world = connect(config.device)
        if state:
            self.model = ecpl.SAPL.load(Path(config.out, "last.pt"), "cpu")
        else:
            self.model = make_model(config, given)
        self.model = self.model.to(self.device).train()
        self.model.dtype = ecpl.pick_dtype(config.precision, self.device)

        D = self.model.clip.visual.proj.shape[1]
        self.hecl = HECL(levels=len(self.model.config["levels"]), width=D, dim=64,       # ours: 64
                         queue=config.hecl_queue, tau=config.hecl_tau, share=config.hecl_share,
                         top=config.hecl_top).to(self.device).requires_grad_(config.hecl > 0)
        weights = [*self.model.parameters(), *self.hecl.parameters()]
        self.weights = [p for p in weights if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, weight_decay=0.02, fused=True)  # ours
        self.history = []                                        # one row an epoch
        if state:
            self.hecl.load_state_dict(state["hecl"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.history = state["history"]

    def end_epoch(self, row):
        """Keep its row, its weights if they are the best so far, the state and the log."""
        self.history.append(row)
        if self.rank > 0:
            return
        out = self.config.out
        if best_of(self.history) is row:
            ecpl.save_checkpoint(Path(out, "best.pt"), self.model)
        ecpl.save_checkpoint(Path(out, "last.pt"), self.model, history=self.history,
                             settings=dataclasses.asdict(self.config),
                             hecl=self.hecl.state_dict(), optimizer=self.optimizer.state_dict())
        log(self.history, out)


def check_sizes(config, model, processes=1):
    """Raise ValueError for sizes that do not fit the model, or the processes."""
    unit = math.lcm(2, processes)
    if config.batch % unit:
        raise ValueError(f"found --batch {config.batch}, expected a multiple of {unit}, of 2 and "
                         "of the number of processes")
    p = model.cell
    if config.size % p:
        raise ValueError(f"found --size {config.size}, expected a multiple of the patch, {p} "
                         f"pixels: try --size {max(p, config.size // p * p)}")
    if 0 < config.window < p:
        raise ValueError(f"found --window {config.window}, expected 0 or at least the patch, {p}")


# ------------------------------------------------------------------------------------------ loop

def learning_rate(done):
    """What of the full learning rate holds at a share `done` of the training."""
    if done < WARMUP:
        return done / WARMUP
    return 0.5 + 0.5 * math.cos(math.pi * done)


def train_epoch(run, objective, train_set, epoch):
    """One pass over the pictures -> its mean losses: sum, entropy, HECL."""
    config = run.config
    train_set.epoch = epoch
    plan = batches(train_set.labels, config, epoch)                              # (steps, batch)
    steps = len(plan)
    parts = plan.reshape(steps, run.world, -1)           # of each batch, one for each process
    own = parts[:, run.rank].tolist()
    loader = DataLoader(train_set, batch_sampler=own, num_workers=config.workers)
    total = torch.zeros(3, device=run.device)

    for step, (image, labels, _) in enumerate(loader):
        done = (epoch * steps + step + 1) / (config.epochs * steps)
        for group in run.optimizer.param_groups:
            group["lr"] = config.lr * learning_rate(done)

        # losses and gradients
        with run.model.autocast():
            losses = objective(image.to(run.device), labels.to(run.device), min(1, done / WARMUP))
        losses[0].backward()
        nn.utils.clip_grad_norm_(run.weights, 1.0)                               # ours: length 1

        # update
        run.optimizer.step()
        run.optimizer.zero_grad()
        total += losses.detach()

    if run.world > 1:
        dist.all_reduce(total)
    return (total / steps / run.world).tolist()


def train(config, state=None, given=()):
    """Train as `config` says -> path of the best checkpoint, by image labels of held-out pictures.

    state: the last.pt to go on from; given: the settings named by the user. Raises ValueError or
    OSError with one line.
    """
    run = Run(config, state, given)
    check_sizes(config, run.model, run.world)
    pictures, held_out = read_pictures(config)
    train_set, val_set = make_sets(config, pictures, held_out)
    if run.rank == 0:
        trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
        print(f"{len(train_set)} pictures to train, {len(val_set)} to validate; {trained:,} "
              f"weights to train, {run.model.dtype} on {run.device} x {run.world}; from epoch "
              f"{len(run.history) + 1}", flush=True)

    balance = train_set.labels.count(0) / train_set.labels.count(1)
    objective = Objective(run.model, run.hecl, config.hecl, balance).to(run.device)
    if run.world > 1:
        objective = nn.parallel.DistributedDataParallel(objective)

    for epoch in range(len(run.history), config.epochs):
        began = time.time()
        loss, entropy, contrast = train_epoch(run, objective, train_set, epoch)
        trained = len(train_set) // config.batch * config.batch      # the last few are left out
        speed = trained / (time.time() - began)
        row = {"epoch": epoch + 1, "loss": loss, "entropy": entropy, "hecl": contrast}
        row |= validate(run, val_set)
        if not math.isfinite(loss + row["val_loss"]):
            raise ValueError(f"found loss {loss}, {row['val_loss']} in validation, in epoch "
                             f"{epoch + 1}, expected numbers: lower --lr, start anew")
        row["pictures_per_s"] = speed
        row["minutes_left"] = (config.epochs - epoch - 1) * (time.time() - began) / 60
        run.end_epoch(row)

    if run.rank == 0:
        finish(run, [picture.path for picture in held_out if picture.label == 0])
    return Path(config.out, "best.pt")


def finish(run, genuine):
    """Calibrate best.pt on held-out genuine pictures and say what comes next."""
    config = run.config
    best = Path(config.out, "best.pt")
    model = infer.SAPL.load(best, run.device, config.precision)
    calibrate(model, genuine)
    ecpl.save_checkpoint(best, model)
    row = best_of(run.history)
    print(f"finished: the best is epoch {row['epoch']}, val_auc {row['val_auc']:.3f}; next: `"
          f"python infer.py PICTURES --checkpoint {best}`", flush=True)


def main(arguments=None):
    """The command line; returns the exit status: 0 done, 2 wrong call, 130 interrupted."""
    given = parse(arguments)
    try:
        config, state = settings_of(given)
        train(config, state, given)
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: whole epochs are kept; if there is one, --resume goes on after it",
              file=sys.stderr)
        return 130
    except torch.OutOfMemoryError:
        print("error: found too little memory on the GPU, expected more: lower --batch, --size or "
              "--zoom", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
