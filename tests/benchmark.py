"""Speed of each part: python tests/benchmark.py [clip] [data] [infer] [train]"""
import copy
import dataclasses
import functools
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils import parametrize

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import clip                                                     # noqa: E402 (path first)
import data                                                     # noqa: E402
import infer                                                    # noqa: E402


def bench_clip(layers=12, width=768):
    """CLIP with random ViT-B/16 weights, as ratios: image tower, short prompts, reading a file.

    Times are the best of several, taken in turns. The other image tower has the same weights in
    nn.MultiheadAttention, batch first and without attention weights: PyTorch's fastest form.
    """
    import subprocess
    import tempfile
    import warnings
    from test_clip import Official                # a module with OpenAI's names that can be traced
    device = infer.pick_device("auto")
    big = device.type == "cuda"
    torch.manual_seed(0)
    model = clip.CLIP(embed_dim=512, image_resolution=224, vision_layers=layers, vision_width=width,
                      vision_patch_size=16, context_length=77, vocab_size=49408, transformer_width=512,
                      transformer_layers=layers).eval().requires_grad_(False)
    print(f"\nCLIP on {device}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}")

    class Torchs(torch.nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x, x, x, need_weights=False)[0]

    plain = copy.deepcopy(model.visual)
    for block in plain.transformer.resblocks:
        attention = Torchs(width, width // 64, batch_first=True).eval().requires_grad_(False)
        attention.load_state_dict(block.attn.state_dict())
        block.attn = attention

    def turns(*calls, repeats=5):
        """Shortest seconds of each call, in turns, so that a busy machine disturbs all alike."""
        rounds = [[best_time(call, device, 1) for call in calls] for _ in range(repeats)]
        return [min(times) for times in zip(*rounds)]

    with torch.inference_mode():
        for side, batch in ((224, 256 if big else 2), (448, 64 if big else 1)):
            pixels = torch.randn(batch, 3, side, side, device=device)
            ours, theirs = model.visual.to(device), plain.to(device)
            assert torch.allclose(ours(pixels[:1]), theirs(pixels[:1]), atol=1e-3)
            a, b = turns(lambda: ours(pixels), lambda: theirs(pixels))
            print(f"  image tower at {side}: {batch / a:.2f} pictures/s, {b / a:.2f} x nn.MultiheadAttention")
        prompts = torch.randn(256 if big else 4, 77, 512, device=device)
        model.to(device)
        a, b = turns(lambda: model.encode_prompts(prompts[:, :20], 19), lambda: model.encode_prompts(prompts, 76))
        print(f"  prompts of 20 tokens: {len(prompts) / a:.1f}/s, {b / a:.2f} x those of 77")
        if big:
            pixels = torch.randn(256, 3, 224, 224, device=device, dtype=torch.bfloat16)
            matrix = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
            tower = copy.deepcopy(model.visual).bfloat16()
            a, b = turns(lambda: tower(pixels), lambda: matrix @ matrix)
            products = 2 * 197 * layers * width * (12 * width + 2 * 197) * len(pixels)
            print(f"  bf16: {len(pixels) / a:.0f} pictures/s, {products / a / 1e12:.0f} TFLOP/s of matrix "
                  f"products, {100 * products / a * b / (2 * 8192 ** 3):.0f} % of a plain product's")
    model, device = model.cpu(), torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = f"{folder}/clip.pt"
        torch.jit.save(torch.jit.trace(Official(model.state_dict()), torch.zeros(1)), path)
        size = 4 * sum(p.numel() for p in model.parameters())
        del model, plain
        a, b, c = turns(lambda: clip.read_archive(path), lambda: torch.jit.load(path).state_dict(),
                        lambda: clip.load(path), repeats=3)
        print(f"  archive of {Path(path).stat().st_size >> 20} MiB: read in {a:.2f} s, {b / a:.2f} x as fast as "
              f"torch.jit.load; into an fp32 model with its hash {c:.2f} s")
        memory = "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"     # KiB
        code = f"import clip; {memory}; model = clip.load({path!r}); {memory}"
        before, after = map(int, subprocess.run([sys.executable, "-c", code], cwd=Path(clip.__file__).parent,
                                                capture_output=True, text=True).stdout.split())
        print(f"  memory to load it: {1024 * (after - before) / size:.2f} x the weights in fp32 ({size >> 20} MiB)")


def bench_data(size=224, photos=48):
    """Pictures/s of one core: synthesis, and labelled files beside a plain Pillow loop; memory of an epoch."""
    import io
    from PIL import Image
    rng = np.random.default_rng(0)
    files = []
    for _ in range(photos):                       # drawn photos of 480x320, JPEG quality 90
        coarse = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).resize((480, 320))
        files.append(io.BytesIO())
        data.add_noise(coarse, 6, rng).save(files[-1], "JPEG", quality=90)
    arrays = [np.asarray(data.open_image(file)) for file in files]

    def rate(make, count):
        start = time.process_time()
        for i in range(count):
            make(i)
        return count / (time.process_time() - start)

    def plain(i):
        picture = Image.open(files[i % photos]).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    print("\nSynthesis, pairs/s and core:", end="")
    for side in (64, 128, 224, 256):
        pairs = data.SynthesisSet(arrays, size=side, count=800, seed=0)
        print(f"  {side} px {rate(lambda i: (pairs[2 * i], pairs[2 * i + 1]), 200):.0f}", end="")
    pairs = [(file, i % 2) for i, file in enumerate(files)]
    print(f"\nLabelled pictures to {size} px, pictures/s and core:")
    print(f"  plain Pillow loop (decode, resize, tensor)     {rate(plain, 400):6.0f}")
    for words, options in {"decode, window, tensor": dict(reencode=False, cache=0),
                           "decode, window, re-encode, tensor": dict(cache=0),
                           "the same, decoded pictures in memory": dict(cache=1000)}.items():
        items = data.TrainingSet(pairs, size=size, seed=0, **options)
        print(f"  {words:46} {rate(lambda i: items[i % photos], 400):6.0f}")
    synthetic = data.SynthesisSet(arrays, size=64, count=4000, seed=0)
    peak = []
    for half in range(2):
        for i in range(2000):
            synthetic[2000 * half + i]
        peak.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
    print(f"  peak memory after half an epoch and a whole one (4000 pictures): {peak[0]} MiB, {peak[1]} MiB")
    for workers in (0, 1, 2):
        loader = torch.utils.data.DataLoader(synthetic, batch_size=100, num_workers=workers)
        start = time.perf_counter()
        for _ in loader:
            pass
        print(f"  {workers} worker processes: {len(synthetic) / (time.perf_counter() - start):.0f} pictures/s at 64 px")
    torch.set_num_threads(threads)


