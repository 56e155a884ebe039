"""Benchmark: how fast the parts are, each beside a named baseline of the same run. Run by hand.

    python tests/benchmark.py [train] [infer] [data]         all of them by default

Other programs disturb absolute numbers, so trust the ratios: what is compared takes turns, in one
thread, and the best of several runs counts; on a CPU, in processor time.
"""
import argparse
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np                                              # noqa: E402 (path first)
import torch                                                    # noqa: E402
from PIL import Image                                           # noqa: E402

import data                                                     # noqa: E402
import infer                                                    # noqa: E402
import train                                                    # noqa: E402
from evaluate import jpeg                                       # noqa: E402
from weights import synthesis                                   # noqa: E402

DEVICE = infer.pick_device("auto")
SIDE = 256                                 # of windows, pixels
LABELLED = 8                               # labelled windows per step
SPLICED = 4                                # further windows per step, spliced
SCENE = Image.open(Path(__file__).with_name("forged.png")).convert("RGB")


def turns(calls, repeats=5):
    """{name: call} -> {name: seconds of its fastest run}; all run in turns, after one to warm up.
    On a CPU: processor time of this process."""
    clock = time.process_time if DEVICE.type == "cpu" else time.perf_counter
    times = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            began = clock()
            call()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(clock() - began)
    return {name: min(seconds[1:]) for name, seconds in times.items()}


def row(what, amount, ratio, baseline):
    print(f"| {what} | {amount} | {ratio:.2f} | {baseline} |", flush=True)


def compare(what, count, unit, call, baseline, other):
    """A row: how many units a call makes per second, and how many times as fast as another."""
    best = turns({"call": call, "other": other})
    row(what, f"{count / best['call']:.0f} {unit}/s", best["other"] / best["call"], baseline)


def windows(count):
    """Windows (count, 3, SIDE, SIDE) uint8 of the scene."""
    pixels = torch.from_numpy(np.array(SCENE)).movedim(-1, 0)                  # (3, H, W)
    crops = [pixels[:, 4 * i:4 * i + SIDE, 8 * i:8 * i + SIDE] for i in range(count)]
    return torch.stack(crops).to(DEVICE)


def bench_train():
    """A training step that starts from the shipped model, in bf16 and fp32, and its parts."""
    args = train.make_parser().parse_args([])
    model = train.make_model(args).to(DEVICE).train()
    objective = train.Objective(model, args.hecl, np.array([0, 1])).to(DEVICE)
    optimizer = torch.optim.Adam([p for p in objective.parameters() if p.requires_grad])
    pixels = windows(LABELLED + SPLICED)
    labels = torch.tensor([0, 1] * (LABELLED // 2) + [0] * SPLICED, device=DEVICE)
    rng = np.random.default_rng(0)

    def batch():
        return train.make_batch(pixels, labels, SPLICED, model.cell, rng)

    def step(dtype):
        model.dtype = dtype
        image, targets, truth = batch()
        losses = objective(image, targets, truth)
        losses[0].backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def forward():
        model.dtype = torch.bfloat16
        with torch.no_grad(), model.autocast():
            model(pixels / 255)

    best = turns({"bf16": lambda: step(torch.bfloat16), "fp32": lambda: step(torch.float32),
                  "its splices and wear": batch, "a forward pass alone": forward})
    step_time = best.pop("bf16")
    row(f"training step, {len(pixels)} windows of {SIDE} px",
        f"{len(pixels) / step_time:.1f} pictures/s", best.pop("fp32") / step_time, "fp32")
    for name, seconds in best.items():
        row(name, f"{1000 * seconds:.0f} ms", seconds / step_time, "the step")


def bench_infer():
    """A one-megapixel photograph in bf16 and fp32."""
    photo = SCENE.resize((1184, 846))
    models = {name: infer.load(None, DEVICE, name) for name in ("bf16", "fp32")}
    best = turns({name: lambda m=model: infer.localize(m, photo) for name, model in models.items()})
    row("1 megapixel", f"{best['bf16']:.2f} s", best["fp32"] / best["bf16"], "fp32")


def bench_data():
    """Loading windows, beside Pillow alone; making splices, beside JPEG by Pillow alone."""
    with tempfile.NamedTemporaryFile(suffix=".jpg") as file:
        SCENE.save(file.name, quality=90)
        pictures = [data.Picture(Path(file.name), 0)] * 32
        loaded = data.TrainingSet(pictures, max_side=1024, cell=8, window=SIDE, seed=0)

        def decode():
            for picture in pictures:
                Image.open(picture.path).convert("RGB")

        compare(f"loading windows of {SIDE} px", 32, "pictures",
                lambda: [loaded[i] for i in range(32)], "decoding them with Pillow", decode)

    photos = windows(16).float()
    crop = SCENE.crop((0, 0, SIDE, SIDE))
    rng = np.random.default_rng(0)

    def splice():
        made = synthesis.splice(photos, photos.roll(1, 0), rng)
        synthesis.wear(made.image, rng)

    compare(f"splices of {SIDE} px, worn", 16, "pictures", splice,
            "JPEG by Pillow", lambda: [jpeg(crop, 80) for _ in photos])


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    topics = {"train": bench_train, "infer": bench_infer, "data": bench_data}
    parser.add_argument("topics", nargs="*", choices=["all", *topics], default="all")
    chosen = parser.parse_args().topics
    torch.set_num_threads(1)
    for topic, bench in topics.items():
        if "all" in chosen or topic in chosen:
            print(f"\n{topic}, {DEVICE}\n\n| what | amount | ratio | to |\n|---|---|---|---|")
            bench()


if __name__ == "__main__":
    main()
