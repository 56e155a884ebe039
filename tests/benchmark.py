"""How fast the parts are, each beside a named baseline. Run by hand.

    python tests/benchmark.py [clip] [train] [data] [infer]      all of them by default
    python tests/benchmark.py train infer --against DIR          `git worktree add DIR COMMIT` first
    python tests/benchmark.py infer --pictures FOLDER            does bf16 answer as fp32 does?

Other programs disturb, so only ratios mean something: what is compared runs in turns, the best of
several counts; on a CPU one thread, processor time.
"""
import argparse
import io
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

ROOT = Path(os.environ.get("SAPL_ROOT", Path(__file__).resolve().parents[1]))    # see `older`
sys.path.insert(0, str(ROOT))

import torch                                                    # noqa: E402 (path first)
from PIL import Image                                           # noqa: E402
from torch.utils.flop_counter import FlopCounterMode            # noqa: E402

import clip                                                     # noqa: E402
import data                                                     # noqa: E402
import ecpl                                                     # noqa: E402
import infer                                                    # noqa: E402
import train                                                    # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCHES = {64: 64, 128: 16}                      # {side in pixels: pictures}
SCENE = Path(__file__).with_name("forged.png")


def turns(calls, repeats=6):
    """{name: call} -> {name: least seconds of one}, all in turns, after one to warm up. On a CPU:
    of this process alone. A call that answers with a float has measured itself, see `older`."""
    clock = time.process_time if DEVICE.type == "cpu" else time.perf_counter
    times = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            began = clock()
            answer = call()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(answer if isinstance(answer, float) else clock() - began)
    return {name: min(seconds[1:]) for name, seconds in times.items()}


def row(what, amount, ratio, baseline):
    print(f"| {what} | {amount} | {ratio:.2f} | {baseline} |", flush=True)


def compare(what, count, unit, call, baseline, other):
    """A row: how many of a unit a call makes a second, and how many times as fast as another."""
    best = turns({"call": call, "other": other})
    row(what, f"{count / best['call']:.0f} {unit}/s", best["other"] / best["call"], baseline)


def there_and_back(function, leaves):
    """A call that computes function() in bf16, then its gradients for the tensors `leaves`."""
    def call():
        with torch.autocast(DEVICE.type, torch.bfloat16):
            answer = function()
        torch.autograd.grad(answer.float().sum(), leaves, allow_unused=True)
    return call


def peak(what, call):
    """A row: the speed of a call's matrix products, convolutions not counted, and of a bare one."""
    with FlopCounterMode(display=False) as counter:
        call()
    counts = counter.get_flop_counts()["Global"]
    operations = sum(count for name, count in counts.items() if "convolution" not in str(name))
    matrix = torch.randn(2048, 2048, device=DEVICE, dtype=torch.bfloat16)
    best = turns({"call": call, "product": lambda: matrix @ matrix})
    ratio = operations / best["call"] / (2 * 2048 ** 3 / best["product"])
    row(what, f"{operations / best['call'] / 1e9:.0f} GFLOP/s", ratio, "2048 x 2048 x 2048 in bf16")


def plainly(call):
    """The same call with attention and OpenAI's cheap GELU as most code has them."""
    def attend(q, k, v, causal):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

    def mlp(self, x):
        hidden = self.c_fc(x)                                                  # (B, L, 4D)
        return self.c_proj(hidden * torch.sigmoid(1.702 * hidden))             # (B, L, D)

    def run():
        attention = mock.patch.object(clip, "attend", attend)
        with attention, mock.patch.object(clip.MLP, "forward", mlp):
            call()
    return run


def bench_clip(args):
    """Attention, image tower and prompts of the shipped size, forward and backward in bf16."""
    for shape in ((16, 3, 257, 64), (64, 3, 65, 64), (32, 2, 21, 64)):
        causal = shape[2] == 21                                                # as prompts are
        qkv = torch.randn(3, *shape, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        call = there_and_back(lambda: clip.attend(*qkv, causal), [qkv])
        compare(f"attend {shape}", 1, "calls", call, "scaled_dot_product_attention", plainly(call))

    model = clip.load("tiny", DEVICE)
    for side, count in BATCHES.items():
        pixels = torch.randn(count, 3, side, side, device=DEVICE)
        call = there_and_back(lambda: model.visual(pixels), list(model.visual.parameters()))
        compare(f"image tower, {side} px", count, "pictures", call,
                "the same with that and x * sigmoid(1.702 x)", plainly(call))
        peak("its matrix products", call)

    prompts = torch.randn(32, 77, len(model.ln_final.weight), device=DEVICE, requires_grad=True)
    short = there_and_back(lambda: model.encode_prompts(prompts[:, :20], 19), [prompts])
    long = there_and_back(lambda: model.encode_prompts(prompts, 76), [prompts])
    compare("prompts of 20 tokens", 32, "prompts", short, "of 77 tokens", long)


def training(side):
    """The shipped model, image tower trained -> what `make_step` needs, random pictures."""
    image = torch.rand(BATCHES[side], 3, side, side, device=DEVICE)
    labels = torch.arange(len(image), device=DEVICE) % 2
    if not hasattr(ecpl, "SAPL"):                            # the first edition, commit 7b49a87
        config = train.Config(clip="tiny", tune="full")
        run = train.Run(config, device=DEVICE)
        objective = train.Objective(run.model, run.hecl, config, 1.0)
        return objective.to(DEVICE), run.optimizer, image, labels

    config = train.Config(clip="tiny")
    run = train.Run(config, None, ())
    run.model.clip.visual.requires_grad_(True)
    objective = train.Objective(run.model, run.hecl, config.hecl, 1.0).to(DEVICE)
    trained = [p for p in objective.parameters() if p.requires_grad]
    return objective, torch.optim.AdamW(trained, fused=True), image, labels


def make_step(objective, optimizer, image, labels, in_bf16=True):
    """A call that makes a whole step; it leaves its gradients there."""
    def step():
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=in_bf16):
            losses = objective(image, labels, 1.0)
        losses[0].backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
    return step


