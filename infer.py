"""Inference: is a picture manipulated, and where? A command, and functions for a library.

    python infer.py photo.jpg FOLDER          maps, masks, overlays, results.csv, report.html
    infer.localize(infer.load(), "photo.jpg").decision

Shapes: h, w patch grid; H', W' pixels of the view; H, W pixels of the picture.
"""
import argparse
import csv
import html
import itertools
import math
import os
import pickle
import signal
import sys
import time
import warnings
import zlib
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

if __name__ == "__main__":                    # Ctrl-C while torch is imported: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np                                                       # noqa: E402
import torch                                                             # noqa: E402
import torch.nn.functional as F                                          # noqa: E402
from PIL import Image, ImageFilter                                       # noqa: E402

import clip                                                              # noqa: E402
import data                                                              # noqa: E402
import ecpl                                                              # noqa: E402
from data import BadInput                                                # noqa: E402

FORMAT = 5                 # of checkpoints
MIN_SIDE = 16              # pixels: a smaller picture has nothing to compare
CAUTION = ("A score is not a proof: genuine pictures are called manipulated too. "
           "Never decide by it alone.")


# ------------------------------------------------------------------------------------ checkpoint

def is_backbone(key):
    """Whether a key of SAPL's state dict is a weight of CLIP itself, not of ECPL or LoRA."""
    return key.startswith("clip.") and ".lora." not in key


def read_dict(path):
    """The dict that torch.save wrote into a file; {} if it holds, or is, something else."""
    try:
        with warnings.catch_warnings(action="ignore"):   # about TorchScript, OpenAI's format
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError,
            AssertionError, pickle.UnpicklingError):     # all seen from torch.load on damaged files
        return {}
    return state if isinstance(state, dict) else {}


def is_checkpoint(path):
    """Whether a file holds a SAPL, in any format, and not only a CLIP."""
    return "format" in read_dict(path)


def load_checkpoint(path):
    """The dict of a checkpoint of train.py, on the CPU; BadInput of one line."""
    if not Path(path).is_file():
        raise BadInput(f"found no {path}, expected a checkpoint of train.py: check the path")
    state = read_dict(path)
    if "format" not in state:
        raise BadInput(f"found {path}, damaged or no checkpoint, expected one of train.py: name "
                         "its best.pt")
    if state["format"] != FORMAT:
        raise BadInput(f"found {path} in format {state['format']}, expected format {FORMAT}: it "
                         "is of another version, train it again")
    return state


def pick_device(name):
    """"auto", "cpu", "cuda", "cuda:1", "mps" or a torch.device -> a torch.device that is there."""
    present = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    present += ["mps", "cpu"] if torch.backends.mps.is_available() else ["cpu"]
    name = {"auto": present[0], "cuda": "cuda:0"}.get(str(name), str(name))
    if name not in present:
        raise BadInput(f"found --device {name}, expected one of auto, {', '.join(present)}")
    return torch.device(name)


