"""The shipped model's CLIP, pretrained to read editing histories. Run by hand; resumable.

    python weights/make.py --photos DIR [DIR ..] --out runs/tower [--teacher FILE] --minutes 8
    python train.py --synthesize DIR --clip runs/tower/tower.pt     then SAPL, by image labels

Pictures are pasted together from genuine photos; each part has an editing history of its own, told
in words ("manipulated, splice, quality 60, blurred"), so one picture gives hundreds of examples,
its patches. No label and no mask of a person is used: the generator (pictures.py) knows what it
did. All of it is ours; its neighbours: CLIM (regions of mosaics against their texts), Editprint
(editing chains and their descriptions), Noiseprint++ and "Fighting Fake News" (one source or
another).

1. Distillation (only with --teacher, a CLIP of image width 192 with 16-pixel patches): new weights
   learn to predict the teacher's tokens after each block. The teacher sees each crop at double
   size, so that our 8-pixel patches stand for its 16-pixel ones.
2. Regions: patches are compared with the captions of their part; a map tells "manipulated" from
   "genuine"; patches of one source attract, all others repel. In half of the batches (--told)
   nobody says which part is pasted: histories alone in the captions, no map. Captions give it away
   a little: only pasted parts are "smooth", and only there words come after a "quality".

Every eighth photo of a folder is held out; half of these measure the progress (log.csv).
For a GPU; on a processor give --pairs 12 and hours.
"""
import argparse
import copy
import csv
import itertools
import math
import sys
import time
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np                                              # noqa: E402 (path first)
import torch                                                    # noqa: E402
import torch.nn as nn                                           # noqa: E402
import torch.nn.functional as F                                 # noqa: E402

import clip                                                     # noqa: E402
import data                                                     # noqa: E402
import pictures                                                 # noqa: E402
import synthesis                                                # noqa: E402
from ecpl import CLASSES, pick_device, pick_dtype, pool_score   # noqa: E402
from pictures import send                                       # noqa: E402
from train import auc                                           # noqa: E402

SIZES = dict(embed_dim=128, image_resolution=128, vision_layers=6, vision_width=192,
             vision_patch_size=8, context_length=77, vocab_size=514, transformer_width=128,
             transformer_layers=3, stem=(32, 96))
SIDES = (96, 160, 256)                   # of the pictures, pixels, in turn
AT_ONCE = 8                              # batches that are made together
CLASS_CAPTIONS = [(name,) for name in CLASSES]


# ---------------------------------------------------------------------------------------- losses

class Distillation(nn.Module):
    """Relative errors of the embedding and of each block of a student against its teacher."""

    def __init__(self, student, teacher):
        super().__init__()
        self.student = student
        self.teacher = teacher
        self.names = [f"block{i}" for i in range(1 + len(student.transformer.resblocks))]
        self.weights = [1.0] * len(self.names)

    def forward(self, pixels, alone):
        """pixels (B, 3, S, S) -> (1 + blocks,). A block starts from the teacher's tokens or, with
        chance `alone`, (), from the student's own, so that it learns to mend their errors."""
        blocks = self.student.transformer.resblocks
        with torch.no_grad():
            twice = F.interpolate(pixels, scale_factor=2, mode="bilinear")
            tokens = [self.teacher.embed(twice)]                                 # [(B, 1 + N, Dv)]
            for block in self.teacher.transformer.resblocks[:len(blocks)]:
                tokens.append(block(tokens[-1]))
        own = self.student.embed(pixels)                                         # (B, 1 + N, Dv)
        losses = [(own - tokens[0]).float().square().mean() / tokens[0].float().var()]
        use_own = torch.rand(len(pixels), 1, 1, device=own.device) < alone       # (B, 1, 1)
        for block, before, after in zip(blocks, tokens, tokens[1:]):
            own = block(torch.where(use_own, own, before))                       # (B, 1 + N, Dv)
            change = (after - before).float().var()
            losses.append((own - after).float().square().mean() / change)
        return torch.stack(losses)