def bench_infer(checkpoint=None):
    """Inference: seconds for 1 and 4 megapixels, whole and tiled; a folder beside the bare network.

    Without a checkpoint: the shipped model, or random weights of its size if there is none.
    """
    if checkpoint or infer.SHIPPED.exists():
        model = infer.SAPL.load(checkpoint)
    else:
        tower = clip.CLIP(embed_dim=192, image_resolution=224, vision_layers=6, vision_width=192, context_length=77,
                          vision_patch_size=16, vocab_size=514, transformer_width=192, transformer_layers=3)
        model = infer.SAPL(tower, dict(levels=(2, 4, 6), context=8, class_words=("ge", "ma"), edge_source="image",
                                       prompts="enhanced", dense="plain", rho=0.1, zoom=1, tune="none", max_side=1024)).eval()
    device = model.ecpl.bias.device
    print(f"\nInference on {device}, {torch.get_num_threads()} threads, views of at most {model.config['max_side']}")
    photo = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    for width, height in ((1200, 800), (2400, 1600)):
        picture = data.Image.fromarray(photo).resize((width, height))
        for tiles in (False, True):
            seconds = best_time(lambda: model.localize(picture, tiles=tiles), device, 2 if not tiles else 1)
            print(f"  {width}x{height} {'tiles' if tiles else 'whole'}: {seconds:.2f} s")
    pictures = [data.Image.fromarray(photo).resize((448, 320)) for _ in range(48)]
    images = [model.view(picture)[1] for picture in pictures]
    bare = best_time(lambda: [list(model.predict(images[k:k + infer.BATCH])) for k in range(0, 48, infer.BATCH)],
                     device, 2)
    whole = best_time(lambda: list(infer.stream(model, pictures, infer.open_picture, False, False)), device, 2)
    print(f"  448x320: bare network {48 / bare:.1f} pictures/s, from picture to map {48 / whole:.1f} "
          f"({whole / bare:.2f} times as long)")
    print(f"  peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


def bench_train(device="auto"):
    """Training: pictures/s, where a step's time goes, memory; beside a plain loop.

    LoRA and HECL as in the defaults, random weights, 224 pixels. The plain loop: prompts padded to
    77 tokens, nn.MultiheadAttention with its attention weights, LoRA added to its weights in
    all blocks. Times are the best of 8.
    """
    import train
    device = infer.pick_device(device)
    big = torch.cuda.is_available() and device.type == "cuda"
    sizes = {"small": dict(embed_dim=192, vision_layers=6, vision_width=192, transformer_width=192,
                           transformer_layers=3),
             "ViT-B/16": dict(embed_dim=512, vision_layers=12, vision_width=768,
                              transformer_width=512, transformer_layers=12)}
    print(f"\nTraining on {device}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}")
    for name, size in sizes.items():
        batch = (64 if big else 8) if name == "small" else (32 if big else 2)
        depth = size["vision_layers"]
        # class words of 2 bytes: as many tokens as the usual words have in CLIP's own vocabulary
        config = train.Config(batch=batch, levels=(depth // 3, 2 * depth // 3, depth),
                              class_words=("ge", "ma"))
        settings = vars(config)

        def objective(plain=False, hecl=0.1, lora_share=config.lora_share):
            torch.manual_seed(0)
            tower = clip.CLIP(**size, image_resolution=224, vision_patch_size=16,
                              context_length=77, vocab_size=514)
            if plain:
                make_plain(tower)
            model = infer.SAPL(tower, settings | {"lora_share": lora_share,
                                                  "tune": "none" if plain else "lora"})
            if plain:
                for block in tower.visual.transformer.resblocks:
                    for module, weight in ((block.attn, "in_proj_weight"), (block.attn.out_proj, "weight")):
                        parametrize.register_parametrization(module, weight, AddedLoRA(getattr(module, weight)))
            loss = train.HECL([size["embed_dim"]] * 3, dim=64, queue=1024, tau=0.1, share=0.4,
                              top=4, clean=0.5)
            used = dataclasses.replace(config, hecl=hecl)
            return train.Objective(model, loss, used, 1.0).to(device).train()

        image = torch.rand(batch, 3, 224, 224, device=device)
        labels = torch.arange(batch, device=device) % 2
        cast = functools.partial(torch.autocast, device.type, torch.bfloat16, big)

        def step(part, loss):
            def run():
                with cast():
                    value = loss(part)
                value.backward()
            return run

        def loss(o):
            return o(image, labels, 1.0)[0]

        part, bare = objective(), objective(hecl=0.0)
        whole = best_time(step(part, loss), device)
        without = best_time(step(bare, loss), device)
        towers = best_time(step(bare, lambda o: sum(x.float().mean() for x in flat(
            o.model.clip.encode_patches(clip.normalize(image), config.levels)))), device)
        weights = [p for p in part.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights)
        update = best_time(optimizer.step, device)
        photo = np.random.default_rng(0).integers(0, 256, (320, 480, 3), dtype=np.uint8)
        pictures = data.TrainingSet([(photo, 0)] * batch, size=224, seed=0)
        loading = best_time(lambda: [pictures[i] for i in range(batch)], torch.device("cpu"))
        rest = [("towers", towers), ("ECPL", without - towers), ("HECL", whole - without),
                ("optimizer", update)]
        memory = torch.cuda.max_memory_allocated() / 1e9 if big else \
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        every = best_time(step(objective(lora_share=1.0), loss), device)
        plain = best_time(step(objective(plain=True), loss), device)

        @torch.no_grad()
        def validate(memo):
            with cast():
                return bare.model(image, memo)

        kept = {}
        first, again = (best_time(lambda: validate(memo), device) for memo in (None, kept))
        total, every, plain = whole + update, every + update, plain + update
        print(f"{name:9} batch {batch}: {batch / total:7.1f} pictures/s, plain loop "
              f"{batch / plain:.1f} ({plain / total:.2f}x), LoRA in all blocks {batch / every:.1f} "
              f"({plain / every:.2f}x); step {1000 * total:.0f} ms = "
              + ", ".join(f"{key} {100 * value / total:.0f} %" for key, value in rest)
              + f"; data {1000 * loading:.0f} ms; peak memory {memory:.1f} GB; validation with what "
              f"the frozen blocks made of it last time: {first / again:.1f}x")
        if big:
            macs = batch * 196 * depth * 12 * size["vision_width"] ** 2
            print(f"          image tower's matrix products: {6 * macs / total / 1e12:.0f} TFLOP/s")


def flat(levels_and_features):
    """(levels, features) of encode_patches -> one list."""
    levels, features = levels_and_features
    return [*levels, features]


def best_time(call, device, repeats=8):
    """Shortest seconds of a call, after one to warm up. On one CPU thread processor time is taken,
    which other programs disturb less."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    times, clock = [], time.process_time if alone else time.perf_counter
    for _ in range(repeats + 1):
        began = clock()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - began)
    return min(times[1:])


class AddedLoRA(clip.LoRA):
    """LoRA as a change of the weight, for layers that do not show their linear maps."""
    def __init__(self, weight):
        super().__init__(weight.detach(), rank=8, alpha=16.0)

    def forward(self, weight):
        return weight + self.scale * self.B @ self.A                                  # (rows, columns)


class PlainAttention(torch.nn.MultiheadAttention):
    """What most CLIP code uses: sequence first, attention weights computed and thrown away."""

    def forward(self, x, dense="plain"):
        x = x.transpose(0, 1)                                                         # (L, B, D)
        L = len(x)
        mask = x.new_full((L, L), float("-inf")).triu(1) if self.causal else None          # (L, L)
        return super().forward(x, x, x, attn_mask=mask)[0].transpose(0, 1)            # (B, L, D)


def make_plain(model):
    """Give a CLIP plain attention and prompts padded to the whole context."""
    for tower in (model.visual.transformer, model.transformer):
        for block in tower.resblocks:
            attention = PlainAttention(block.ln_1.weight.numel(), block.attn.heads)
            attention.load_state_dict(block.attn.state_dict())
            attention.causal = block.attn.causal
            block.attn = attention
    short = model.encode_prompts
    pad = torch.nn.functional.pad
    model.encode_prompts = lambda x, end: short(pad(x, (0, 0, 0, 77 - x.shape[1])), end)


if __name__ == "__main__":
    chosen = sys.argv[1:] or ["clip", "data", "infer", "train"]
    for part in chosen:
        if f"bench_{part}" in globals():
            globals()[f"bench_{part}"]()
