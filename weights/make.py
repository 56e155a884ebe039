"""Pretrain a CLIP like the shipped model's to read editing histories. Run by hand; resumable.

    python weights/make.py --photos SET [SET ..] --teacher deit_tiny_patch16_224-a1311bcf.pth

1. Distillation (only with --teacher): fresh weights learn to predict the teacher's tokens after
   each of its first blocks. The teacher sees pictures at double size, so its 16-pixel patches
   match our 8-pixel ones. It is DeiT-Tiny (Touvron et al. 2021; Apache-2.0,
   github.com/facebookresearch/deit), from
   https://dl.fbaipublicfiles.com/deit/deit_tiny_patch16_224-a1311bcf.pth
2. Regions: synthesis.py manipulates genuine photos. Each patch is compared with captions that tell
   the editing history of every part ("manipulated, splice, quality 60, blurred"); a map separates
   "manipulated" from "genuine"; patches of one source attract each other and repel all others. In
   half of the batches captions do not tell which part is pasted, and map and score have no loss.

No human label or mask is used; hold out photos for tests yourself. All of it is ours; related:
CLIM (regions of mosaics against their texts), Editprint (editing chains and their descriptions),
Noiseprint++. Meant for a GPU; on a CPU use --pairs 12 and expect hours.
"""
import argparse
import copy
import math
import pickle
import sys
from functools import lru_cache
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np                                              # noqa: E402 (path first)
import torch                                                    # noqa: E402
import torch.nn as nn                                           # noqa: E402
import torch.nn.functional as F                                 # noqa: E402

import clip                                                     # noqa: E402
import data                                                     # noqa: E402
from ecpl import CLASSES, pool_score                            # noqa: E402
from infer import pick_device, pick_dtype                       # noqa: E402
from weights import synthesis                                   # noqa: E402

SIZES = {                                # of the CLIP
    "embed_dim": 128,
    "image_resolution": 128,
    "vision_layers": 6,
    "vision_width": 192,
    "vision_patch_size": 8,
    "stem": (32, 96),
    "context_length": 77,
    "vocab_size": 514,                   # bytes
    "transformer_width": 128,
    "transformer_layers": 3}
SIDES = (96, 160, 256)                   # of the pictures, pixels, in turn
LEARNING_RATES = {"distil": 2e-3, "regions": 1e-3}


# ---------------------------------------------------------------------------------------- photos

def read_photos(sets, device):
    """The genuine pictures of folders or lists, as tensors (3, H, W) of 0-255; small ones are left
    out."""
    photos = []
    for path in sets:
        for picture in synthesis.genuine_pictures(path):
            pixels = np.asarray(data.open_image(picture.path))                   # (H, W, 3)
            if min(pixels.shape[:2]) >= max(SIDES):
                photo = torch.tensor(pixels, device=device)
                photos.append(photo.movedim(2, 0))                               # (3, H, W)
    if not photos:
        raise ValueError(f"found no photo of {max(SIDES)} pixels or more in {', '.join(sets)}, "
                         "expected hundreds: name other sets")
    return photos


def windows(photos, n, side, rng):
    """Random squares of random photos at native pixels: (n, 3, side, side) of 0-255."""
    found = []
    for number in rng.integers(len(photos), size=n):
        _, H, W = photos[number].shape
        y = rng.integers(H - side + 1)
        x = rng.integers(W - side + 1)
        found.append(photos[number][:, y:y + side, x:x + side])
    return torch.stack(found).float()


# -------------------------------------------------------------------------------- 1. distillation

NAMES = {                                # DeiT's -> those of torch's block
    "patch_embed.proj": "patch_embed",
    "attn.qkv.": "self_attn.in_proj_",
    "attn.proj": "self_attn.out_proj",
    "mlp.fc1": "linear1",
    "mlp.fc2": "linear2"}