@lru_cache(maxsize=None)
def token_ids(words):
    """The token ids of a few words, without start and end."""
    tokens = clip.tokenize(words, SIZES["context_length"], SIZES["vocab_size"])[0]
    return tokens[1:int(tokens.argmax())].tolist()


def tokens_of(captions):
    """Captions, T tuples of words -> token ids (T, L), numpy; what is too long is cut off."""
    start, end = SIZES["vocab_size"] - 2, SIZES["vocab_size"] - 1
    length = SIZES["context_length"]
    tokens = np.zeros((len(captions), length), dtype=np.int64)
    for row, caption in zip(tokens, captions):
        ids = []
        for words in caption:
            ids += [*token_ids(words), *token_ids(",")]
        ids = [start, *ids[:-1][:length - 2], end]
        row[:len(ids)] = ids
    return tokens


def class_logits(features, texts):
    """The map, logits (B, N): texts (2, D), the features of "genuine" and "manipulated"."""
    return 10 * features @ (texts[1] - texts[0])


def same_source(z, source, pick):
    """Patches of one source attract, all others of the batch repel: InfoNCE -> scalar.

    z (B, N, d), source (B, N), pick (B, K): the patches of each picture that take part.
    """
    z = z.gather(1, pick[..., None].expand(-1, -1, z.shape[-1]))
    z = F.normalize(z, dim=-1).flatten(0, 1)                                     # (A, d)
    source = source.gather(1, pick).flatten()                                    # (A,)

    alone = torch.eye(len(z), dtype=torch.bool, device=z.device)                 # (A, A)
    same = (source[:, None] == source) & ~alone
    similarity = (z @ z.T / 0.1).masked_fill(alone, -1e4)                        # (A, A)
    positive = similarity.masked_fill(~same, -1e4).logsumexp(dim=1)              # (A,)
    loss = similarity.logsumexp(dim=1) - positive
    found = same.any(dim=1)
    return (found * loss).sum() / found.sum()


class Targets(NamedTuple):
    """What a step learns from, all of fixed shapes: T captions for the B pictures' parts."""
    pixels: torch.Tensor         # (B, 3, S, S), normalised
    manipulated: torch.Tensor    # (B, N), 0 or 1
    weight: torch.Tensor         # (B, N), of each patch; the sum is 1
    source: torch.Tensor         # (B, N), the part that a patch is from
    pick: torch.Tensor           # (B, 16), patches drawn by weight
    known: torch.Tensor          # (B,), 0 or 1
    tokens: torch.Tensor         # (T + 2, L): distinct captions, empty ones, the two classes
    count: torch.Tensor          # (), how many captions are distinct
    caption: torch.Tensor        # (B, N), the caption of each patch


@torch.no_grad()
def targets_of(batch, pixels, told):
    """A pictures.Batch and its normalised images -> Targets; told: captions say what is pasted."""
    device = pixels.device
    known = batch.known.float()
    manipulated = (batch.inside > 0.6) * known[:, None]                          # (B, N)
    genuine = (batch.inside < 0.05).float()          # patches between are left out
    both = genuine / genuine.sum(1, keepdim=True).clamp(min=1)
    both = both + manipulated / manipulated.sum(1, keepdim=True).clamp(min=1)    # (B, N)
    first = torch.arange(len(known), device=device)[:, None] // 2 * 2            # (B, 1)
    source = torch.where(batch.inside > 0.6, first + 1, first)                   # (B, N)

    captions = [tuple(words) for words in batch.histories]
    if told:
        captions = [(name, *words) for name, words in zip(batch.classes, captions)]
    distinct = list(dict.fromkeys(captions))
    numbers = {caption: number for number, caption in enumerate(distinct)}
    place = np.array([numbers[caption] for caption in captions])                 # (T,)
    none = [()] * (len(captions) - len(distinct))
    tokens = tokens_of([*distinct, *none, *CLASS_CAPTIONS])
    return Targets(
        pixels=pixels, manipulated=manipulated, weight=both / both.sum(), source=source,
        pick=torch.multinomial(both + 1e-9, 16, replacement=True), known=known,
        tokens=send(tokens, device), count=send(np.array(len(distinct)), device),
        caption=send(place, device)[source])