def parts_of_step(objective, optimizer, image, labels):
    """{part of a step: a call of it alone}, on what the other parts give it."""
    model = objective.model
    pixels = clip.normalize(image)                                             # (B, 3, H, W)
    h, w = model.clip.visual.grid(pixels)
    with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16):
        levels, _ = model.clip.encode_patches(pixels, model.config["levels"])  # [(B, N, Dv)]
        found = model(image)
    logits = found.logits.flatten(1)                                           # (B, N)
    depths = [z.requires_grad_() for z in found.depths]                        # [(B, N, D)]
    leaves = depths + [p for p in objective.parameters() if p.requires_grad]
    return {
        "image tower": there_and_back(lambda: model.clip.visual(pixels), leaves),
        "edges": lambda: ecpl.pool_edges(ecpl.soft_edges(image), h, w),
        "ECPL": there_and_back(lambda: model.ecpl(model.clip, levels, found.edges, h, w), leaves),
        "HECL": there_and_back(lambda: objective.hecl(depths, found.edges, logits, labels), leaves),
        "optimizer": optimizer.step,
    }


def bench_train(args):
    """A training step of the shipped model beside others, and what it is made of."""
    for side, count in BATCHES.items():
        setting = training(side)
        step = make_step(*setting)
        others = {"fp32": make_step(*setting, in_bf16=False)}
        if args.against:
            others[args.against] = older(args.against, "train", side)
        best = turns({"step": step} | others | parts_of_step(*setting))

        whole = best.pop("step")
        for name in others:
            row(f"step of {count} pictures, {side} px", f"{count / whole:.0f} pictures/s",
                best.pop(name) / whole, name)
        peak("its matrix products", step)
        best["the rest"] = whole - sum(best.values())
        for name, seconds in best.items():
            row(f"of it {name}", f"{1000 * seconds:.0f} ms", seconds / whole, "the step")


def bench_data(args):
    """Training pictures beside a loop that only decodes, resizes and makes a tensor."""
    from weights import synthesis                            # an older checkout has none
    file = io.BytesIO()
    Image.open(SCENE).save(file, "JPEG", quality=90)
    for side in BATCHES:
        pairs = synthesis.PairSet([file], size=side, count=64, seed=0)
        labelled = data.TrainingSet([(file, 0)] * 64, size=side, seed=0, cache=0)

        def loop():
            for _ in range(64):
                data.to_tensor(Image.open(file).convert("RGB").resize((side, side)))

        compare(f"synthesis, {side} px", 32, "pairs", lambda: [pairs[i] for i in range(64)],
                "64 pictures of a plain Pillow loop", loop)
        compare(f"labelled, {side} px", 64, "pictures", lambda: [labelled[i] for i in range(64)],
                "64 pictures of a plain Pillow loop", loop)


def answering(*precision):
    """The shipped model, and a call of it for a picture of a megapixel."""
    model = infer.SAPL.load(None, DEVICE, *precision)
    photo = Image.open(SCENE).resize((1184, 846))
    return model, lambda: model.localize(photo)


def bench_infer(args):
    """A photo of a megapixel in bf16 and fp32; how far both agree on pictures."""
    half, call = answering("bf16")
    full, slow_call = answering("fp32")
    others = {"fp32": slow_call}
    if args.against:
        others[args.against] = older(args.against, "infer", 0)
    best = turns({"bf16": call} | others)
    for name in others:
        row("1 megapixel", f"{best['bf16']:.2f} s", best[name] / best["bf16"], name)

    if args.pictures:
        pictures, _ = data.read_set(args.pictures, masks=False)
        answers = [(half.localize(each.path), full.localize(each.path)) for each in pictures]
        apart = max(abs(a.score - b.score) for a, b in answers)
        differ = len([a for a, b in answers if a.decision != b.decision])
        print(f"\n{len(pictures)} pictures in bf16 and fp32: scores differ by {apart:.4f} at most, "
              f"{differ} decisions differ")


def older(folder, topic, side):
    """A call of an older checkout -> its seconds: this script, with the other's modules."""
    command = [sys.executable, __file__, topic, "--once", str(side)]
    variables = os.environ | {"SAPL_ROOT": folder}
    return lambda: float(subprocess.check_output(command, env=variables))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    topics = {"clip": bench_clip, "train": bench_train, "data": bench_data, "infer": bench_infer}
    parser.add_argument("topics", nargs="*", choices=topics, default=list(topics))
    parser.add_argument("--against", metavar="DIR", help="an older checkout")
    parser.add_argument("--pictures", metavar="FOLDER", help="to compare bf16 with fp32 on")
    parser.add_argument("--once", type=int, help=argparse.SUPPRESS)          # see `older`
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.once is not None:
        call = make_step(*training(args.once)) if args.topics == ["train"] else answering()[1]
        print(turns({"older": call}, repeats=3)["older"])
        return
    for topic in args.topics:
        print(f"\n{topic}, {DEVICE}\n\n| what | amount | ratio | to |\n|---|---|---|---|")
        topics[topic](args)


if __name__ == "__main__":
    main()
