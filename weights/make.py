"""The shipped model's CLIP, pretrained to read editing histories. Run by hand; resumable.

    python weights/make.py --photos DIR [DIR ..] --out runs/tower [--teacher FILE] --minutes 360
    python train.py --synthesize DIR --clip runs/tower/tower.pt     then SAPL, by image labels

Pictures are pasted together from genuine photos; each part has an editing history of its own, told
in words ("manipulated, splice, quality 60, blurred"). One picture then teaches hundreds of patches.
No label and no mask of a person is used: the generator knows what it did. All of it is ours; its
neighbours: CLIM (regions of mosaics against their texts), Editprint (editing chains and their
descriptions), Noiseprint++ and "Fighting Fake News" (one source or another).

1. Distillation (only with --teacher, a CLIP of image width 192 with 16-pixel patches): new weights
   learn to predict the teacher's tokens after each block. It sees each crop enlarged twice, so that
   our 8-pixel patches stand for its 16-pixel ones.
2. Regions: patches against the captions of their part; the map of "manipulated" against "genuine";
   patches of one source attract, all others repel. In half of the batches (--told) nobody says
   which part is pasted: histories alone in the captions, no map. Still, only pasted parts are
   "rotated", "reduced", "smooth", "shifted" or "inverted".

Every eighth photo of a folder is held out; half of these measure the progress (log.csv).
Best on a processor that multiplies bfloat16: torch's Muon always does, elsewhere very slowly.
"""
import argparse
import copy
import csv
import math
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np                                              # noqa: E402 (path first)
import torch                                                    # noqa: E402
import torch.nn as nn                                           # noqa: E402
import torch.nn.functional as F                                 # noqa: E402
from PIL import Image                                           # noqa: E402
from torch.utils.data import DataLoader, Dataset                # noqa: E402

import clip                                                     # noqa: E402
import data                                                     # noqa: E402
import synthesis                                                # noqa: E402
from ecpl import CLASSES, pool_score                            # noqa: E402
from train import auc                                           # noqa: E402

SIZES = dict(embed_dim=128, image_resolution=128, vision_layers=6, vision_width=192,
             vision_patch_size=8, context_length=77, vocab_size=514, transformer_width=128,
             transformer_layers=3, stem=(32, 96))
BATCHES = ((96, 20), (128, 12), (192, 5))        # (pixels, pairs), in turn: about equal work


# -------------------------------------------------------------------------------------- pictures

def edit_history(image, rng):
    """A PIL RGB image after a random chain of edits -> (image, its words)."""
    words = []
    if rng.random() < 0.5:                       # half of the photos: JPEG at most
        if rng.random() < 0.4:
            image, word = compressed(image, rng)
            words.append(word)
        return image, words
    if rng.random() < 0.4:
        factor = 2 ** rng.uniform(0.2, 1.2)
        small = [max(8, round(side / factor)) for side in image.size]
        image = image.resize(small, Image.Resampling.BICUBIC)
        image = image.resize((image.width, image.height), Image.Resampling.BICUBIC)
        words.append("enlarged")
    for _ in range(rng.integers(0, 3)):
        image, word = synthesis.random_edit(image, rng)
        words.append(word)
    if rng.random() < 0.6:
        image, word = compressed(image, rng)
        words.append(word)
    return image, words


def compressed(image, rng):
    """A PIL RGB image after JPEG -> (image, its quality in words, in tens)."""
    quality = int(rng.integers(40, 99))
    return data.jpeg(image, quality, rng.integers(0, 8, 2)), f"quality {quality // 10 * 10}"