class RegionLosses(nn.Module):
    """Captions and sources; told which part is pasted, map and image label, too."""

    def __init__(self, model, heads, told):
        super().__init__()
        self.model = model
        self.heads = heads
        self.told = told
        self.names = ["captions", "sources"]
        self.weights = [0.3, 0.5]
        if told:
            self.names += ["map", "image"]
            self.weights += [1.0, 1.0]

    def forward(self, *targets):
        """The tensors of Targets -> (2,) or (4,)."""
        t = Targets(*targets)
        _, features = self.model.encode_patches(t.pixels)
        features = F.normalize(features.float(), dim=-1)                         # (B, N, D)
        texts = F.normalize(self.model.encode_text(t.tokens).float(), dim=-1)    # (T + 2, D)

        scale = self.model.logit_scale.exp().clamp(max=100)
        logits = (scale * features @ texts[:-2].T).flatten(0, 1).float()         # (B * N, T)
        empty = torch.arange(logits.shape[1], device=logits.device) >= t.count
        logits = logits.masked_fill(empty, -1e4)
        errors = F.cross_entropy(logits, t.caption.flatten(), reduction="none")
        losses = [(t.weight.flatten() * errors).sum(),
                  same_source(self.heads["source"](features), t.source, t.pick)]

        if self.told:
            logits = class_logits(features, texts[-2:])
            logits = logits.float() + self.heads["bias"].weight[0, 0]            # (B, N)
            errors = F.binary_cross_entropy_with_logits(logits, t.manipulated, reduction="none")
            labels = torch.arange(len(logits), device=logits.device) % 2
            losses.append((t.weight * errors).sum())
            losses.append(F.binary_cross_entropy_with_logits(
                pool_score(logits, 0.1), labels.float(), weight=t.known))
        return torch.stack(losses)