class DeiT(nn.Module):
    """The published DeiT: image (B, 3, H, W) in [0, 1] -> tokens before and after each block."""

    def __init__(self, weights):
        """weights: {name in the DeiT repository: tensor}; sizes are inferred from them."""
        super().__init__()
        width, _, patch, _ = weights["patch_embed.proj.weight"].shape
        hidden = len(weights["blocks.0.mlp.fc1.bias"])
        self.cls_token = nn.Parameter(weights["cls_token"])                      # (1, 1, Dv)
        self.pos_embed = nn.Parameter(weights["pos_embed"])                      # (1, 1 + N, Dv)
        self.patch_embed = nn.Conv2d(3, width, patch, stride=patch)
        self.blocks = nn.ModuleList()
        while f"blocks.{len(self.blocks)}.norm1.weight" in weights:
            self.blocks.append(nn.TransformerEncoderLayer(
                width, width // 64, hidden, dropout=0.0, activation="gelu", layer_norm_eps=1e-6,
                batch_first=True, norm_first=True))

        renamed = {}
        for name, tensor in weights.items():
            for theirs, ours in NAMES.items():
                name = name.replace(theirs, ours)
            if not name.startswith(("norm.", "head.")):      # both follow the last block
                renamed[name] = tensor
        self.load_state_dict(renamed)
        normal = torch.tensor([
            [0.485, 0.456, 0.406],                           # means and deviations of ImageNet
            [0.229, 0.224, 0.225]])
        self.register_buffer("normal", normal.view(2, 3, 1, 1), persistent=False)

    def forward(self, image):
        mean, deviation = self.normal                                            # (3, 1, 1)
        x = self.patch_embed((image - mean) / deviation)                         # (B, Dv, h, w)
        side = math.isqrt(self.pos_embed.shape[1])
        places = self.pos_embed[:, 1:].mT                                        # (1, Dv, N)
        places = places.unflatten(2, (side, side))                               # (1, Dv, h, w)
        x = x + F.interpolate(places, x.shape[2:], mode="bicubic")
        x = x.flatten(2).mT                                                      # (B, N, Dv)
        first = self.cls_token + self.pos_embed[:, :1]                           # (1, 1, Dv)
        first = first.expand(len(x), 1, -1)                                      # (B, 1, Dv)
        x = torch.cat([first, x], dim=1)                                         # (B, 1 + N, Dv)
        tokens = [x]
        for block in self.blocks:
            x = block(x)
            tokens.append(x)
        return tokens


def load_teacher(path):
    """The DeiT of the published file, frozen; ValueError for a file without a DeiT."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"found no weights in {path}, expected the file of DeiT-Tiny: download it "
                         "from the address in --help") from error
    weights = weights.get("model", weights) if isinstance(weights, dict) else {}
    if "blocks.0.attn.qkv.weight" not in weights:
        raise ValueError(f"found other weights in {path}, expected those of DeiT-Tiny: download "
                         "them from the address in --help")
    return DeiT(weights).requires_grad_(False).eval()


class Distillation(nn.Module):
    """Relative errors of a student's embedding and of each of its blocks."""

    def __init__(self, student, teacher):
        super().__init__()
        self.student = student
        self.teacher = teacher
        self.names = [f"tokens {i}" for i in range(1 + len(student.transformer.resblocks))]

    def forward(self, image, pixels, alone):
        """image (B, 3, S, S) in [0, 1], pixels: the same normalised -> losses (1 + blocks,)."""
        with torch.no_grad():
            twice = F.interpolate(image, scale_factor=2, mode="bilinear")        # (B, 3, 2S, 2S)
            tokens = self.teacher(twice)                                         # [(B, 1 + N, Dv)]
        own = self.student.embed(pixels)                                         # (B, 1 + N, Dv)
        losses = [relative_error(own, tokens[0], tokens[0])]
        # a block starts from the teacher's tokens or, with probability `alone`, from the student's
        # own, so that it learns to correct their errors
        use_own = torch.rand_like(image[:, 0, :1, :1]) < alone                   # (B, 1, 1)
        blocks = self.student.transformer.resblocks
        for block, before, after in zip(blocks, tokens, tokens[1:]):
            own = block(torch.where(use_own, own, before))                       # (B, 1 + N, Dv)
            losses.append(relative_error(own, after, after - before))
        return torch.stack(losses)