class HistorySet(synthesis.PairSet):
    """Pairs of a genuine picture and its manipulation, whose parts have histories of their own."""

    def pair(self, number):
        """-> (genuine and manipulated image, PIL RGB; region, PIL L; a key of synthesis.KINDS;
        words of both parts' histories)."""
        rng = self.rng(number)
        size = (self.size, self.size)
        photo, donor = self.windows(self.work_size(rng), rng)
        photo, history = edit_history(photo, rng)
        donor, donor_history = edit_history(donor, rng)
        image, region, kind, words = synthesis.synthesize(photo, donor, rng)

        before = donor_history if kind == "splice" else history
        genuine = data.degrade(photo, size, self.rng(number, 1))
        manipulated = data.degrade(image, size, self.rng(number, 1))
        region = region.resize(size, Image.Resampling.BOX)
        return genuine, manipulated, region, kind, history, [*before, *words]


class Batches(Dataset):
    """Batch i -> (images (B, 3, S, S), inside (B, N), source (B, 2), classes and histories: texts
    of 2 parts a pair).

    inside: the share of each patch that is manipulated. source: the number of the source of a
    picture's genuine and of its manipulated part, the place of its texts in both lists too.
    """

    def __init__(self, photos, seed):
        photos = [np.asarray(data.open_image(path)) for path in photos]
        self.sets = [HistorySet(photos, size=size, count=0, seed=seed) for size, _ in BATCHES]

    def __len__(self):
        return 10 ** 7

    def __getitem__(self, i):
        images, regions, sources, classes, histories = [], [], [], [], []
        pictures = self.sets[i % len(BATCHES)]
        _, pairs = BATCHES[i % len(BATCHES)]
        for k in range(pairs):
            genuine, manipulated, region, kind, *words = pictures.pair(i * pairs + k)
            images += [data.to_tensor(genuine), data.to_tensor(manipulated)]
            region = torch.from_numpy(np.asarray(region, np.float32) / 255)      # (S, S)
            regions += [torch.zeros_like(region), region]
            sources += [(2 * k, 2 * k + 1)] * 2
            classes += [CLASSES[0], f"{CLASSES[1]}, {kind}"]
            histories += [", ".join(part) for part in words]
        inside = F.avg_pool2d(torch.stack(regions), 8).flatten(1)                # (B, N)
        return torch.stack(images), inside, torch.tensor(sources), classes, histories


class Crops(Dataset):
    """Batch i of square crops for the distillation: uint8 (B, 3, S, S), most of them small."""

    def __init__(self, photos, seed):
        photos = [np.asarray(data.open_image(path)) for path in photos]
        self.sets = [synthesis.PairSet(photos, size=size, count=0, seed=seed) for size in (64, 128)]

    def __len__(self):
        return 10 ** 7

    def __getitem__(self, i):
        large = i % 4 == 3
        crops = self.sets[1 if large else 0]
        images = []
        for k in range(6 if large else 24):
            rng = crops.rng(i, k)
            image, _ = crops.windows(crops.size, rng)
            if rng.random() < 0.4:
                image, _ = synthesis.random_edit(image, rng)
            images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))    # (3, S, S)
        return torch.stack(images)                                               # (B, 3, S, S)


# ---------------------------------------------------------------------------------------- losses

def distillation(student, teacher, image, alone):
    """Relative errors of the embedding and of each block, [()] each.

    image uint8 (B, 3, S, S). A block starts from the teacher's tokens, with chance `alone` from the
    student's own, so that it learns to mend their errors.
    """
    pixels = clip.normalize(image.float() / 255)                                 # (B, 3, S, S)
    blocks = student.transformer.resblocks
    with torch.no_grad():
        twice = F.interpolate(pixels, scale_factor=2, mode="bilinear")
        tokens = [teacher.embed(twice)]                                          # [(B, 1 + N, Dv)]
        for block in teacher.transformer.resblocks[:len(blocks)]:
            tokens.append(block(tokens[-1]))
    own = student.embed(pixels)                                                  # (B, 1 + N, Dv)
    losses = [(own - tokens[0]).float().square().mean() / tokens[0].float().var()]
    use_own = (torch.rand(len(pixels), 1, 1) < alone).to(own.dtype)              # (B, 1, 1)
    for block, before, after in zip(blocks, tokens, tokens[1:]):
        own = block(use_own * own + (1 - use_own) * before)                      # (B, 1 + N, Dv)
        change = (after - before).float().var()
        losses.append((own - after).float().square().mean() / change)
    return losses