def distillation_batches(training, source):
    """The batches of the first stage, for `run_stage`; most pictures are small."""
    student = training.model.visual
    teacher = clip.load(training.args.teacher).visual.requires_grad_(False).to(training.device)
    width, blocks = teacher.conv1.out_channels, len(teacher.transformer.resblocks)
    own_width, own_blocks = student.conv1.out_channels, len(student.transformer.resblocks)
    if teacher.patch_size != 16 or width != own_width or blocks < own_blocks:
        raise ValueError(f"found a teacher of {blocks} blocks, width {width}, {teacher.patch_size}-"
                         f"pixel patches, expected at least {own_blocks}, {own_width}, 16")
    losses = Distillation(student, teacher)
    for number in itertools.count():
        side = 128 if number % 4 == 3 else 64            # pixels
        each = max(4, 2 * training.args.pairs * 64 ** 2 // side ** 2)
        pixels = clip.normalize(source.crops(AT_ONCE * each, side))
        for part in pixels.split(each):
            alone = np.array(0.3 + 1.5 * training.share_done())
            yield losses, (part, send(alone, part.device))


def region_batches(training, source):
    """The batches of the second stage, for `run_stage`."""
    losses = {told: RegionLosses(training.model, training.heads, told) for told in (False, True)}
    for number in itertools.count():
        side = SIDES[number % len(SIDES)]                # pixels
        pairs = max(2, training.args.pairs * 128 ** 2 // side ** 2)
        batch = source.batch(AT_ONCE * pairs, side)
        pixels = clip.normalize(batch.image)             # together: the GPU must wait for it
        for part, own in zip(batch.split(AT_ONCE), pixels.chunk(AT_ONCE)):
            told = bool(source.rng.random() < training.args.told)
            yield losses[told], targets_of(part, own, told)


# ------------------------------------------------------------------------------------------ loop

def autocast(device):
    """The context in which matrices are multiplied in bfloat16, if the hardware can do that. No
    cache: a recording would keep it."""
    native = pick_dtype("auto", device) == torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=native, cache_enabled=False)


def make_watch(photos, device):
    """64 pairs of held-out photos, made with PIL: images (128, 3, S, S), inside (128, N) bool."""
    pairs = synthesis.PairSet(photos, size=192, count=0, seed=1)
    images, regions = [], []
    for number in range(128):
        image, region, _ = pairs.make(number // 2, number % 2)
        images.append(data.to_tensor(image))
        regions.append(torch.from_numpy(np.asarray(region, np.float32))[None] / 255)
    inside = F.avg_pool2d(torch.stack(regions), 8).flatten(1) > 0.5
    return clip.normalize(torch.stack(images)).to(device), inside


@torch.no_grad()
def measure(model, watch):
    """Pixel AUC (mean over manipulated pictures, patch by patch) and image AUC of the map of the
    class words alone."""
    images, inside = watch
    words = tokens_of(CLASS_CAPTIONS)
    with autocast(images.device):
        texts = F.normalize(model.encode_text(send(words, images.device)), dim=-1)
        maps = []
        for part in images.split(16):
            _, features = model.encode_patches(part)
            features = F.normalize(features.float(), dim=-1)
            maps.append(class_logits(features, texts.float()).float().cpu())
    logits = torch.cat(maps)                                                     # (128, N)

    pixel = []
    for row, region in zip(logits.numpy(), inside.numpy()):
        if region.any() and not region.all():
            pixel.append(auc(row, region))
    return np.mean(pixel), auc(pool_score(logits, 0.1).numpy(), np.arange(len(logits)) % 2)


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal (Jordan et al. 2024); steps as long as AdamW's (Liu et al. 2025).

    torch's own updates one matrix after the other; here all of one shape are updated together."""

    def __init__(self, matrices, lr):
        shapes = sorted({tuple(p.shape) for p in matrices})
        groups = [{"params": [p for p in matrices if p.shape == shape]} for shape in shapes]
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            matrices = group["params"]
            gradient = torch.stack([p.grad for p in matrices])       # (n, rows, columns)
            state = self.state[matrices[0]]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(gradient)
            momentum = state["momentum"].lerp_(gradient, 0.05)
            update = orthogonal(gradient.lerp(momentum, 0.95))
            size = 0.2 * max(matrices[0].shape) ** 0.5
            torch._foreach_add_(matrices, list(update), alpha=-group["lr"] * size)


def orthogonal(matrices):
    """Matrices (n, rows, columns) with all their singular values near 1: Newton-Schulz steps."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    x = x.to(pick_dtype("auto", x.device))
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (2.0315 * square @ square - 4.775 * square) @ x
    x = x.mT if tall else x
    return x.to(matrices.dtype)


class Training:
    """A pretraining's weights, optimizers and clock, so that it can go on after any end."""

    def __init__(self, args, device):
        torch.manual_seed(args.seed)
        self.args = args
        self.device = device
        self.model = clip.CLIP(**SIZES).to(device)
        self.heads = nn.ModuleDict({"source": nn.Linear(SIZES["embed_dim"], 64),
                                    "bias": nn.Linear(1, 1, bias=False)}).to(device)
        self.state = {"stage": "distil" if args.teacher else "regions", "step": 0,
                      "minutes": {"distil": 0.0, "regions": 0.0}}
        self.start_stage(self.state["stage"])
        self.file = Path(args.out, "last.pt")
        if self.file.exists():
            saved = torch.load(self.file, weights_only=True, map_location=device)
            self.state = saved["state"]
            self.start_stage(self.state["stage"])
            for name, part in self.parts().items():
                part.load_state_dict(saved[name])
        if self.state["stage"] == "distil" and not args.teacher:
            raise ValueError(f"found a distillation in {args.out}, expected its --teacher: name it")

    def start_stage(self, stage):
        """New optimizers and a new average of the weights, which is what comes out."""
        self.state["stage"] = stage
        self.lr = self.args.lr if stage == "regions" else self.args.lr_distil
        self.optimizers = self.make_optimizers(self.lr)
        self.mean = copy.deepcopy(self.model)
        self.recordings = {}                             # see `losses_of`
        self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None

    def minutes(self):
        """How long the stage shall be."""
        if self.state["stage"] == "regions":
            return self.args.minutes
        return self.args.distil_minutes

    def share_done(self):
        """Which share of these is spent."""
        return self.state["minutes"][self.state["stage"]] / self.minutes()

    def parts(self):
        named = {f"optimizer{i}": part for i, part in enumerate(self.optimizers)}
        return {"model": self.model, "mean": self.mean, "heads": self.heads, **named}

    def make_optimizers(self, lr):
        """Muon for the matrices of the image tower's blocks, AdamW for all else. Ours: not compared
        with AdamW alone."""
        matrices = [p for p in self.model.visual.transformer.parameters() if p.ndim == 2]
        chosen = {id(p) for p in matrices}
        others = [p for p in [*self.model.parameters(), *self.heads.parameters()]
                  if id(p) not in chosen]
        optimizers = [Muon(matrices, lr), torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98),
                                                            weight_decay=0.0)]
        return optimizers

    def save(self):
        parts = {name: part.state_dict() for name, part in self.parts().items()}
        torch.save({"state": self.state, **parts}, f"{self.file}.part")
        Path(f"{self.file}.part").replace(self.file)
        torch.save(self.mean.state_dict(), Path(self.args.out, "tower.pt"))

    def step(self, loss, rate):
        """One step of the optimizers at a share `rate` of their learning rate."""
        self.model.zero_grad()
        self.heads.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([*self.model.parameters(), *self.heads.parameters()], 5.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * self.lr
            optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.mean.parameters()), list(self.model.parameters()),
                                 1 - self.args.decay)
        self.state["step"] += 1