def relative_error(found, wanted, change):
    """Mean squared error relative to the variance of the change to predict."""
    error = (found - wanted).float().square().mean()
    return error / change.float().var()


def distillation_batch(photos, args, step, rng):
    """The inputs of Distillation; three of four batches are small pictures."""
    side = 128 if step % 4 == 0 else 64                  # pixels
    count = max(4, 2 * args.pairs * 64 ** 2 // side ** 2)
    image = windows(photos, count, side, rng) / 255
    alone = torch.tensor(0.3 + 1.5 * step / args.distil_steps, device=image.device)
    return image, clip.normalize(image), alone


# ------------------------------------------------------------------------------------- 2. regions

def contrast(similarity, positive):
    """InfoNCE: similarity (A, K), positive (A, K) bool -> loss of each row, (A,)."""
    chosen = similarity.masked_fill(~positive, -1e4)
    return similarity.logsumexp(dim=1) - chosen.logsumexp(dim=1)


def same_source(z, source):
    """Contrast patches of one source with all others: z (A, d), source (A,) -> scalar."""
    z = F.normalize(z, dim=1)
    alone = torch.eye(len(z), dtype=torch.bool, device=z.device)                 # (A, A)
    similarity = (z @ z.T / 0.1).masked_fill(alone, -1e4)                        # (A, A)
    same = (source[:, None] == source) & ~alone
    loss = contrast(similarity, same)                                            # (A,)
    found = same.any(dim=1)
    return (found * loss).sum() / found.sum()


class Regions(nn.Module):
    """The four losses of the second stage."""
    names = ("captions", "sources", "map", "image")

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.source = nn.Linear(SIZES["embed_dim"], 64)
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, pixels, inside, seen, tokens, caption, told):
        """n photos, then their manipulations: B = 2n pictures with T = 2n parts -> losses (4,).

        pixels (B, 3, S, S), normalised; inside (B, N), manipulated share of each patch; seen (B,),
        0 excludes a manipulation; tokens (T + 2, L) of the parts' captions and the two classes;
        caption (T,), equal numbers for equal captions; told (), 1 if they tell what is pasted.
        """
        _, features = self.model.encode_patches(pixels)
        features = F.normalize(features.float(), dim=-1)                         # (B, N, D)
        texts = self.model.encode_text(tokens)
        texts = F.normalize(texts.float(), dim=-1)                               # (T + 2, D)
        # every part has the same weight; patches on a border have none
        manipulated = (inside > 0.6) * seen[:, None]                             # (B, N)
        genuine = (inside < 0.05).float()
        weight = F.normalize(manipulated, p=1, dim=1)        # their sum becomes 1
        weight = weight + F.normalize(genuine, p=1, dim=1)
        weight = weight / weight.sum()                                           # (B, N)
        B, N = inside.shape
        n = B // 2
        picture = torch.arange(B, device=inside.device)                          # (B,)
        source = picture[:, None] % n + n * manipulated.long()                   # (B, N)
        # each patch and the caption of its part
        scale = self.model.logit_scale.exp().clamp(max=100)
        similarity = scale * features.flatten(0, 1) @ texts[:-2].T               # (B * N, T)
        own = caption[source].view(-1, 1)                                        # (B * N, 1)
        errors = contrast(similarity, own == caption).view(B, N)
        captions = (weight * errors).sum()
        # 16 patches of each picture, drawn by weight
        time = -torch.rand_like(weight).log() / weight
        pick = time.topk(16, dim=1, largest=False).indices                       # (B, 16)
        pick = (pick + N * picture[:, None]).flatten()                           # (B * 16,)
        z = self.source(features.flatten(0, 1)[pick])                            # (B * 16, 64)
        sources = same_source(z.float(), source.flatten()[pick])
        # the map, and the image's label
        logits = 10 * features @ (texts[-1] - texts[-2])                         # (B, N)
        logits = logits.float() + self.bias
        errors = F.binary_cross_entropy_with_logits(logits, manipulated, reduction="none")
        map_loss = (weight * errors).sum()
        image = F.binary_cross_entropy_with_logits(
            pool_score(logits, 0.1), (picture >= n).float(), weight=seen)
        return torch.stack([0.3 * captions, 0.5 * sources, told * map_loss, told * image])