def has_bf16(device):
    """Whether the hardware multiplies bf16: NVIDIA from Ampere on, CPUs with AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # private functions of torch; if one is missing, bool() answers False
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in names)


def pick_dtype(precision, device):
    """"auto" (bf16 where the hardware has it), "bf16" or "fp32" -> the dtype of matrix products."""
    if precision not in ("auto", "bf16", "fp32"):
        raise BadInput(f"found --precision {precision}, expected auto, bf16 or fp32")
    short = precision == "bf16" or precision == "auto" and has_bf16(device)
    return torch.bfloat16 if short else torch.float32


def load(checkpoint=None, device="auto", precision="auto"):
    """The ecpl.SAPL of a checkpoint (None: the shipped one) in eval mode; ValueError or OSError of
    one line."""
    device = pick_device(device)
    dtype = pick_dtype(precision, device)
    state = load_checkpoint(checkpoint or clip.TINY)
    stored = state["clip"]                    # weights, or name and hash of an official CLIP
    tower = clip.load(stored["name"]) if "name" in stored else clip.build(stored)
    tower.name = state["config"]["clip"]
    tower.sha256 = stored.get("sha256", "")
    model = ecpl.SAPL(tower, state["config"])

    # the CLIP has its weights already; all others must be in the file
    backbone = {key: x for key, x in model.state_dict().items() if is_backbone(key)}
    model.load_state_dict(backbone | state["model"])
    model.dtype = dtype
    return model.to(device).eval()


# ------------------------------------------------------------------------------ picture -> answer

class Result(NamedTuple):
    """The answer for a picture of H x W pixels."""
    map: np.ndarray       # (H, W) float32 in [0, 1], 1 = manipulated
    mask: np.ndarray      # (H, W) bool, map > 0.5
    score: float          # of the whole picture, in [0, 1]
    decision: str         # "manipulated" if score > 0.5, else "genuine"
    area: float           # fraction of the picture in the mask, in [0, 1]


def tiles(length, size):
    """(start, end) of the fewest windows of at most `size`, equally long, that cover `length`."""
    ends = np.linspace(0, length, math.ceil(length / size) + 1).round().astype(int).tolist()
    return list(zip(ends, ends[1:]))


@torch.inference_mode()
def patch_logits(model, image, looks=2):
    """image (3, H', W') in [0, 1] -> (h, w) on the CPU: the mean of two looks at each window, one
    of them mirrored [ours]. looks=1: without the mirrored one.

    A tower trained on small pictures attends badly across large ones. So windows have at most
    config["window"] pixels a side; 0: the whole image.
    """
    p = model.cell
    _, H, W = image.shape
    size = model.config["window"] // p or max(H, W)
    grid = torch.zeros(H // p, W // p)                             # (h, w)
    for (top, bottom), (left, right) in itertools.product(tiles(H // p, size), tiles(W // p, size)):
        window = image[:, p * top:p * bottom, p * left:p * right].to(model.bias.device)
        views = torch.stack([window, window.flip(2)][:looks])      # (looks, 3, .., ..)
        with model.autocast():
            logits = model(views).logits.float()                   # (looks, rows, columns)
        logits[1:] = logits[1:].flip(2)                            # back into place
        grid[top:bottom, left:right] = logits.mean(dim=0)          # (rows, columns)
    return grid


def logits_of(model, picture):
    """PIL RGB -> logits of the map (H, W), relative to their mean, and of the score (), before
    calibration; BadInput of one line."""
    if min(picture.size) < MIN_SIDE:
        raise BadInput(f"found {picture.width} x {picture.height} pixels, expected at least "
                         f"{MIN_SIDE} a side: there is nothing to compare in it")
    max_side = model.config["max_side"]
    view = data.view(picture, max_side, model.cell)                # (3, H', W')
    grid = patch_logits(model, view)                               # (h, w)
    if not grid.isfinite().all():
        raise BadInput("found NaN or infinity as the answer, expected numbers: the checkpoint is "
                         "damaged, or try --precision fp32")
    score = ecpl.pool_score(grid.flatten()[None], model.config["rho"])[0]          # ()

    grid = ecpl.smooth(grid[None] - grid.mean())   # (1, h, w): a constant offset does not localize
    map = F.interpolate(grid[None], view.shape[1:], mode="bilinear")               # (1, 1, H', W')
    width, height = data.reduced_size(picture.size, max_side)
    map = map[..., :height, :width]                                # without the padding
    if (width, height) != picture.size:
        map = F.interpolate(map, picture.size[::-1], mode="bilinear")              # (1, 1, H, W)
    return map[0, 0], score


def localize(model, source):
    """A path, or a PIL image, array or tensor that data.to_picture reads -> Result; BadInput of
    one line."""
    from_file = isinstance(source, (str, os.PathLike))
    picture = data.open_image(source) if from_file else data.to_picture(source)
    map, score = logits_of(model, picture)
    map = (map - model.map_shift.cpu()).sigmoid().numpy()          # (H, W)
    score = (score - model.score_shift.cpu()).sigmoid().item()
    mask = map > 0.5                                               # (H, W)
    decision = "manipulated" if score > 0.5 else "genuine"
    return Result(map, mask, score, decision, float(mask.mean()))


# ----------------------------------------------------------------------------- outputs for people

HEADER = "path,decision,score,area,width,height,seconds,model,error"
REPORT = f"""<!doctype html><meta charset="utf-8"><title>SAPL report</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body{{font:16px sans-serif;margin:1em}}figure{{margin:0;overflow-wrap:anywhere}}
main{{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr));gap:1em}}
img{{width:100%;max-height:480px;object-fit:contain}}.manipulated{{color:#a00}}
</style><h1>SAPL report</h1><p><b>{CAUTION}</b> Highest scores first.</p><main>
"""


def overlay(picture, result):
    """The picture (PIL RGB) with its mask tinted and outlined if it is called manipulated, else
    with a thin grey outline alone."""
    mask = Image.fromarray(result.mask).convert("L")
    thickness = max(picture.size) // 800 + 1
    canvas = picture.copy()
    lines = {"grey": thickness}
    if result.decision == "manipulated":
        canvas.paste("orangered", mask=mask.point(lambda value: 0.4 * value))
        lines = {"black": 2 * thickness, "white": thickness}       # shows on dark and on bright
    for colour, reach in lines.items():
        soft = np.asarray(mask.filter(ImageFilter.BoxBlur(reach)))                 # (H, W)
        canvas.paste(colour, mask=Image.fromarray((0 < soft) & (soft < 255)))
    return canvas


def figure(row, base):
    """A row of results.csv as HTML, with its overlay; CSS puts high scores first."""
    source = f"{html.escape(row['path'])}<br><small>{html.escape(row['model'])}</small></figure>\n"
    if row["error"]:
        return f'<figure style="order:1">{html.escape(row["error"])}<br>{source}'
    decision = row["decision"]
    hint = "; most suspicious part outlined" if decision == "genuine" and row["area"] > 0 else ""
    order = round(-1000 * row["score"])
    link = quote(os.fsencode(os.path.basename(base))) + "_overlay.png"
    return (f'<figure style="order:{order}"><a href="{link}"><img alt="overlay" loading="lazy" '
            f'src="{link}"></a><br><b class="{decision}">{decision}{hint}</b><br>'
            f'score {row["score"]:.2f}, {row["area"]:.0%} marked<br>{source}')


def read_owners(file):
    """{stem: (path, model)} of the first picture of each stem in results.csv, {} if there is none;
    BadInput if it has another header."""
    text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else HEADER
    lines = text.splitlines()
    if lines[:1] != [HEADER]:
        raise BadInput(f"found another header in {file}, expected {HEADER}: choose another --out")
    rows = [row for row in csv.DictReader(lines) if not row["error"]]
    return {Path(row["path"]).stem: (row["path"], row["model"]) for row in reversed(rows)}


def output_base(out, row, owners):
    """How the names of a picture's outputs begin: out/stem, shortened to 200 bytes.

    If outputs of another picture or model lie there, a checksum of path and model follows.
    """
    stem = Path(row["path"]).stem
    key = (row["path"], row["model"])
    short = stem.encode()[:200].decode(errors="ignore")
    base = os.path.join(out, os.fsdecode(short.encode()))         # UTF-8 in every locale
    unique = f"{base}~{zlib.crc32(repr(key).encode()):08x}"
    taken = os.path.exists(f"{base}_overlay.png") and owners.get(stem) != key
    return unique if taken or os.path.exists(f"{unique}_overlay.png") else base


def answer(model, path, row, out, owners):
    """Localize one picture, write its map, mask and overlay, and fill its row -> output_base."""
    began = time.time()
    try:
        picture = data.open_image(path)
        result = localize(model, picture)
        base = output_base(out, row, owners)
        overlay(picture, result).save(f"{base}_overlay.png", compress_level=1)
        grey = Image.fromarray((255 * result.map + 0.5).astype(np.uint8))
        grey.save(f"{base}_map.png", compress_level=1)
        Image.fromarray(result.mask).convert("L").save(f"{base}_mask.png")
    except (BadInput, MemoryError, torch.OutOfMemoryError, OSError) as error:
        row["error"] = str(error).removeprefix(f"{path}: ") or type(error).__name__
        return ""
    row |= {"decision": result.decision, "score": round(result.score, 4),
            "area": round(result.area, 4), "width": picture.width, "height": picture.height,
            "seconds": round(time.time() - began, 3)}
    return base


# ------------------------------------------------------------------------------------ the command

def collect(words, out):
    """Files and folders -> paths of pictures, each once, without the outputs in `out`."""
    paths = {}
    for word in words:
        is_folder = os.path.isdir(word)
        files, left_out = data.files_in(word) if is_folder else ([Path(word)], {})
        for ending, count in left_out.items():
            print(f"note: {word}: left out {count} {ending}", file=sys.stderr)
        for file in files:
            folder, name = os.path.split(os.path.realpath(file))
            is_output = name.endswith(("_map.png", "_mask.png", "_overlay.png"))
            if not is_output or folder != os.path.realpath(out):
                paths.setdefault((folder, name), file)
    if not any(path.is_file() for path in paths.values()):
        raise BadInput(f"found no picture at {' '.join(words)}, expected files "
                         f"({', '.join(data.EXTENSIONS)}) or folders: check the path")
    return list(paths.values())


def prepare(args):
    """Everything that can be wrong with a call -> (model, its name, paths, owners of outputs)."""
    out = Path(args.out)
    paths = collect(args.paths, out)
    owners = read_owners(out / "results.csv")
    model = load(args.checkpoint, args.device, args.precision)
    checkpoint = args.checkpoint or clip.TINY
    name = f"{Path(checkpoint).name} {clip.sha256_of(checkpoint)[:12]}"
    if not args.checkpoint:
        print(f"note: the shipped model is a small demonstration. {CAUTION}", file=sys.stderr)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"cannot write into {out} ({error.strerror}), expected a folder: choose "
                       "another --out") from error
    return model, name, paths, owners


def run(out, model, name, paths, owners):
    """Answer for all pictures, a row and a figure each as soon as it is done -> exit status."""
    as_text = {"encoding": "utf-8", "errors": "backslashreplace", "buffering": 1}
    failed = 0
    with open(Path(out, "results.csv"), "a", **as_text) as table, \
            open(Path(out, "report.html"), "a", **as_text) as report:
        rows = csv.DictWriter(table, HEADER.split(","), lineterminator="\n")
        for file, start in ((table, HEADER + "\n"), (report, REPORT)):
            if file.tell() == 0:
                file.write(start)
        for path in paths:
            readable = os.fsencode(path).decode("utf-8", "backslashreplace")
            row = {"path": readable, "model": name, "error": ""}
            base = answer(model, path, row, out, owners)
            rows.writerow(row)                       # line buffering: on the disk at once
            report.write(figure(row, base))
            if row["error"]:
                failed += 1
                print(f"error: {readable}: {row['error']}", file=sys.stderr)
            else:
                print(f"{readable}  {row['decision']}  score {row['score']:.2f}  {row['area']:.0%} "
                      f"marked  -> {base}_overlay.png", flush=True)
    print(f"{len(paths) - failed} of {len(paths)} done: {out}/report.html", file=sys.stderr)
    return 1 if failed else 0


def main(arguments=None):
    """The command line -> exit status."""
    parser = argparse.ArgumentParser(description="Find manipulated regions.", allow_abbrev=False)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="files and folders")
    parser.add_argument("--checkpoint", help="of train.py (default: the shipped weights/tiny.pt)")
    parser.add_argument("--out", metavar="DIR", default="out", help="(default out)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    parser.add_argument("--precision", default="auto",
                        help="auto (bf16 where the hardware supports it), bf16, fp32")
    args = parser.parse_args(arguments)
    try:
        try:
            job = prepare(args)
        except (ValueError, OSError) as error:       # a later ValueError is a bug: traceback
            print(f"error: {error}", file=sys.stderr)
            return 2
        return run(args.out, *job)
    except OSError as error:                         # of results.csv or report.html
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: what is done is kept", file=sys.stderr)
        return 130


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="surrogateescape")
    sys.exit(main())
