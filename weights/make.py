"""The start of the shipped model: a small CLIP of our own, made from genuine photos. Run by hand.

    python weights/make.py --photos DIR --teacher FILE --out runs/tiny.pt       both steps below
    python train.py --synthesize DIR --clip runs/tiny.pt --tune full ..         then SAPL (README)

1. Distillation, if a teacher is given: any CLIP with an image tower of width 192 and 16-pixel
   patches. New weights learn to predict its tokens after each block; the teacher sees each crop
   enlarged twice, so that our 8-pixel patches stand for its 16-pixel ones.
2. Captions: the synthesis knows what it did to a picture and says so ("manipulated, splice, soft
   border", "genuine, quality 70, noise"). Patches and captions are contrasted as CLIP contrasts
   pictures and texts, the patches that fit best speaking for the picture (FILIP, Yao et al. 2021,
   with our top-k).
No label of a person and no mask is used. Both steps run for a time, not a number of steps; --start
goes on from an earlier file, of fewer blocks too.
"""
import argparse
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
from PIL import Image, ImageEnhance                             # noqa: E402
from torch.utils.data import DataLoader, Dataset                # noqa: E402

import clip                                                     # noqa: E402
import data                                                     # noqa: E402
import ecpl                                                     # noqa: E402

SIZES = dict(embed_dim=128, image_resolution=128, vision_layers=6, vision_width=192,
             vision_patch_size=8, context_length=77, vocab_size=514, transformer_width=128,
             transformer_layers=3, stem=(32, 96))