def text_features(model, texts):
    """Texts -> unit features (T, D)."""
    texts = [text[:75] for text in texts]        # a letter is a token; 75 fit between both ends
    tokens = clip.tokenize(texts, SIZES["context_length"], SIZES["vocab_size"])
    tokens = tokens[:, :int(tokens.argmax(dim=1).max()) + 1]                     # (T, L)
    return F.normalize(model.encode_text(tokens), dim=-1)                        # (T, D)


def patch_features(model, image):
    """image (B, 3, S, S) in [0, 1] -> unit features (B, N, D)."""
    _, features = model.encode_patches(clip.normalize(image))
    return F.normalize(features.float(), dim=-1)                                 # (B, N, D)


def class_logits(model, features):
    """The map: logits (B, N) of "manipulated" against "genuine"."""
    genuine, manipulated = text_features(model, list(CLASSES)).float()           # (D,)
    return 10 * features @ (manipulated - genuine)                               # (B, N)


def same_source(z, source, weight):
    """Patches of one source attract, all others of the batch repel: z (B, N, d), source and weight
    (B, N) -> scalar. InfoNCE over 24 patches a picture, drawn by weight."""
    B, N, d = z.shape
    pick = torch.multinomial(weight + 1e-9, min(24, N), replacement=True)        # (B, K)
    z = F.normalize(z.gather(1, pick[..., None].expand(-1, -1, d)), dim=-1).flatten(0, 1)
    source = source.gather(1, pick).flatten()                                    # (A,)
    alone = torch.eye(len(z), dtype=torch.bool)                                  # (A, A)
    same = (source[:, None] == source) & ~alone
    similarity = (z @ z.T / 0.1).masked_fill(alone, -1e4)                        # (A, A)
    positive = similarity.masked_fill(~same, -1e4).logsumexp(dim=1)              # (A,)
    loss = similarity.logsumexp(dim=1) - positive
    return loss[same.any(dim=1)].mean()


def region_losses(model, heads, batch, told):
    """-> {name: scalar} for a batch of Batches. told: say which part is pasted."""
    image, inside, sources, classes, captions = batch
    B, N = inside.shape
    manipulated = (inside > 0.6).float()                                         # (B, N)
    genuine = (inside < 0.05).float()                # patches between are left out
    both = genuine / genuine.sum(1, keepdim=True).clamp(min=1)
    both = both + manipulated / manipulated.sum(1, keepdim=True).clamp(min=1)    # (B, N)
    weight = both / both.sum()
    source = torch.where(inside > 0.6, sources[:, 1:], sources[:, :1])           # (B, N)

    if told:
        captions = [f"{name}, {caption}" for name, caption in zip(classes, captions)]
    distinct = list(dict.fromkeys(captions))
    place = torch.tensor([distinct.index(caption) for caption in captions])      # of each part

    features = patch_features(model, image)                                      # (B, N, D)
    texts = text_features(model, distinct).float()                               # (T, D)
    logits = model.logit_scale.exp().clamp(max=100) * features @ texts.T         # (B, N, T)
    errors = F.cross_entropy(logits.flatten(0, 1), place[source].flatten(), reduction="none")
    losses = {"captions": (weight.flatten() * errors).sum(),
              "sources": same_source(heads["source"](features), source, both)}
    if told:
        logits = class_logits(model, features) + heads["bias"].weight[0, 0]      # (B, N)
        errors = F.binary_cross_entropy_with_logits(logits, manipulated, reduction="none")
        labels = torch.arange(B) % 2
        losses["map"] = (weight * errors).sum()
        losses["image"] = F.binary_cross_entropy_with_logits(pool_score(logits, 0.1),
                                                             labels.float())
    return losses


WEIGHTS = {"captions": 0.3, "sources": 0.5, "map": 1.0, "image": 1.0}


# ------------------------------------------------------------------------------------------ loop