@lru_cache(maxsize=None)
def tokens_of(caption):
    """Token ids (L,), one per byte; longer captions are truncated."""
    length = SIZES["context_length"]
    return clip.tokenize(caption[:length - 2], length, SIZES["vocab_size"])[0]


def region_batch(photos, args, step, rng):
    """The inputs of Regions: n photos and their manipulations."""
    side = SIDES[step % len(SIDES)]
    n = max(2, args.pairs * 128 ** 2 // side ** 2)
    told = rng.random() < 0.5
    images = windows(photos, 2 * n, side, rng)
    words = [[] for _ in images]
    synthesis.edit_history(images, rng.random(2 * n) < 0.7, rng, words)
    photo, donor = images.split(n)
    kinds = synthesis.random_kinds(n, rng)
    pasted = []                                          # histories of the pasted parts
    for i in range(n):
        source = n + i if kinds[i] == "splice" else i
        pasted.append(list(words[source]))
    made = synthesis.paste(photo, donor, kinds, rng, pasted)
    seed = rng.integers(2 ** 31)                         # treat both of a pair alike
    photo = synthesis.wear(photo, np.random.default_rng(seed))
    image = synthesis.wear(made.image, np.random.default_rng(seed))
    images = torch.cat([photo, image])                                           # (B, 3, S, S)

    captions = words[:n] + pasted
    if told:
        names = [CLASSES[:1]] * n + [(CLASSES[1], kind) for kind in kinds]
        captions = [(*name, *own) for name, own in zip(names, captions)]
    texts = [", ".join(own) for own in captions]
    tokens = torch.stack([tokens_of(text) for text in (*texts, *CLASSES)])
    caption = [texts.index(text) for text in texts]

    device = images.device
    inside = F.avg_pool2d(made.region, SIZES["vision_patch_size"]).flatten(1)    # (n, N)
    inside = torch.cat([torch.zeros_like(inside), inside])                       # (B, N)
    seen = torch.cat([torch.ones_like(made.seen), made.seen]).float()            # (B,)
    caption = torch.tensor(caption, device=device)                               # (T,)
    told = torch.tensor(float(told), device=device)
    return clip.normalize(images / 255), inside, seen, tokens.to(device), caption, told


# ------------------------------------------------------------------------------------------ loop

class Training:
    """Weights, optimizers and progress of a pretraining; continues from its last save."""

    def __init__(self, args, device):
        torch.manual_seed(args.seed)
        self.regions = Regions(clip.CLIP(**SIZES)).to(device)
        self.done = {"distil": 0, "regions": 0}          # steps
        self.start_optimizers()
        self.file = Path(args.out, "last.pt")
        if self.file.exists():
            saved = torch.load(self.file, weights_only=True, map_location=device)
            self.done = saved.pop("done")
            for name, part in saved.items():
                getattr(self, name).load_state_dict(part)

    def start_optimizers(self):
        """Muon for the matrices of the image tower's blocks, AdamW for everything else."""
        matrices = []
        others = []
        for name, weight in self.regions.named_parameters():
            if "visual.transformer" in name and weight.ndim == 2:
                matrices.append(weight)
            else:
                others.append(weight)
        self.muon = torch.optim.Muon(matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        self.adam = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0)

    def save(self):
        state = {"done": self.done}
        for name in ("regions", "muon", "adam"):
            state[name] = getattr(self, name).state_dict()
        torch.save(state, f"{self.file}.part")
        Path(f"{self.file}.part").replace(self.file)
        tower = self.regions.model.state_dict()
        torch.save(tower, self.file.with_name("tower.pt"))

    def step(self, losses, lr):
        """Update the weights by losses (k,), which are returned without their graph."""
        self.regions.zero_grad()
        losses.sum().backward()
        nn.utils.clip_grad_norm_(self.regions.parameters(), 5.0)
        for optimizer in (self.muon, self.adam):
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        return losses.detach().clone()


def losses_of(losses, inputs, recordings):
    """Call a module of losses, in bf16 where the hardware supports it.

    A step launches thousands of small kernels, and the GPU waits for them. So each shape of inputs
    is recorded once as a CUDA graph and then replayed.
    """
    device = inputs[0].device
    native = pick_dtype("auto", device) == torch.bfloat16
    # a graph must not depend on a cache of rounded weights
    with torch.autocast(device.type, torch.bfloat16, enabled=native, cache_enabled=False):
        if device.type != "cuda":
            return losses(*inputs)
        shape = inputs[0].shape
        if shape not in recordings:
            own = tuple(tensor.clone() for tensor in inputs)     # a graph keeps its inputs
            # recording changes a module, hence the copy, which shares the weights
            recordings[shape] = torch.cuda.make_graphed_callables(
                copy.copy(losses), own, allow_unused_input=True)
    return recordings[shape](*inputs)


def run_stage(training, stage, steps, losses, make_batch):
    """Train to the last step of a stage; make_batch(step) gives the inputs of losses."""
    recordings = {}
    recent = []
    first = training.done[stage]
    for step in range(first + 1, steps + 1):
        # 1) linear warm-up after every start, 2) constant, 3) linear decay over the last 30 %
        warm = (step - first) / 100
        cool = max(0.02, (1 - step / steps) / 0.3)
        lr = LEARNING_RATES[stage] * min(1.0, warm, cool)
        batch = make_batch(step)
        # keep no reference to the graph of a step: it would break the next recording
        recent.append(training.step(losses_of(losses, batch, recordings), lr))
        training.done[stage] = step

        due = step == steps or step % max(1, steps // 8) == 0
        if due or step % 100 == 0:
            means = torch.stack(recent).mean(dim=0).tolist()
            words = [f"{name} {mean:.3f}" for name, mean in zip(losses.names, means)]
            print(f"{stage}  step {step}", *words, sep="  ", flush=True)
            if not math.isfinite(sum(means)):
                raise SystemExit("error: found losses that are not finite: lower LEARNING_RATES "
                                 "and start again from the last save")
            recent.clear()
        if due:
            training.save()


def pretrain(args, photos, teacher):
    """Run both stages, or what is left of them."""
    training = Training(args, photos[0].device)
    rng = np.random.default_rng((args.seed, *training.done.values()))
    if teacher:
        teacher = teacher.to(photos[0].device)
        losses = Distillation(training.regions.model.visual, teacher)
        run_stage(training, "distil", args.distil_steps, losses,
                  lambda step: distillation_batch(photos, args, step, rng))
    if training.done["regions"] == 0:
        training.start_optimizers()
    run_stage(training, "regions", args.steps, training.regions,
              lambda step: region_batch(photos, args, step, rng))


def main(arguments=None):
    """The command line; returns the exit status: 0 done, 2 wrong call."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", nargs="+", required=True, help="folders or lists, genuine")
    parser.add_argument("--out", default="runs/tower", help="folder; a run in it is continued")
    parser.add_argument("--teacher", help="file of DeiT-Tiny to distil first")
    parser.add_argument("--distil-steps", type=int, default=2800, help="steps of stage 1")
    parser.add_argument("--steps", type=int, default=4500, help="steps of stage 2")
    parser.add_argument("--pairs", type=int, default=160,
                        help="pairs per batch at 128 pixels; fewer of larger ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(arguments)
    try:
        device = pick_device(args.device)
        teacher = load_teacher(args.teacher) if args.teacher else None
        photos = read_photos(args.photos, device)
        Path(args.out).mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(photos)} photos on {device}", flush=True)
    pretrain(args, photos, teacher)
    return 0


if __name__ == "__main__":
    sys.exit(main())