class Crops(Dataset):
    """Batches of square crops, uint8 (B, 3, S, S): three of S = 64, then one of S = 128, B / 4."""

    def __init__(self, photos, batch, seed):
        self.photos = [np.asarray(data.open_image(path)) for path in photos]
        self.batch, self.seed = batch, seed

    def __len__(self):
        return 10 ** 6

    def crop(self, rng, size):
        photo = self.photos[rng.integers(len(self.photos))]
        wide = size if rng.random() < 0.4 else size * math.exp(rng.uniform(0, math.log(4)))
        side = min(round(wide), *photo.shape[:2])
        y, x = (rng.integers(0, limit - side + 1) for limit in photo.shape[:2])
        image = Image.fromarray(photo[y:y + side, x:x + side]).resize((size, size), Image.BICUBIC)
        if rng.random() < 0.5:
            image = image.transpose(Image.FLIP_LEFT_RIGHT)
        if rng.random() < 0.4:
            image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.6, 1.4))
        if rng.random() < 0.3:
            image = ImageEnhance.Color(image).enhance(rng.uniform(0.2, 1.7))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)              # (3, S, S)

    def __getitem__(self, i):
        rng, large = np.random.default_rng((self.seed, i)), i % 4 == 3
        size, B = (128, self.batch // 4) if large else (64, self.batch)
        return torch.stack([self.crop(rng, size) for _ in range(B)])           # (B, 3, S, S)


class Captioned(data.SynthesisSet):
    """Crops and their manipulations with a caption each: item -> (image (3, S, S), str)."""

    def __getitem__(self, index):
        image, _, words = self.make(index // 2, index % 2)
        return data.to_tensor(image), f"{ecpl.CLASSES[index % 2]}, {words}"


def collate(items):
    """-> images (B, 3, S, S), token ids (B, L), which captions are the same (B, B)."""
    words = [caption for _, caption in items]
    tokens = clip.tokenize(words, SIZES["context_length"], SIZES["vocab_size"], truncate=True)
    same = torch.tensor([[float(a == b) for b in words] for a in words])       # (B, B)
    images = torch.stack([image for image, _ in items])                        # (B, 3, S, S)
    return images, tokens[:, :int(tokens.argmax(1).max()) + 1], same


class Clock:
    """Progress of a step that lasts some minutes, and the learning rate that goes with it."""

    def __init__(self, minutes, rise):
        self.start, self.seconds = time.time(), max(1e-9, 60 * minutes)
        self.steps, self.rise = 0, rise

    def tick(self, *optimizers):
        """Set the rates (half a cosine, times a rise over steps) -> share of the time gone by."""
        done, self.steps = (time.time() - self.start) / self.seconds, self.steps + 1
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["base"] * min(1, self.steps / self.rise) * max(
                0.01, 0.5 * (1 + math.cos(math.pi * min(1, done))))
        return done


def distil(model, teacher, loader, args, lr):
    """Teach the image tower's embedding and blocks to give what the teacher's give.

    A block starts from the teacher's tokens, ever more often from the tower's own, so that it
    learns to mend their errors. Losses are relative to the variance of the block's step. Matrices
    of the blocks are trained by Muon (Jordan et al. 2024), the rest by AdamW: ours, after trials of
    a few minutes that differed in batch size too, so not a clean comparison.
    """
    student = model.visual
    matrices = [p for p in student.transformer.parameters() if p.ndim == 2]
    others = [p for p in student.parameters() if all(p is not q for q in matrices)]
    optimizers = [torch.optim.Muon(matrices, weight_decay=0, adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0)]
    for optimizer in optimizers:
        optimizer.param_groups[0]["base"] = lr
    clock = Clock(args.distil_minutes, 50)
    for image in loader:
        done = clock.tick(*optimizers)
        if done >= 1:
            return
        pixels = clip.normalize(image.float() / 255)                           # (B, 3, S, S)
        with torch.autocast("cpu", torch.bfloat16, args.precision == "bf16"):
            with torch.no_grad():
                twice = F.interpolate(pixels, scale_factor=2, mode="bilinear")
                tokens = [teacher.embed(twice)]                                # [(B, 1 + N, Dv)]
                for block in teacher.transformer.resblocks[:len(student.transformer.resblocks)]:
                    tokens.append(block(tokens[-1]))
            own = student.embed(pixels)                                        # (B, 1 + N, Dv)
            losses = [(own - tokens[0]).square().mean() / tokens[0].var()]
            alone = (torch.rand(len(pixels), 1, 1) < 0.3 + 1.5 * done).float()     # (B, 1, 1)
            for block, before, after in zip(student.transformer.resblocks, tokens, tokens[1:]):
                own = block(alone * own + (1 - alone) * before)                # (B, 1 + N, Dv)
                losses.append((own - after).square().mean() / (after - before).var())
        student.zero_grad()
        sum(losses).backward()
        nn.utils.clip_grad_norm_(student.parameters(), 5.0)
        for optimizer in optimizers:
            optimizer.step()
        if clock.steps % 200 == 0:
            torch.save(model.state_dict(), args.out)
            print(f"distil {done:4.0%} step {clock.steps}  relative error of embedding and "
                  "blocks " + " ".join(f"{loss.item():.3f}" for loss in losses), flush=True)


def caption(model, loader, minutes, lr, lr_tower):
    """Contrast patches with captions; the tower moves slowly, its stem and head and texts fast."""
    slow = [p for name, p in model.visual.named_parameters()
            if not name.startswith(("stem", "proj", "ln_post"))]
    fast = [p for p in model.parameters() if all(p is not q for q in slow)]
    groups = [{"params": slow, "base": lr_tower}, {"params": fast, "base": lr}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.02)
    clock = Clock(minutes, 100)
    for image, tokens, same in loader:
        done = clock.tick(optimizer)
        if done >= 1:
            return
        patches = F.normalize(model.encode_patches(clip.normalize(image))[1], dim=-1)  # (B, N, D)
        text = F.normalize(model.encode_text(tokens), dim=-1)                  # (T, D)
        similarity = torch.einsum("bnd,td->btn", patches, text)                # (B, T, N)
        B, T, N = similarity.shape
        scale = model.logit_scale.exp().clamp(max=100)
        logits = scale * ecpl.pool_score(20 * similarity.flatten(0, 1), 0.1).view(B, T) / 20
        target = same / same.sum(dim=1, keepdim=True)                          # (B, T)
        loss = -((target * logits.log_softmax(1)).sum(1).mean()
                 + (target * logits.T.log_softmax(1)).sum(1).mean()) / 2
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if clock.steps % 100 == 0:
            right = same.gather(1, logits.argmax(dim=1, keepdim=True)).mean()
            print(f"captions {done:4.0%} step {clock.steps}  loss {loss.item():.3f}  "
                  f"right caption of {B}: {right.item():.0%}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--photos", required=True, help="folder of genuine photos")
    parser.add_argument("--teacher", help="pretrained CLIP to distil, a name or file of clip.load")
    parser.add_argument("--start", help="file to go on from: of this script, or of train.py")
    parser.add_argument("--out", default="runs/tiny.pt")
    parser.add_argument("--distil-minutes", type=float, default=45)
    parser.add_argument("--caption-minutes", type=float, default=8)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model, photos = clip.CLIP(**SIZES), sorted(Path(args.photos).iterdir())
    if args.start:
        model.load_state_dict(clip.load(args.start).state_dict(), strict=False)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    if args.teacher:
        teacher = clip.load(args.teacher).visual.requires_grad_(False)
        if teacher.proj.shape[0] != SIZES["vision_width"] or teacher.patch_size != 16:
            sys.exit(f"error: the teacher has width {teacher.proj.shape[0]} and patches of "
                     f"{teacher.patch_size} pixels, expected {SIZES['vision_width']} and 16: "
                     "leave out --teacher")
        crops = DataLoader(Crops(photos, args.batch, args.seed), batch_size=None, num_workers=1)
        distil(model, teacher, crops, args, lr=2e-3)
    pairs = Captioned(photos, size=64, count=10 ** 6, seed=args.seed)
    loader = DataLoader(pairs, batch_size=64, num_workers=1, collate_fn=collate)
    caption(model, loader, args.caption_minutes, lr=1e-3, lr_tower=2e-4 if args.teacher else 1e-3)
    torch.save(model.state_dict(), args.out)


if __name__ == "__main__":
    main()