def autocast():
    """The context in which matrices are multiplied in bfloat16, if the processor can do that."""
    native = clip.native_dtype(torch.device("cpu")) == torch.bfloat16
    return torch.autocast("cpu", torch.bfloat16, enabled=native)


@torch.no_grad()
def measure(model, pairs):
    """Pixel AUC (mean over manipulated pictures, patch by patch) and image AUC of the map of the
    class words alone, on pairs of held-out photos."""
    pixel, scores = [], []
    for number in range(64):
        for label in (0, 1):
            image, region, _ = pairs.make(number, label)
            image = data.to_tensor(image)[None]
            with autocast():
                logits = class_logits(model, patch_features(model, image)).float()   # (1, N)
            scores.append(pool_score(logits, 0.1))
            region = torch.from_numpy(np.asarray(region, np.float32))[None] / 255
            inside = F.avg_pool2d(region, 8).flatten() > 0.5                     # (N,)
            if inside.any() and not inside.all():
                pixel.append(auc(logits[0].numpy(), inside.numpy()))
    return np.mean(pixel), auc(torch.cat(scores).numpy(), np.arange(len(scores)) % 2)


class Training:
    """Everything that a pretraining is at a moment, so that it can go on after any end."""

    def __init__(self, args):
        torch.manual_seed(args.seed)
        self.args = args
        self.model = clip.CLIP(**SIZES)
        self.heads = nn.ModuleDict({"source": nn.Linear(SIZES["embed_dim"], 64),
                                    "bias": nn.Linear(1, 1, bias=False)})
        self.mean = copy.deepcopy(self.model)            # averaged weights: what comes out
        self.state = {"stage": "distil" if args.teacher else "regions", "step": 0,
                      "minutes": {"distil": 0.0, "regions": 0.0}}
        self.optimizers = self.make_optimizers(args.lr_distil)
        self.file = Path(args.out, "last.pt")
        if self.file.exists():
            saved = torch.load(self.file, weights_only=True)
            self.state = saved["state"]
            if self.state["stage"] == "regions":
                self.optimizers = self.make_optimizers(args.lr)
            for name, part in self.parts().items():
                part.load_state_dict(saved[name])

    def parts(self):
        named = {f"optimizer{i}": part for i, part in enumerate(self.optimizers)}
        return {"model": self.model, "mean": self.mean, "heads": self.heads, **named}

    def make_optimizers(self, lr):
        """Muon (Jordan et al. 2024) for the matrices of the image tower's blocks, AdamW for all
        else. Ours: not compared with AdamW alone."""
        matrices = [p for p in self.model.visual.transformer.parameters() if p.ndim == 2]
        chosen = {id(p) for p in matrices}
        others = [p for p in [*self.model.parameters(), *self.heads.parameters()]
                  if id(p) not in chosen]
        optimizers = [torch.optim.Muon(matrices, lr=lr, weight_decay=0.0,
                                       adjust_lr_fn="match_rms_adamw"),
                      torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)]
        for optimizer in optimizers:
            optimizer.param_groups[0]["base"] = lr
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
        weights = [*self.model.parameters(), *self.heads.parameters()]
        length = nn.utils.clip_grad_norm_(weights, 5.0)
        if not math.isfinite(length):
            raise SystemExit(f"error: the loss is {loss.item()} at step {self.state['step']}: "
                             "lower --lr and start again")
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = rate * optimizer.param_groups[0]["base"]
            optimizer.step()
        self.state["step"] += 1
        decay = min(0.999, self.state["step"] / (self.state["step"] + 10))
        with torch.no_grad():
            for mean, weight in zip(self.mean.parameters(), self.model.parameters()):
                mean.lerp_(weight, 1 - decay)


