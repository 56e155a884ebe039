"""Inference: is a picture manipulated, and where? As a command and as a library.

    python infer.py photo.jpg FOLDER          maps, masks, overlays, results.csv, report.html
    infer.localize(infer.load(), "photo.jpg").decision

Shapes: h, w patch grid; H', W' pixels of the view; H, W pixels of the picture.
"""
import argparse
import csv
import html
import math
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter

import clip
import data
import ecpl
from data import BadInput

FORMAT = 6                 # of checkpoints
CAUTION = "Some genuine pictures are called manipulated: never decide by the score alone."


# ------------------------------------------------------------------------------------ checkpoint

def is_backbone(key):
    """Whether a key of SAPL's state dict is a weight of CLIP itself, not one that SAPL adds."""
    return key.startswith("clip.") and ".lora." not in key


def read_dict(path):
    """The dict in a file written by torch.save; {} if there is none."""
    try:
        with warnings.catch_warnings(action="ignore"):   # about TorchScript, OpenAI's format
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:                                    # a damaged file can raise anything
        return {}
    return state if isinstance(state, dict) else {}


def load_checkpoint(path):
    """The dict that train.save_checkpoint wrote, on the CPU; raises BadInput."""
    state = read_dict(path)
    version = state.get("format", "unknown")
    if version != FORMAT:
        found = f"{path} (format {version})" if Path(path).is_file() else f"no {path}"
        raise BadInput(f"found {found}, expected a checkpoint of train.py (format {FORMAT})")
    return state


def pick_device(name):
    """"auto", "cpu", "cuda", "cuda:1", "mps" or a torch.device -> an available torch.device."""
    present = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    present += ["mps", "cpu"] if torch.backends.mps.is_available() else ["cpu"]
    name = {"auto": present[0], "cuda": "cuda:0"}.get(str(name), str(name))
    if name not in present:
        raise BadInput(f"found --device {name}, expected one of auto, {', '.join(present)}")
    return torch.device(name)


def pick_dtype(precision, device):
    """"bf16", "fp32" or "auto" -> the dtype of matrix products. "auto" is bf16 where the hardware
    supports it: NVIDIA GPUs from Ampere on, CPUs with AVX512-BF16."""
    if precision not in ("auto", "bf16", "fp32"):
        raise BadInput(f"found --precision {precision}, expected auto, bf16 or fp32")
    has_bf16 = getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16")   # None: unknown
    if device.type == "cuda":
        has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
    short = precision == "bf16" or (precision == "auto" and has_bf16)
    return torch.bfloat16 if short else torch.float32


def load(checkpoint=None, device="auto", precision="auto"):
    """The ecpl.SAPL of a checkpoint (None: the shipped one) in eval mode; ValueError or OSError."""
    device = pick_device(device)
    state = load_checkpoint(checkpoint or clip.TINY)
    stored = state["clip"]                    # weights, or the name of an official CLIP
    tower = clip.load(stored["name"]) if "name" in stored else clip.build(stored)
    model = ecpl.SAPL(tower, state["config"])
    # CLIP already has its weights; the file must hold all others
    backbone = {key: x for key, x in model.state_dict().items() if is_backbone(key)}
    model.load_state_dict(backbone | state["model"])
    model.dtype = pick_dtype(precision, device)
    return model.to(device).eval()


# ------------------------------------------------------------------------------ picture -> answer

class Result(NamedTuple):
    """The answer for a picture of H x W pixels."""
    map: np.ndarray       # (H, W) float32 in [0, 1], 1 = manipulated
    mask: np.ndarray      # (H, W) bool, map > 0.5
    score: float          # of the whole picture, in [0, 1]
    decision: str         # "manipulated" if score > 0.5, else "genuine"
    area: float           # fraction of the picture in the mask, in [0, 1]


