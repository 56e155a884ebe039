"""SAPL assembled and used: checkpoints, picture -> map -> mask, evaluation, command line.

    python infer.py photo.jpg FOLDER --out DIR       is it manipulated, where, how sure
    python infer.py --evaluate SET [SET ..]          the metrics, beside trivial baselines
    result = SAPL.load().localize("photo.jpg")       the same as a library

Shapes: B images, h, w patch grid, H, W pixels. A map is in [0, 1], 1 = manipulated.
"""
import argparse, base64, csv, glob, html, io, json, math, os, pickle, sys, time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageFont

import clip
import data
import ecpl

SHIPPED = Path(__file__).parent / "weights" / "tiny.pt"
ECPL_KEYS = ecpl.ECPL.SETTINGS
BATCH = 8                   # pictures per forward pass
BAD = (OSError, ValueError, MemoryError)             # what a picture, not the program, may raise


# ---------------------------------------------------------------------------------- checkpoints

def is_backbone(key):
    """Whether a key of SAPL's state dict is a weight of CLIP itself, not of ECPL or LoRA."""
    return key.startswith("clip.") and (".parametrizations." not in key or key.endswith(".original"))


def save_checkpoint(path, model, half=False, **state):
    """Write a SAPL checkpoint so that an interruption never leaves a broken file.

    model: SAPL. state: further entries, tensors and plain types only (optimizer, epoch, ..).
    half: floating-point weights as fp16, for a model to be shared. The file that was there
    before is kept as `<path>.previous`. An official CLIP is stored by name and hash only.
    """
    tensors = {key: value.detach().cpu() for key, value in model.state_dict().items()}
    if half:
        tensors = {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}
    own = {key: tensors.pop(key) for key in list(tensors) if is_backbone(key)}
    backbone = {key.removeprefix("clip.").replace("parametrizations.", "").removesuffix(".original"):
                value for key, value in own.items()}                        # OpenAI's names
    if model.config["tune"] != "full" and model.clip.name in clip.OFFICIAL:
        backbone = {"name": model.clip.name, "sha256": model.clip.sha256}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        torch.save({"format": 1, "config": model.config, "clip": backbone, "model": tensors,
                    "threshold": float(model.threshold), **state}, file)
        file.flush()
        os.fsync(file.fileno())
    if path.exists():
        os.replace(path, path.with_name(path.name + ".previous"))
    os.replace(part, path)