class Recording(nn.Module):
    """Losses for one shape of inputs: recording changes a module, so each shape has its own."""

    def __init__(self, losses):
        super().__init__()
        self.losses = losses

    def forward(self, *inputs):
        return self.losses(*inputs)


def losses_of(training, losses, inputs):
    """What a module of losses answers to a tuple of tensors.

    A step starts some thousand small kernels, for which a GPU waits; so they are recorded once for
    each shape of inputs, and from then on replayed at one call (`torch.cuda.CUDAGraph`).
    """
    if training.device.type != "cuda":
        with autocast(training.device):
            return losses(*inputs)

    key = (losses, inputs[0].shape)
    if key not in training.recordings:
        own = tuple(tensor.clone() for tensor in inputs)         # a recording keeps its inputs
        with autocast(training.device):
            training.recordings[key] = torch.cuda.make_graphed_callables(
                Recording(losses), own, allow_unused_input=True, pool=training.pool)
    return training.recordings[key](*inputs)


def run_stage(training, batches, watch):
    """Train until the stage has had its minutes. batches yields pairs: a module of losses, and the
    tensors that it takes."""
    stage = training.state["stage"]
    spent = training.state["minutes"]
    # on a processor other programs do not count
    clock = time.process_time if training.device.type == "cpu" else time.time
    began = clock()
    saved = spent[stage]
    recent = {}                                          # {name: losses since the last line}
    for count, (losses, inputs) in enumerate(batches, start=1):
        done = training.share_done()
        if done >= 1:
            break
        rate = min(1.0, count / 100)                     # each start is warmed up
        if stage == "distil":
            rate *= max(0.02, 0.5 + 0.5 * math.cos(math.pi * done))
        elif done > 0.7:                                 # the last part cools down
            rate *= max(0.02, (1 - done) / 0.3)

        found = losses_of(training, losses, inputs)                              # (k,)
        total = sum(weight * loss for weight, loss in zip(losses.weights, found))
        training.step(total, rate)
        for name, loss in zip(losses.names, found.detach().clone()):
            recent.setdefault(name, []).append(loss)
        # autograd's nodes of this stream, were they still there, would break a new recording
        del found, total
        spent[stage] += (clock() - began) / 60
        began = clock()

        due = spent[stage] - saved > min(10, training.minutes() / 8)
        if due or count % 100 == 0:
            report(training, recent)                     # before a save: no weights that are NaN
        if due:
            saved = spent[stage]
            training.save()
            record(training, watch)
            began = clock()
    report(training, recent)
    training.save()
    record(training, watch)