def tiles(length, size, shifted):
    """(start, end) of windows that cover `length`: the fewest of at most `size`, nearly equal; or
    shifted by half a window, with half a window at either end. A single window stays as it is."""
    count = math.ceil(length / size)
    edges = np.linspace(0, length, count + 1).astype(int)          # (count + 1,)
    if shifted and count > 1:
        edges = sorted({0, *(edges[:-1] + edges[1:]) // 2, length})
    return list(zip(edges[:-1], edges[1:]))


@torch.inference_mode()
def patch_logits(model, image):
    """image (3, H', W') in [0, 1] -> logits (h, w) on the CPU: the mean of two looks [ours]. The
    tower, trained on small pictures, attends poorly across large ones, so it sees windows of at
    most config["window"] pixels a side (0: no limit). At their borders it lacks context; the second
    look, at the mirror image, has its borders elsewhere."""
    p = model.cell
    _, H, W = image.shape
    size = model.config["window"] // p or max(H, W)
    image = image.to(model.bias.device)
    looks = torch.zeros(2, H // p, W // p)                         # (2, h, w)
    for look, source, shifted in zip(looks, (image, image.flip(2)), (False, True)):
        for top, bottom in tiles(H // p, size, shifted):
            for left, right in tiles(W // p, size, shifted):
                window = source[:, p * top:p * bottom, p * left:p * right]
                with model.autocast():
                    logits = model(window[None]).logits[0]         # (rows, columns)
                look[top:bottom, left:right] = logits
    return (looks[0] + looks[1].flip(1)) / 2


def logits_of(model, picture):
    """PIL RGB -> uncalibrated logits: relative map (H, W) and score (); raises BadInput."""
    W, H = picture.size
    view = data.view(picture, model.config["max_side"], model.cell)                # (3, H', W')
    grid = patch_logits(model, view)                               # (h, w)
    if not grid.isfinite().all():
        raise BadInput("found NaN or infinity in the map, expected numbers: try --precision fp32")
    score = ecpl.pool_score(grid.flatten()[None], model.config["rho"])[0]          # ()

    # Relative to the picture [ours]: its 20 % quantile becomes zero, and the more its map varies,
    # the more it takes to stand out. The factor 3 only sets the contrast.
    grid = ecpl.smooth(grid[None])                                 # (1, h, w)
    grid = 3 * (grid - grid.quantile(0.2)) / (grid.std(correction=0) + 0.5)
    map = F.interpolate(grid[None], view.shape[1:], mode="bilinear")               # (1, 1, H', W')
    width, height = data.reduced_size(picture.size, model.config["max_side"])
    map = map[..., :height, :width]                                # without the padding
    return F.interpolate(map, (H, W), mode="bilinear")[0, 0], score                # (H, W), ()


def localize(model, source):
    """A path, PIL image, array or tensor -> Result; raises BadInput. Arrays and CPU tensors: what
    Pillow takes, such as uint8 (H, W) or (H, W, 3), float32 (H, W); others raise another error."""
    if isinstance(source, (str, os.PathLike)):
        picture = data.open_image(source)
    elif isinstance(source, Image.Image):
        picture = data.to_rgb(source)
    else:
        picture = data.to_rgb(Image.fromarray(np.asarray(source)))
    map, score = logits_of(model, picture)
    map = (map - model.map_shift.cpu()).sigmoid().numpy()          # (H, W)
    score = (score - model.score_shift.cpu()).sigmoid().item()
    mask = map > 0.5                                               # (H, W)
    decision = "manipulated" if score > 0.5 else "genuine"
    return Result(map, mask, score, decision, float(mask.mean()))


# ------------------------------------------------------------------------------------ the command

COLUMNS = "path,decision,score,area,width,height,seconds,model,error".split(",")
REPORT = f"""<!doctype html><meta charset="utf-8"><title>SAPL report</title>
<meta name="viewport" content="width=device-width"><style>.manipulated{{color:#a00}}
body{{font:16px sans-serif}}figure{{margin:0;white-space:pre-wrap;overflow-wrap:anywhere}}
main{{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr));gap:1em}}
img{{width:100%;max-height:480px;object-fit:contain}}</style><p><b>{CAUTION}</b> Highest scores
first. In a picture called genuine, grey outlines what the map still marks.</p><main>
"""


def overlay(picture, result):
    """The picture (PIL RGB) with its mask tinted and outlined; only outlined if called genuine."""
    mask = Image.fromarray(result.mask).convert("L")
    radius = max(picture.size) // 800 + 1
    soft = np.asarray(mask.filter(ImageFilter.BoxBlur(radius)))    # (H, W)
    outline = Image.fromarray((0 < soft) & (soft < 255))
    canvas = picture.copy()
    canvas.paste("grey", mask=outline)
    if result.decision == "manipulated":
        canvas.paste("orangered", mask=mask.point(lambda value: 0.4 * value))
        canvas.paste("white", mask=outline)
    return canvas


def answer(model, path, out):
    """Localize one picture; write overlay, map and mask -> its row, plus `overlay` and `text`."""
    began = time.time()
    picture = data.open_image(path)
    result = localize(model, picture)
    images = {"overlay": overlay(picture, result),
              "map": Image.fromarray((255 * result.map + 0.5).astype(np.uint8)),
              "mask": Image.fromarray(result.mask).convert("L")}

    base = os.path.join(out, path.stem)
    number = 1
    while any(os.path.exists(f"{base}_{kind}.png") for kind in images):       # never overwrite
        number += 1
        base = os.path.join(out, f"{path.stem}~{number}")
    for kind, image in images.items():
        image.save(f"{base}_{kind}.png", compress_level=1)
    return {"decision": result.decision, "score": round(result.score, 4),
            "area": round(result.area, 4), "width": picture.width, "height": picture.height,
            "seconds": round(time.time() - began, 3), "overlay": f"{base}_overlay.png",
            "text": f"{result.decision}  score {result.score:.2f}  {result.area:.0%} marked"}


def figure(row):
    """A row as HTML, with its overlay; CSS puts high scores first."""
    text = html.escape(f"{row['text']}\n{row['path']}\n{row['model']}")
    link = quote(os.fsencode(os.path.basename(row["overlay"])))
    return (f'<figure class="{row["decision"]}" style="order:{-1000 * row["score"]:.0f}">'
            f'<a href="{link}"><img alt="" loading="lazy" src="{link}"></a>\n{text}</figure>\n')


def collect(words, out):
    """Files and folders -> pictures, each once, without our outputs in `out` (its real path)."""
    paths = {}                                                     # {real path: path}
    for word in words:
        for file in data.files_in(word) if os.path.isdir(word) else [Path(word)]:
            folder, name = os.path.split(os.path.realpath(file))
            if folder != out or not name.endswith(("_overlay.png", "_map.png", "_mask.png")):
                paths.setdefault((folder, name), file)
    if not any(path.is_file() for path in paths.values()):
        raise BadInput(f"found no picture at {' '.join(words)}, expected files or folders of them")
    return list(paths.values())


def run(args):
    """Answer all pictures, writing each row as soon as its picture is done -> exit status."""
    paths = collect(args.paths, os.path.realpath(args.out))
    model = load(args.checkpoint, args.device, args.precision)
    model_name = f"{Path(args.checkpoint).name} {clip.sha256_of(args.checkpoint)[:12]}"
    Path(args.out).mkdir(parents=True, exist_ok=True)
    # buffering=1: each line reaches the disk at once
    as_text = {"mode": "a", "buffering": 1, "encoding": "utf-8", "errors": "backslashreplace"}
    with open(Path(args.out, "results.csv"), **as_text) as table, \
            open(Path(args.out, "report.html"), **as_text) as report:
        rows = csv.DictWriter(table, COLUMNS, extrasaction="ignore", lineterminator="\n")
        if table.tell() == 0:
            rows.writeheader()
        if report.tell() == 0:
            report.write(REPORT)

        done = 0
        for path in paths:
            row = {"path": path, "model": model_name, "error": ""}
            try:
                row |= answer(model, path, args.out)
            except (BadInput, MemoryError, torch.OutOfMemoryError, OSError) as error:
                row["error"] = str(error).removeprefix(f"{path}: ") or type(error).__name__
            rows.writerow(row)
            if row["error"]:
                print(f"error: {path}: {row['error']}", file=sys.stderr)
                continue
            report.write(figure(row))
            print(f"{path}  {row['text']}  -> {row['overlay']}", flush=True)
            done += 1
    print(f"{done} of {len(paths)} done: {args.out}/report.html\n{CAUTION}", file=sys.stderr)
    return 0 if done == len(paths) else 1


def main(arguments=None):
    """The command line -> exit status."""
    parser = argparse.ArgumentParser(description="Find manipulated regions.", allow_abbrev=False)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="files and folders")
    parser.add_argument("--checkpoint", default=clip.TINY, help="best.pt (default: shipped)")
    parser.add_argument("--out", metavar="DIR", default="out", help="(default: out)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    parser.add_argument("--precision", default="auto", help="auto (bf16 if supported), bf16, fp32")
    try:
        return run(parser.parse_args(arguments))
    except (BadInput, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)   # Ctrl-C ends at once: finished rows are kept
    sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    sys.exit(main())