def load_checkpoint(path):
    """The dict of a file of `save_checkpoint`, tensors on the CPU; OSError or ValueError, one line."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: train one with `python train.py --data "
                                "FOLDER`, then name its best.pt with --checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = f"format {state['format']}"
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, IndexError) as error:
        state, found = {}, f"{type(error).__name__} while reading it"
    if not {"config", "clip", "model", "threshold"} <= set(state) or state["format"] != 1:
        raise ValueError(f"{path} is not a SAPL checkpoint of format 1 ({found}): use a file that "
                         "train.py wrote, or its copy that ends in .previous")
    return state


# ---------------------------------------------------------------------------------- the network

class Result(NamedTuple):
    """What `SAPL.localize` finds in a picture of H x W pixels."""
    map: np.ndarray       # (H, W) float32 in [0, 1], probability of manipulation
    mask: np.ndarray      # (H, W) bool, map > threshold
    score: float          # of the whole picture, in [0, 1]
    decision: str         # "manipulated" if score > threshold, else "genuine"
    threshold: float
    area: float           # share of the mask in the picture, in [0, 1]


class View(NamedTuple):
    """A picture made ready for the network."""
    size: tuple           # (H, W) of the picture, pixels
    image: torch.Tensor   # (3, H', W') in [0, 1]: the whole picture, sides multiples of the patch


def open_picture(source):
    """Path, PIL image or uint8 array (H, W, 3) -> PIL RGB image; data.BadPicture if unreadable."""
    if isinstance(source, (str, Path)):
        return data.open_image(source)
    return data.to_rgb(Image.fromarray(source) if isinstance(source, np.ndarray) else source)


def resize_map(grid, size):
    """grid (h, w) -> (H, W) = size, bilinear between the centres of the cells."""
    return F.interpolate(grid[None, None], size, mode="bilinear", align_corners=False)[0, 0]


def pick_device(name):
    """"auto", "cpu", "cuda", "mps" -> torch.device."""
    mps, cuda = torch.backends.mps.is_available(), torch.cuda.is_available()
    return torch.device(("cuda" if cuda else "mps" if mps else "cpu") if name == "auto" else name)


def tile_starts(length, tile):
    """Where tiles begin on `length` cells; neighbours share a quarter or more (ours)."""
    return np.linspace(0, length - tile, 1 + math.ceil((length - tile) / (tile * 3 / 4))).astype(int)


class SAPL(nn.Module):
    """CLIP and the prompt learner ECPL (paper: "Semantic-Agnostic Prompt Learning in CLIP").

    config: plain dict with `clip`, the settings of ECPL, `tune` ("lora", "full", "none"),
    `lora_rank`, `lora_alpha` and `max_side` (longest side of a whole-picture view, pixels).
    """

    def __init__(self, clip_model, config):
        super().__init__()
        self.config, self.threshold, self.bf16 = dict(config), 0.5, False
        self.clip = clip_model.requires_grad_(config["tune"] == "full")
        self.ecpl = ecpl.ECPL(clip_model, **{key: config[key] for key in ECPL_KEYS})
        if config["tune"] == "lora":
            clip.add_lora(clip_model, config["lora_rank"], config["lora_alpha"])

    def forward(self, image):
        """image (B, 3, H, W) in [0, 1], sides multiples of the patch -> ecpl.Output."""
        return self.ecpl(self.clip, image)

    @classmethod
    def load(cls, path=None, device="auto", merge=True):
        """The model of a checkpoint (None: the shipped weights/tiny.pt), in eval mode.

        device: "auto", "cpu", "cuda", "mps". merge: fold LoRA into the weights; False to train on.
        Raises ValueError or OSError with one line: found, expected, remedy.
        """
        path = Path(path or SHIPPED)
        state = load_checkpoint(path)
        if "name" in state["clip"]:
            backbone = clip.load(state["clip"]["name"])
            if backbone.sha256 != state["clip"]["sha256"]:
                raise ValueError(f"{path} needs {backbone.name} with SHA-256 {state['clip']['sha256']}, "
                                 f"found {backbone.sha256}: fetch the file again")
        else:
            backbone = clip.build(state["clip"])
            backbone.name, backbone.sha256 = state["config"]["clip"], ""
        try:
            model = cls(backbone, state["config"])
            own = {key: value for key, value in model.state_dict().items() if is_backbone(key)}
            model.load_state_dict(own | state["model"])
        except (RuntimeError, KeyError) as error:
            raise ValueError(f"{path} does not fit this version, train it again: "
                             f"{' '.join(str(error).split())[:300]}") from error
        model.threshold = state["threshold"]
        if merge and model.config["tune"] == "lora":
            clip.merge_lora(model.clip)
            model.config["tune"] = "full"          # saved again, its CLIP is no longer the official
        return model.to(pick_device(device)).eval()

    def answer(self, image):
        """image (B, 3, H, W) -> patch probabilities (B, h, w), scores (B,), fp32 on the CPU."""
        device = self.ecpl.bias.device
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            out = self(image.to(device))
        return out.probability.float().cpu(), out.score_logit.float().sigmoid().cpu()

    def view(self, source):
        """What `open_picture` takes -> View."""
        picture, p = open_picture(source), self.clip.visual.patch_size
        scale = min(1, self.config["max_side"] / max(picture.size)) / p
        size = [max(1, round(side * scale)) * p for side in picture.size]
        small = picture.resize(size, Image.Resampling.BICUBIC, reducing_gap=3)
        return View((picture.height, picture.width), data.to_tensor(small))

    def tiles(self, picture, grid):
        """Refine a view's grid (h, w) by overlapping tiles of the picture as it is: (rows, columns).

        A tile is as large as a view may be. Beside the picture only one tile and the grids lie in
        memory. What the patches do not cover, less than half a patch, is left out on every side.
        """
        p, tile = self.clip.visual.patch_size, self.config["max_side"] // self.clip.visual.patch_size
        columns, rows = (max(1, side // p) for side in picture.size)
        x0, y0 = (picture.width - columns * p) // 2, (picture.height - rows * p) // 2
        h, w = min(tile, rows), min(tile, columns)
        ramps = [torch.sin(math.pi * (torch.arange(n) + 0.5) / n) for n in (h, w)]
        window = ramps[0][:, None] * ramps[1]                                         # (h, w)
        total, weight = torch.zeros(2, rows, columns)                                 # (rows, columns)
        for top in tile_starts(rows, h):
            for left in tile_starts(columns, w):
                x, y = x0 + left * p, y0 + top * p
                image = data.to_tensor(picture.crop((x, y, x + w * p, y + h * p)))    # (3, H, W)
                total[top:top + h, left:left + w] += window * self.answer(image[None])[0][0]
                weight[top:top + h, left:left + w] += window
        return (total / weight + resize_map(grid, (rows, columns))) / 2      # ours: both count alike

    def predict(self, views, pictures=None):
        """B views of one size -> B times (grid (h, w) in [0, 1], score). pictures: to be tiled."""
        grids, scores = self.answer(torch.stack([view.image for view in views]))      # (B, h, w), (B,)
        if pictures:
            grids = [self.tiles(picture, grid) if max(picture.size) > self.config["max_side"] else grid
                     for picture, grid in zip(pictures, grids)]
        return list(zip(grids, scores.tolist()))

    def result(self, size, grid, score, raw=False):
        """Grid (h, w) and score -> Result of size (H, W); ValueError where they are not numbers."""
        if not torch.isfinite(grid).all() or not math.isfinite(score):
            raise ValueError("the network's answer is not a number: check the checkpoint")
        grid = grid if raw else ecpl.regions(grid[None])[0]                           # (h, w)
        map = resize_map(grid, size).numpy()                                          # (H, W)
        mask = map > self.threshold
        decision = "manipulated" if score > self.threshold else "genuine"
        return Result(map, mask, score, decision, self.threshold, float(mask.mean()))

    def localize(self, source, raw=False, tiles=False):
        """Is a picture (path, PIL image, uint8 array (H, W, 3)) manipulated, and where -> Result.

        raw: the map as the network gives it, before regions are closed and filled. tiles: refine
        pictures longer than max_side at their own resolution. Raises data.BadPicture or ValueError.
        """
        picture = open_picture(source)
        view = self.view(picture)
        return self.result(view.size, *self.predict([view], tiles and [picture])[0], raw)


def stream(model, sources, opener, raw, tiles):
    """Answer many pictures: decoded ahead by threads, batched by the size of their views.

    Yields (source, Result or error, (H, W) or None, seconds) in the order of the sources.
    opener: source -> what `SAPL.view` takes. At most 8 * BATCH views lie in memory.
    """
    sources = iter(sources)
    with ThreadPoolExecutor(2) as pool:
        def ahead():
            return [(source, pool.submit(lambda source=source: model.view(opener(source))))
                    for source in islice(sources, 4 * BATCH)]
        following = ahead()
        while following:
            window, following, groups, answers = following, ahead(), defaultdict(list), {}
            for i, (_, future) in enumerate(window):
                try:
                    groups[future.result().image.shape].append((i, future.result()))
                except BAD as error:
                    answers[i] = error, None, 0.0
            for some in (g[k:k + BATCH] for g in groups.values() for k in range(0, len(g), BATCH)):
                start = time.perf_counter()
                pictures = tiles and [opener(window[i][0]) for i, _ in some]
                found = model.predict([view for _, view in some], pictures)
                for (i, view), answer in zip(some, found):
                    answers[i] = answer, view.size, (time.perf_counter() - start) / len(some)
            for i, (source, _) in enumerate(window):
                answer, size, seconds = answers[i]
                try:
                    answer = answer if size is None else model.result(size, *answer, raw)
                except BAD as error:
                    answer = error
                yield source, answer, size, seconds


# ------------------------------------------------------------------------------------- metrics

PIXEL = ("pixel_f1", "pixel_precision", "pixel_recall", "pixel_iou", "pixel_f1_best", "pixel_auc")
THRESHOLDS = np.arange(1, 100) / 100


def ratio(a, b, empty=0.0):
    """a / b, and `empty` for 0 / 0."""
    return float(a / b) if b else empty


def mean(values):
    """Mean of what is not None; None of nothing."""
    values = [value for value in values if value is not None]
    return float(np.mean(values)) if values else None


def harmonic(a, b):
    """Harmonic mean, 0 if both are 0, None if one is None."""
    return None if a is None or b is None else ratio(2 * a * b, a + b)


def pixel_counts(flags, truth):
    """(TP, FP, FN, TN) of boolean arrays of one shape."""
    tp, flagged, positive = int((flags & truth).sum()), int(flags.sum()), int(truth.sum())
    return tp, flagged - tp, positive - tp, truth.size - flagged - positive + tp


def curve(values, truth):
    """(t, TP, FP, AUC): the counts of values >= t for every distinct value t, falling.

    AUC: the chance that a positive lies above a negative, ties half (mid-ranks); None with one class.
    """
    order = np.argsort(values, axis=None)[::-1]
    values, truth = np.ravel(values)[order], np.ravel(truth)[order]
    last = np.flatnonzero(np.append(values[1:] != values[:-1], values.size > 0))   # of each run of ties
    tp = np.cumsum(truth, dtype=np.int64)[last]
    fp = last + 1 - tp
    below = np.sum(np.diff(fp, prepend=0) * (2 * tp - np.diff(tp, prepend=0)))     # positives above, doubled
    return values[last].astype(np.float64), tp, fp, ratio(below, 2 * tp[-1:].sum() * fp[-1:].sum(), None)


def rank_auc(values, truth):
    """Area under the ROC curve of values for truth {0, 1}, ties by mid-ranks; None with one class."""
    return curve(values, truth)[3]


def pixel_scores(map, mask, threshold):
    """All metrics of one picture: map (H, W) in [0, 1], mask (H, W) {0, 1}, not empty -> dict."""
    truth = np.asarray(mask, dtype=bool)
    tp, fp, fn, tn = pixel_counts(map > threshold, truth)
    t, tps, fps, auc = curve(map, truth)
    f1 = np.where(t > 0, 2 * tps / (tps + fps + tps[-1]), 0.0)              # a map of 0 flags nothing
    at = np.append(0.0, f1)[np.searchsorted(-t, -THRESHOLDS)]               # F1 of map > each threshold
    return {"tp": tp, "fp": fp, "fn": fn, "tn": tn, "pixel_f1": ratio(2 * tp, 2 * tp + fp + fn),
            "pixel_precision": ratio(tp, tp + fp), "pixel_recall": ratio(tp, tp + fn), "pixel_auc": auc,
            "pixel_iou": ratio(tp, tp + fp + fn), "pixel_f1_best": float(f1.max()), "at": at}


def pixel_summary(scores):
    """Means over the dicts of `pixel_scores`, None where there is nothing to average."""
    best = float(np.mean([each["at"] for each in scores], axis=0).max()) if scores else None
    return {name: mean(each[name] for each in scores) for name in PIXEL} | {"pixel_f1_best_global": best}


def image_summary(scores, labels, threshold):
    """Image-level metrics of scores in [0, 1] and labels {0, 1}, both of length n."""
    truth = np.array(labels, dtype=bool)
    tp, fp, fn, tn = pixel_counts(np.array(scores) > threshold, truth)
    sen, spe = ratio(tp, tp + fn, None), ratio(tn, tn + fp, None)
    return {"image_auc": rank_auc(scores, truth), "image_acc": ratio(tp + tn, truth.size, None),
            "image_sen": sen, "image_spe": spe, "image_f1_hm": harmonic(sen, spe),
            "image_f1": ratio(2 * tp, 2 * tp + fp + fn) if tp + fn else None}


def baselines(picture):
    """Trivial maps (H, W) of a PIL picture: what a network must beat."""
    x, y = (np.linspace(-1, 1, side) if side > 1 else np.zeros(1) for side in picture.size)
    return {"all_ones": np.ones((len(y), len(x)), dtype=np.float32),
            "centre": np.exp(-2 * (y[:, None] ** 2 + x ** 2)),     # ours: sigma is a quarter of a side
            "edge": ecpl.soft_edges(data.to_tensor(picture)[None])[0, 0].numpy()}


def evaluate(model, pictures, *, threshold=0.5, attack=None, raw=False, tiles=False):
    """The metrics of labelled pictures ([data.Picture]), of the model and of the baselines.

    attack: see data.attack. Returns: (summary dict, one dict a picture); what could not count is
    in summary["excluded"]: {reason: number}.
    """
    def opener(entry):
        picture = data.open_image(entry.path)
        return data.attack(picture, attack) if attack else picture

    rows, excluded, pixels = [], Counter(), defaultdict(list)
    labelled = [entry for entry in pictures if entry.label is not None]
    excluded["no label"] = len(pictures) - len(labelled)
    for entry, result, size, _ in stream(model, labelled, opener, raw, tiles):
        row = {"path": str(entry.path), "label": entry.label}
        rows.append(row)
        if isinstance(result, Exception):
            row["error"] = str(result)
            excluded["no answer"] += 1
            continue
        row["score"] = result.score
        mask = data.read_mask(entry, size[::-1]) if entry.label and entry.mask else None
        if not entry.label:
            row["fp_area"] = float((result.map > threshold).mean())
        elif mask is None or not mask.any():
            excluded["no mask (pixels)" if mask is None else "empty mask (pixels)"] += 1
        else:
            for name, map in ({"model": result.map} | baselines(opener(entry))).items():
                map = resize_map(torch.as_tensor(map), mask.shape).numpy()
                pixels[name].append(pixel_scores(map, mask, threshold))
            row |= pixels["model"][-1]
            excluded["no genuine pixel (pixel_auc)"] += int(mask.all())
    scores, labels = zip(*[(row["score"], row["label"]) for row in rows if "score" in row]) or ((), ())
    summary = {"n": len(labels), "n_manipulated": sum(labels), "n_genuine": len(labels) - sum(labels),
               "n_masks": len(pixels["model"]), "excluded": dict(+excluded), "threshold": threshold,
               **pixel_summary(pixels["model"]), **image_summary(scores, labels, threshold)}
    summary["comb_f1"] = harmonic(summary["pixel_f1"], summary["image_f1_hm"])
    summary["fp_area"] = mean(row.get("fp_area") for row in rows)
    summary["baselines"] = {name: pixel_summary(pixels[name]) for name in ("all_ones", "centre", "edge")}
    return summary, rows


def table(name, summary):
    """The summary of one set as lines of text, the baselines beside."""
    s, columns = summary, {"model": summary, **summary["baselines"]}
    print(f"{name}: n {s['n']} ({s['n_manipulated']} manipulated, {s['n_masks']} of them with a mask, "
          f"{s['n_genuine']} genuine), left out: {s['excluded'] or 'none'}, threshold {s['threshold']:g}")
    print(" " * 20 + "".join(f"{column:>10}" for column in columns))
    for metric in [key for key in s if key.startswith(("pixel", "image", "comb", "fp"))]:
        values = [each.get(metric, "") for each in columns.values()]
        values = [f"{v:.3f}" if isinstance(v, float) else "null" if v is None else v for v in values]
        oracle = "  (oracle threshold)" if "best" in metric else ""
        print(f"{metric:20}" + "".join(f"{value:>10}" for value in values) + oracle)


ATTACKS = {"jpeg": (100, 90, 80, 70, 60, 50), "blur": (3, 7, 11, 15, 19, 23), "noise": (3, 7, 11, 15, 19, 23)}


def plot_robustness(path, rows):
    """Draw pixel_f1 (red) and image_auc (blue), mean over the sets, for each attack of ATTACKS."""
    image = Image.new("RGB", (960, 290), "white")
    draw = ImageDraw.Draw(image)
    for left, (kind, values) in zip((20, 335, 650), ATTACKS.items()):
        draw.rectangle((left, 30, left + 290, 250), outline="grey")
        draw.text((left, 10), f"{kind}: pixel_f1 red, image_auc blue, from 0 to 1", fill="black")
        for metric, ink in (("pixel_f1", "#c22"), ("image_auc", "#22c")):
            at = [mean(row[metric] for row in rows if row["attack"] == f"{kind}:{v}") for v in values]
            draw.line([(left + 20 + 50 * i, 250 - 220 * (y or 0)) for i, y in enumerate(at)], ink, 3)
        for i, value in enumerate(values):
            draw.text((left + 14 + 50 * i, 258), str(value), fill="black")
    image.save(path)


# ------------------------------------------------------------------- pictures for people to look at

# matplotlib's inferno at ten places: its lightness rises evenly, so brighter always means likelier
INFERNO = ((0, 0, 4), (27, 12, 66), (75, 12, 107), (120, 28, 109), (165, 45, 96), (207, 68, 70),
           (237, 105, 37), (251, 155, 6), (247, 209, 61), (252, 255, 164))


def colour(grey):
    """PIL L image -> RGB in the colours of INFERNO."""
    levels = [np.interp(range(256), np.linspace(0, 255, 10), channel) for channel in zip(*INFERNO)]
    grey = grey.copy()
    grey.putpalette(np.stack(levels, axis=1).round().astype(np.uint8).tobytes())
    return grey.convert("RGB")


def overlay(picture, result, heat):
    """Map (heat: as L image) and contour of the mask over the picture, legend at its foot -> PIL RGB."""
    W, H = picture.size
    canvas = Image.composite(colour(heat), picture, heat.point([round(0.7 * v) for v in range(256)]))
    blur = Image.fromarray(result.mask).convert("L").filter(ImageFilter.BoxBlur(max(W, H) // 500 + 1))
    canvas.paste((255, 255, 255), mask=blur.point([255 * (0 < v < 255) for v in range(256)]))
    s = max(16, min(H // 16, W // 24))                                       # height of the legend
    if W >= 16 * s and H >= 3 * s:
        draw, font, bar = ImageDraw.Draw(canvas), ImageFont.load_default(0.6 * s), W // 4
        draw.rectangle((0, H - s, W, H), fill="black")
        canvas.paste(colour(Image.linear_gradient("L").rotate(90).resize((bar, s // 2))), (s, H - s * 3 // 4))
        x = s + round(result.threshold * bar)
        draw.line((x, H - s, x, H), fill="white", width=s // 12 + 1)
        draw.text((bar + 2 * s, H - s * 7 // 8), f"{result.decision}   score {result.score:.2f}   "
                  f"threshold {result.threshold:.2f}", fill="white", font=font)
    return canvas


REPORT = """<!doctype html><meta charset="utf-8"><title>SAPL report</title><style>
body{font:15px sans-serif;margin:1.5em;background:#f4f4f2}main{display:flex;flex-wrap:wrap;gap:1em}
figure{margin:0;padding:.6em;background:#fff;width:320px;overflow-wrap:anywhere}div{position:relative}
img{width:100%;display:block}img+img{position:absolute;top:0;opacity:var(--o,1)}b.manipulated{color:#b3261e}
</style><h1>SAPL report</h1><p><label>picture <input type="range" min="0" max="1" step=".01" value="1"
oninput="document.body.style.setProperty('--o',this.value)"> overlay</label> &nbsp; sort by
<button onclick="sort('score',-1)">score</button> <button onclick="sort('path',1)">path</button>
<script>function sort(key,sign){const value=f=>key=='score'?+f.dataset.score:f.dataset.path;
[...document.querySelectorAll('figure')].sort((a,b)=>sign*(value(a)>value(b)?1:-1))
.forEach(f=>f.parentNode.append(f))}</script><main>
"""
FIELDS = ("path", "score", "decision", "threshold", "area", "width", "height", "seconds", "error")


def thumbnail(image):
    """PIL image -> <img> with its data inside."""
    buffer, small = io.BytesIO(), image.copy()
    small.thumbnail((480, 480))
    small.save(buffer, "JPEG", quality=80)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


class Output:
    """The folder of --out; each picture is written as it comes, so that an interruption keeps it."""

    def __init__(self, folder, append):
        self.folder, table, self.done = Path(folder), Path(folder) / "results.csv", set()
        self.folder.mkdir(parents=True, exist_ok=True)
        if append and table.exists():
            with open(table, newline="", encoding="utf-8") as file:
                self.done = {row["path"] for row in csv.DictReader(file) if not row["error"]}
        mode = "a" if self.done else "w"
        self.csv = open(table, mode, newline="", encoding="utf-8")
        self.report = open(self.folder / "report.html", mode, encoding="utf-8")
        self.rows = csv.DictWriter(self.csv, FIELDS)
        if not self.done:
            self.rows.writeheader()
            self.report.write(REPORT)

    def write(self, row, name, result, opener):
        """row: of results.csv. name: of its images, relative, without suffix. result: Result or error."""
        path, score, shown = html.escape(row["path"]), row["score"], html.escape(row["error"])
        if isinstance(result, Result):
            picture, heat = opener(row["path"]), Image.fromarray((255 * result.map).round().astype(np.uint8))
            images = {"map": heat, "mask": Image.fromarray(result.mask).convert("L"),
                      "overlay": overlay(picture, result, heat)}
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            for kind, image in images.items():
                image.save(self.folder / f"{name}_{kind}.png", compress_level=1)
            shown = (f'<div>{thumbnail(picture)}{thumbnail(images["overlay"])}</div>{path}<br>'
                     f'<b class="{row["decision"]}">{row["decision"]}</b> {score:.3f}, area {row["area"]:.1%}')
        self.report.write(f'<figure data-score="{score}" data-path="{path}">{shown}</figure>\n')
        self.rows.writerow(row)
        self.report.flush(), self.csv.flush()


# -------------------------------------------------------------------------------- command line

def collect(arguments, out):
    """Files, folders, globs, "-" -> {where its images go: path}; ValueError if there is nothing.

    Below a folder its structure is kept; a name that is taken gets a number.
    """
    found, names, out = [], {}, out and Path(out).resolve()
    lines = [line for a in arguments for line in (sys.stdin.read().splitlines() if a == "-" else [a])]
    for path in map(Path, lines):
        if path.is_dir():
            found += [(p, p.relative_to(path)) for p in sorted(path.rglob("*")) if p.name[0] != "."
                      and p.suffix.lower() in data.EXTENSIONS and out not in p.resolve().parents]
        else:
            several = [] if os.path.lexists(path) else sorted(glob.glob(str(path), recursive=True))
            found += [(p, Path(p.name)) for p in map(Path, several or [path])]
    if not any(os.path.lexists(path) for path, _ in found):
        raise ValueError(f"no pictures at {' '.join(arguments)}: name files, folders or a glob")
    for i, (path, relative) in enumerate(found):
        name = relative.with_suffix("")
        names[name.with_name(f"{name.name}~{i}") if name in names else name] = path
    return names


def parse(arguments=None):
    """The command line. Exits with status 2 on what it does not know."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("paths", nargs="*", help="pictures: files, folders, globs, - for a list on standard input")
    add("--checkpoint", help="file that train.py wrote; default: the shipped weights/tiny.pt")
    add("--out", help="folder for maps, masks, overlays, results.csv, report.html, metrics.json")
    add("--threshold", type=float, help="of map and score; default: the checkpoint's, 0.5 in --evaluate")
    add("--json", action=switch, default=False, help="print one JSON object a line")
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--bf16", action=switch, default=False, help="compute in bfloat16, for GPUs")
    add("--raw", action=switch, default=False, help="the map before regions are closed and filled")
    add("--tiles", action=switch, default=False, help="refine large pictures at their own resolution")
    add("--skip-existing", action=switch, default=False, help="leave out what results.csv has already")
    add("--evaluate", nargs="+", default=[], metavar="SET", help="labelled folders or lists to measure on")
    add("--attack", help="in --evaluate, first apply jpeg:QUALITY, blur:KERNEL or noise:VARIANCE")
    add("--robustness", action=switch, default=False, help="in --evaluate, apply the whole grid of attacks")
    args = parser.parse_args(arguments)
    if bool(args.paths) == bool(args.evaluate):
        parser.error("name pictures, or --evaluate SET")
    return args


def write_csv(path, rows):
    """Dicts of plain values -> CSV file, the columns in order of appearance."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def run_evaluation(model, args):
    """`--evaluate`: tables, and with --out metrics.json, per_image.csv and robustness.csv, .png."""
    summaries, images, settings = {}, [], []
    attacks = [f"{kind}:{v}" for kind in ATTACKS for v in ATTACKS[kind]] if args.robustness else []
    for name in args.evaluate:
        pictures, _ = data.read_set(name)
        for attack in [args.attack, *attacks]:
            summary, rows = evaluate(model, pictures, threshold=args.threshold or 0.5, attack=attack,
                                     raw=args.raw, tiles=args.tiles)
            table(f"{name} {attack or ''}", summary)
            settings.append({"set": name, "attack": attack or "none"} | {
                key: value for key, value in summary.items() if key not in ("baselines", "excluded")})
            if attack == args.attack:
                summaries[name] = summary
                images += [{"set": name} | {k: v for k, v in row.items() if k != "at"} for row in rows]
    print(f"comb_f1, mean over {len(summaries)} sets: {mean(s['comb_f1'] for s in summaries.values())}")
    if args.out:
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "metrics.json").write_text(json.dumps(summaries, indent=1), encoding="utf-8")
        write_csv(out / "per_image.csv", images)
        if args.robustness:
            write_csv(out / "robustness.csv", settings)
            plot_robustness(out / "robustness.png", settings)
    return int(any("no answer" in s["excluded"] for s in summaries.values()))


def run_pictures(model, args):
    """Print, and with --out write, the answer for every picture -> exit status 0 or 1."""
    names, failed, start = collect(args.paths, args.out), 0, time.perf_counter()
    output = Output(args.out, args.skip_existing) if args.out else None
    names = {n: path for n, path in names.items() if not output or str(path) not in output.done}
    answers = stream(model, names.values(), open_picture, args.raw, args.tiles)
    for i, (name, (path, result, size, seconds)) in enumerate(zip(names, answers), start=1):
        row = dict.fromkeys(FIELDS, "") | {"path": str(path), "seconds": round(seconds, 4)}
        if isinstance(result, Result):
            row |= {key: getattr(result, key) for key in ("score", "decision", "threshold", "area")}
            row |= {"height": size[0], "width": size[1]}
            line = f"{path}  {result.decision}  {result.score:.3f}  {result.area:.3f}"
        else:
            failed, row["error"], line = 1, str(result), None
            print(f"error: {result}", file=sys.stderr)
        if output:
            output.write(row, name, result, open_picture)
        if args.json or line:
            print(json.dumps({k: v for k, v in row.items() if v != ""}) if args.json else line, flush=True)
        if sys.stderr.isatty() and len(names) > 20:
            rate = i / (time.perf_counter() - start)
            print(f"\r{i}/{len(names)}  {rate:.1f} pictures/s  {(len(names) - i) / rate:.0f} s left ",
                  end="", file=sys.stderr)
    return failed


def main(arguments=None):
    args = parse(arguments)
    try:
        model = SAPL.load(args.checkpoint, args.device)
        model.bf16 = args.bf16
        model.threshold = model.threshold if args.threshold is None else args.threshold
        return run_evaluation(model, args) if args.evaluate else run_pictures(model, args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: what is done is kept", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