def report(training, recent):
    """Print the losses of the last steps and forget them; ValueError if they are no numbers."""
    state = training.state
    means = {name: torch.stack(losses).mean().item() for name, losses in recent.items()}
    recent.clear()
    if not math.isfinite(sum(means.values())):
        raise ValueError(f"found the losses {means} at step {state['step']}, expected finite "
                         "numbers: lower --lr or --lr-distil and start again, from the last save")
    words = "  ".join(f"{name} {mean:.3f}" for name, mean in means.items())
    print(f"{state['stage']} {state['minutes'][state['stage']]:.2f} min  step {state['step']}  "
          f"{words}", flush=True)


def record(training, watch):
    """Add a line to log.csv: how good the averaged weights are by now."""
    state = training.state
    if state["stage"] == "distil":
        return
    pixel, image = measure(training.mean, watch)
    row = [round(state["minutes"]["regions"], 1), state["step"], f"{pixel:.4f}", f"{image:.4f}"]
    print(f"held-out photos: pixel AUC {pixel:.3f}, image AUC {image:.3f}", flush=True)
    file = Path(training.args.out, "log.csv")
    new = not file.exists()
    with open(file, "a", newline="") as out:
        if new:
            csv.writer(out).writerow(["minutes", "step", "pixel_auc", "image_auc"])
        csv.writer(out).writerow(row)


def main():
    """The command line; returns the exit status: 0 done, 2 wrong call or losses that are NaN."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--photos", nargs="+", required=True, help="folders of genuine photos")
    parser.add_argument("--out", default="runs/tower", help="folder; goes on if it holds a start")
    parser.add_argument("--teacher", help="a CLIP to distil first, a name or file of clip.load")
    parser.add_argument("--distil-minutes", type=float, default=1, help="minutes of stage 1")
    parser.add_argument("--minutes", type=float, default=8,
                        help="minutes of stage 2, over all starts; of processor time without a GPU")
    parser.add_argument("--pairs", type=int, default=160,
                        help="pairs a batch, of 128 pixels; of other sizes as much work")
    parser.add_argument("--lr-distil", type=float, default=2e-3)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--decay", type=float, default=0.998, help="of the averaged weights")
    parser.add_argument("--told", type=float, default=0.5,
                        help="share of the batches that say which part is pasted")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args()
    try:
        pretrain(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def read_photos(folders):
    """Genuine pictures of the folders -> (paths to train on, paths to watch it by)."""
    photos, held_out = [], []
    for folder in folders:
        found, _ = data.read_set(folder, masks=False)
        paths = sorted(picture.path for picture in found if picture.label != 1)
        photos += [path for i, path in enumerate(paths) if i % 8]
        held_out += paths[8::16]
    if not held_out:
        raise ValueError(f"found {len(photos)} photos in {', '.join(folders)}, expected hundreds: "
                         "name a folder with more")
    return photos, held_out


def pretrain(args):
    """Both stages; ValueError or OSError, one line, for what cannot be used."""
    if min(args.minutes, args.distil_minutes) <= 0 or args.pairs < 1:
        raise ValueError(f"found --minutes {args.minutes} --distil-minutes {args.distil_minutes} "
                         f"--pairs {args.pairs}, expected more than 0 of each")
    device = pick_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(1)             # on a processor: several share a machine, small matrices
    Path(args.out).mkdir(parents=True, exist_ok=True)
    photos, held_out = read_photos(args.photos)
    training = Training(args, device)
    source = pictures.Pictures(photos, device, (args.seed, training.state["step"]))
    watch = make_watch(held_out, device)
    print(f"{len(photos)} photos, {len(held_out)} held out, on {device}", flush=True)

    if training.state["stage"] == "distil":
        run_stage(training, distillation_batches(training, source), watch)
        training.start_stage("regions")
    run_stage(training, region_batches(training, source), watch)


if __name__ == "__main__":
    sys.exit(main())