def run_stage(training, loader, minutes, compute, watch):
    """Train until the stage has had its minutes. compute: (batch, share done) -> {name: loss}."""
    stage = training.state["stage"]
    spent = training.state["minutes"]
    began = time.process_time()                          # other programs do not count
    before = spent[stage]
    saved = time.time()
    rows = Path(training.args.out, "log.csv")
    recent = {}                                          # {name: losses since the last line}
    for count, batch in enumerate(loader, start=1):
        done = spent[stage] / minutes
        if done >= 1:
            break
        with autocast():
            losses = compute(batch, done)
        total = sum(WEIGHTS.get(name, 1.0) * loss for name, loss in losses.items())
        rate = min(1.0, count / 100)                     # each start is warmed up
        if stage == "distil":
            rate *= max(0.02, 0.5 + 0.5 * math.cos(math.pi * done))
        elif done > 0.85:                                # the last part cools down
            rate *= max(0.02, (1 - done) / 0.15)
        training.step(total, rate)
        spent[stage] = before + (time.process_time() - began) / 60

        for name, loss in losses.items():
            recent.setdefault(name, []).append(loss.item())
        if count % 200 == 0:
            words = "  ".join(f"{name} {np.mean(values):.3f}" for name, values in recent.items())
            print(f"{stage} {spent[stage]:.1f} min  step {training.state['step']}  {words}",
                  flush=True)
            recent.clear()
        if time.time() - saved > 600:
            saved = time.time()
            training.save()
            record(training, rows, watch)
    training.save()
    record(training, rows, watch)


def record(training, file, watch):
    """Add a line to log.csv: how good the averaged weights are by now."""
    state = training.state
    if state["stage"] == "distil":
        return
    pixel, image = measure(training.mean, watch)
    row = [round(state["minutes"]["regions"], 1), state["step"], f"{pixel:.4f}", f"{image:.4f}"]
    print(f"held-out photos: pixel AUC {pixel:.3f}, image AUC {image:.3f}", flush=True)
    new = not file.exists()
    with open(file, "a", newline="") as out:
        if new:
            csv.writer(out).writerow(["minutes", "step", "pixel_auc", "image_auc"])
        csv.writer(out).writerow(row)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--photos", nargs="+", required=True, help="folders of genuine photos")
    parser.add_argument("--out", default="runs/tower", help="folder; goes on if it holds a start")
    parser.add_argument("--teacher", help="a CLIP to distil first, a name or file of clip.load")
    parser.add_argument("--distil-minutes", type=float, default=20,
                        help="processor minutes of stage 1")
    parser.add_argument("--minutes", type=float, default=360,
                        help="processor minutes of stage 2, over all starts")
    parser.add_argument("--lr-distil", type=float, default=2e-3)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--told", type=float, default=0.5,
                        help="share of the batches that say which part is pasted")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    Path(args.out).mkdir(parents=True, exist_ok=True)

    photos, held_out = [], []
    for folder in args.photos:
        for i, path in enumerate(sorted(Path(folder).iterdir())):
            if i % 8:
                photos.append(path)
            elif i % 16 == 8:
                held_out.append(path)
    training = Training(args)
    seed = (args.seed, training.state["step"])           # new pictures after each start
    watch = synthesis.PairSet(held_out, size=192, count=0, seed=1)

    if training.state["stage"] == "distil":
        teacher = clip.load(args.teacher).visual.requires_grad_(False)
        loader = DataLoader(Crops(photos, seed), batch_size=None, num_workers=1)

        def compute(image, done):
            errors = distillation(training.model.visual, teacher, image, 0.3 + 1.5 * done)
            return {f"block{i}": error for i, error in enumerate(errors)}

        run_stage(training, loader, args.distil_minutes, compute, watch)
        training.state["stage"] = "regions"
        training.mean.load_state_dict(training.model.state_dict())
        training.optimizers = training.make_optimizers(args.lr)

    def compute(batch, done):
        told = bool(torch.rand(()) < args.told)
        return region_losses(training.model, training.heads, batch, told)

    loader = DataLoader(Batches(photos, seed), batch_size=None, num_workers=1, prefetch_factor=4)
    run_stage(training, loader, args.minutes, compute, watch)


if __name__ == "__main__":
    main()
