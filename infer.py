"""SAPL assembled and used: checkpoints, picture -> map -> mask, evaluation, command line.

    python infer.py photo.jpg FOLDER --out DIR       is it manipulated, where, how sure
    python infer.py --evaluate SET [SET ..]          the metrics, beside trivial baselines
    result = SAPL.load().localize("photo.jpg")       the same as a library

Shapes: B images, h, w patch grid, H, W pixels. A map is in [0, 1], 1 = manipulated.
"""
import argparse
import base64
import csv
import glob
import html
import io
import json
import math
import os
import pickle
import sys
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, product
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

SHIPPED = clip.TINY
ECPL_KEYS = ecpl.ECPL.SETTINGS
BATCH = 8                                        # pictures per forward pass
BAD = (OSError, ValueError, MemoryError)         # what a picture, not the program, may raise


# ---------------------------------------------------------------------------------- checkpoints

def is_backbone(key):
    """Whether a key of SAPL's state dict is a weight of CLIP itself, not of ECPL or LoRA."""
    return key.startswith("clip.") and ".lora." not in key


def save_checkpoint(path, model, **state):
    """Write SAPL and `state` (tensors and plain types) so that no interruption breaks the file.

    The file before is kept as `<path>.previous`; an official CLIP is stored by name and hash.
    Of a model to be shared pass `model.half()`.
    """
    tensors = {key: value.detach().cpu() for key, value in model.state_dict().items()}
    own = {key: tensors.pop(key) for key in list(tensors) if is_backbone(key)}
    own = {key.removeprefix("clip."): value for key, value in own.items()}      # OpenAI's names
    if model.config["tune"] != "full" and getattr(model.clip, "name", "") in clip.OFFICIAL:
        own = {"name": model.clip.name, "sha256": model.clip.sha256}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.part", "wb") as file:
        torch.save({"format": 1, "config": model.config, "clip": own, "model": tensors,
                    "threshold": float(model.threshold),
                    "score_threshold": float(model.score_threshold), **state}, file)
        file.flush()
        os.fsync(file.fileno())
    if os.path.exists(path):
        os.replace(path, f"{path}.previous")
    os.replace(f"{path}.part", path)


def load_checkpoint(path):
    """The dict of a file of `save_checkpoint`, on the CPU; OSError or ValueError of one line."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: train one with `python train.py --data "
                                "FOLDER`, then name its best.pt with --checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        assert state["format"] == 1 and {"config", "clip", "model", "threshold"} <= state.keys()
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, LookupError, TypeError,
            AttributeError, AssertionError) as error:
        raise ValueError(
            f"{path} is not a SAPL checkpoint of format 1 ({type(error).__name__}): use "
            "a file that train.py wrote, or its copy ending in .previous") from error
    return state


# ---------------------------------------------------------------------------------- the network

class Result(NamedTuple):
    """What `SAPL.localize` finds in a picture of H x W pixels."""
    map: np.ndarray       # (H, W) float32 in [0, 1], 1 = manipulated
    mask: np.ndarray      # (H, W) bool, map > threshold
    score: float          # of the whole picture, in [0, 1]
    decision: str         # "manipulated" if score > score_threshold, else "genuine"
    threshold: float      # of the map
    area: float           # share of the mask in the picture, in [0, 1]
    score_threshold: float = 0.5


def attempt(function, *arguments):
    """function(*arguments), or the exception that a picture, not the program, has caused."""
    try:
        return function(*arguments)
    except BAD as error:
        return error


def open_picture(source):
    """Path, PIL image or uint8 array (H, W, 3) -> PIL RGB image; data.BadPicture if unreadable."""
    if isinstance(source, (str, Path)):
        return data.open_image(source)
    return data.to_rgb(Image.fromarray(source) if isinstance(source, np.ndarray) else source)


def resize_map(grid, size):
    """grid (h, w) -> (H, W) = size, bilinear between the centres of the cells."""
    return F.interpolate(grid[None, None], size, mode="bilinear")[0, 0]             # (H, W)


def starts(length, size):
    """Where windows of a size begin that cover a length, overlapping by a quarter at least."""
    last = max(0, length - size)
    return np.linspace(0, last, 1 + math.ceil(last / (0.75 * size))).astype(int).tolist()


def pick_device(name):
    """"auto", "cpu", "cuda", "cuda:1", "mps" -> torch.device; ValueError if it is not there."""
    found = (["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
             + ["cpu"])
    if name != "auto" and str(name).partition(":")[0] not in found:
        raise ValueError(f"found no device {name!r}, expected one of auto, {', '.join(found)}")
    return torch.device(found[0] if name == "auto" else name)


class SAPL(nn.Module):
    """CLIP and the prompt learner ECPL (paper: "Semantic-Agnostic Prompt Learning in CLIP").

    config: plain dict with `clip`, the settings of ECPL, `tune` ("lora", "full", "none"),
    `lora_rank`, `lora_alpha`, `lora_share`, `max_side` (longest side of a view) and `window` (see
    `windows`), both in pixels.
    """

    def __init__(self, clip_model, config):
        super().__init__()
        self.config, self.bf16 = dict(config), False
        self.threshold = self.score_threshold = 0.5          # of the map, of the score
        self.clip = clip_model.requires_grad_(False)         # the text tower stays as it is
        clip_model.visual.requires_grad_(config["tune"] == "full")
        self.ecpl = ecpl.ECPL(clip_model, **{key: config[key] for key in ECPL_KEYS})
        if config["tune"] == "lora":
            blocks = clip_model.visual.transformer.resblocks
            last = blocks[-max(1, round(config["lora_share"] * len(blocks))):]
            clip.add_lora(last, config["lora_rank"], config["lora_alpha"])

    def forward(self, image, memo=None):
        """image (B, 3, H, W) in [0, 1], sides multiples of `ecpl.cell` -> ecpl.Output."""
        return self.ecpl(self.clip, image, memo)

    @classmethod
    def load(cls, path=None, device="auto", merge=True):
        """The model of a checkpoint (None: the shipped weights/tiny.pt), in eval mode.

        merge: fold LoRA into the weights; False to train on. OSError or ValueError of one line.
        """
        state = load_checkpoint(path or SHIPPED)
        config, backbone = state["config"], state["clip"]
        try:
            model = clip.load(backbone["name"]) if "name" in backbone else clip.build(backbone)
            model.name, model.sha256 = config["clip"], backbone.get("sha256", "")
            model = cls(model, config)
            own = {key: value for key, value in model.state_dict().items() if is_backbone(key)}
            model.load_state_dict(own | state["model"])
        except (RuntimeError, KeyError) as error:
            raise ValueError(f"{path} does not fit this version, train it again: "
                             f"{' '.join(str(error).split())[:300]}") from error
        model.threshold = state["threshold"]
        model.score_threshold = state.get("score_threshold", 0.5)          # older files have none
        if merge and config["tune"] == "lora":
            clip.merge_lora(model.clip)
            model.config["tune"] = "full"          # saved again, its CLIP is no longer the official
        return model.to(pick_device(device)).eval()

    def windows(self, crop, shape):
        """Patch logits of shape (B, h, w): the mean over overlapping windows of the pictures.

        Ours: a tower that saw small pictures only does not know what to attend to in large ones. A
        window is config["window"] pixels long; with 0, max_side, which holds a whole view.
        crop: left, top, right, bottom of a window -> its pixels (B, 3, H, W) in [0, 1].
        """
        p, (B, h, w), device = self.ecpl.cell, shape, self.ecpl.bias.device
        size = round((self.config.get("window") or self.config["max_side"]) / p)
        rows, columns = min(size, h), min(size, w)                                  # of a window
        total, times = torch.zeros(2, B, h, w, device=device)                       # (B, h, w) each
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            for top, left in product(starts(h, rows), starts(w, columns)):
                bottom, right = top + rows, left + columns
                image = crop(p * left, p * top, p * right, p * bottom).to(device)   # (B, 3, H, W)
                total[:, top:bottom, left:right] += self(image).logits      # (B, rows, columns)
                times[:, top:bottom, left:right] += 1
        return total / times

    def answer(self, image):
        """image (B, 3, H, W) -> patch probabilities (B, h, w), scores (B,), fp32 on the CPU."""
        p, (B, _, H, W) = self.ecpl.cell, image.shape
        logits = self.windows(lambda left, top, right, bottom: image[..., top:bottom, left:right],
                              (B, H // p, W // p))                                  # (B, h, w)
        scores = ecpl.pool_score(logits.flatten(1), self.ecpl.rho)                  # (B,)
        return logits.sigmoid().cpu(), scores.sigmoid().cpu()

    def view(self, source):
        """The whole picture for the network: ((H, W) of the picture, (3, H', W') in [0, 1])."""
        picture, p = open_picture(source), self.ecpl.cell
        scale = min(1, self.config["max_side"] / max(picture.size)) / p
        size = [max(1, round(side * scale)) * p for side in picture.size]
        small = picture.resize(size, Image.Resampling.BICUBIC, reducing_gap=3)
        return picture.size[::-1], data.to_tensor(small)                            # (3, H', W')

    def tiles(self, picture, grid):
        """Mean of a view's grid and the picture's own, at its full size: larger (h, w) in [0, 1].

        Only one window at a time becomes a tensor. Left out is what patches do not cover, at most
        half of one on every side. A picture no longer than max_side keeps the grid of its view.
        """
        p, (W, H) = self.ecpl.cell, picture.size
        if max(W, H) <= self.config["max_side"]:
            return grid
        h, w = max(1, H // p), max(1, W // p)
        x, y = (W - w * p) // 2, (H - h * p) // 2

        def crop(left, top, right, bottom):
            box = x + left, y + top, x + right, y + bottom
            return data.to_tensor(picture.crop(box))[None]                          # (1, 3, H, W)

        fine = self.windows(crop, (1, h, w)).sigmoid().cpu()[0]                     # (h, w)
        return (fine + resize_map(grid, (h, w))) / 2                   # ours: both count alike

    def predict(self, images, pictures=None):
        """Views of one size -> [(grid (h, w) in [0, 1], score)]. pictures: PIL, to be tiled."""
        grids, scores = self.answer(torch.stack(images))                          # (B, h, w), (B,)
        if pictures:
            grids = [self.tiles(*each) for each in zip(pictures, grids)]            # [(h, w)]
        return zip(grids, scores.tolist())

    def result(self, size, grid, score, raw):
        """grid (h, w), score -> Result of size (H, W); ValueError where they are not numbers."""
        if not torch.isfinite(grid).all() or not math.isfinite(score):
            raise ValueError("the network's answer is not a number: check the checkpoint")
        if not raw:        # closed, filled and, ours, smoothed over squares of about 40 pixels
            radius = max(1, 16 // self.ecpl.cell)
            grid = ecpl.regions(grid[None], radius=radius)[0]                       # (h, w)
        map = resize_map(grid, size).numpy()                                        # (H, W)
        mask, decision = map > self.threshold, ecpl.CLASSES[score > self.score_threshold]
        return Result(map, mask, score, decision, self.threshold, float(mask.mean()),
                      self.score_threshold)

    def localize(self, source, raw=False, tiles=False):
        """Is a picture (path, PIL image, uint8 array (H, W, 3)) manipulated, and where -> Result.

        raw: the map as the network gives it, not closed, filled and smoothed. tiles: refine
        pictures longer than max_side at their own resolution. Raises data.BadPicture or ValueError.
        """
        picture = open_picture(source)
        size, image = self.view(picture)
        (grid, score), = self.predict([image], tiles and [picture])
        return self.result(size, grid, score, raw)


def stream(model, sources, opener, raw, tiles):
    """Answer many pictures: decoded ahead by threads, batched by the size of their views.

    Yields (source, Result or error, seconds) in the order of the sources. opener: source -> what
    `SAPL.view` takes. At most 8 * BATCH views lie in memory.
    """
    def decode(source):
        return source, attempt(lambda: model.view(opener(source)))

    def ahead():
        return pool.map(decode, list(islice(sources, 4 * BATCH)))

    sources = iter(sources)
    with ThreadPoolExecutor(2) as pool:
        following = ahead()
        while chunk := list(following):
            following, groups, answers = ahead(), defaultdict(list), {}
            for i, (_, view) in enumerate(chunk):
                if not isinstance(view, Exception):
                    groups[view[1].shape].append(i)
            for some in (g[k:k + BATCH] for g in groups.values() for k in range(0, len(g), BATCH)):
                start = time.time()
                pictures = tiles and (opener(chunk[i][0]) for i in some)    # one at a time
                found = model.predict([chunk[i][1][1] for i in some], pictures)
                seconds = (time.time() - start) / len(some)
                answers.update((i, (*answer, seconds)) for i, answer in zip(some, found))
            for i, (source, view) in enumerate(chunk):
                if i in answers:
                    grid, score, seconds = answers[i]
                    yield source, attempt(model.result, view[0], grid, score, raw), seconds
                else:
                    yield source, view, 0.0


# -------------------------------------------------------------------------------------- metrics

THRESHOLDS = np.arange(1, 100) / 100                                                # (99,)
ATTACKS = [f"{kind}:{value}" for kind, values in (                       # the grid of IMDL-BenCo
    ("jpeg", (100, 90, 80, 70, 60, 50)), ("blur", (3, 7, 11, 15, 19, 23)),
    ("noise", (3, 7, 11, 15, 19, 23))) for value in values]


def mean(values):
    """Mean of what is not None; None of nothing."""
    values = [value for value in values if value is not None]
    return float(np.mean(values)) if values else None


def rates(flags, truth):
    """Counts and rates of boolean arrays of one shape; a rate is None where it is 0 / 0."""
    tp, flagged, positive = int((flags & truth).sum()), int(flags.sum()), int(truth.sum())
    fp, fn, tn = flagged - tp, positive - tp, truth.size - flagged - positive + tp
    parts = {"f1": (2 * tp, 2 * tp + fp + fn), "precision": (tp, flagged), "recall": (tp, positive),
             "iou": (tp, tp + fp + fn), "spe": (tn, tn + fp), "acc": (tp + tn, truth.size)}
    shares = {name: a / b if b else None for name, (a, b) in parts.items()}
    return {"tp": tp, "fp": fp, "fn": fn, "tn": tn} | shares


def harmonic(a, b):
    """Harmonic mean of two rates, 0 if one is 0, None if one is None."""
    return None if a is None or b is None else 2 * a * b / (a + b) if a and b else 0.0


def curve(values, truth):
    """(t, TP, FP, AUC): the counts of values >= t for every distinct value t, falling.

    AUC: chance that a positive lies above a negative, ties half (mid-ranks); None with one class.
    """
    order = np.argsort(values, axis=None)[::-1]
    values, truth = np.ravel(values)[order], np.ravel(truth)[order]                 # (n,)
    last = np.flatnonzero(np.append(values[1:] != values[:-1], values.size > 0))    # (t,)
    tp = np.cumsum(truth, dtype=np.int64)[last]                                     # (t,)
    fp = last + 1 - tp
    won = np.sum(np.diff(fp, prepend=0) * (2 * tp - np.diff(tp, prepend=0)))        # pairs, twice
    pairs = 2 * tp.max(initial=0) * fp.max(initial=0)
    return values[last].astype(np.float64), tp, fp, float(won / pairs) if pairs else None


def rank_auc(values, truth):
    """Area under the ROC curve of values for truth {0, 1}; see `curve`."""
    return curve(values, truth)[3]


def pixel_scores(map, mask, threshold):
    """All metrics of one picture: map (H, W) in [0, 1], mask (H, W) {0, 1}, not empty -> dict."""
    truth = np.asarray(mask, dtype=bool)
    t, tp, fp, auc = curve(map, truth)
    f1 = np.where(t > 0, 2 * tp / (tp + fp + tp[-1]), 0.0)         # (t,) a map of 0 flags nothing
    at = np.append(0.0, f1)[np.searchsorted(-t, -THRESHOLDS)]      # (99,) of map > each threshold
    values = {key: value or 0 for key, value in rates(map > threshold, truth).items()}
    return values | {"auc": auc, "f1_best": float(f1.max()), "at": at}


def pixel_summary(scores):
    """Means over the dicts of `pixel_scores`, None where there is nothing to average."""
    names = ("f1", "precision", "recall", "iou", "f1_best", "auc")
    best = float(np.mean([each["at"] for each in scores], axis=0).max()) if scores else None
    return {f"pixel_{name}": mean(each[name] for each in scores) for name in names} | {
        "pixel_f1_best_global": best}


def image_summary(scores, labels, threshold):
    """Image-level metrics of scores in [0, 1] and labels {0, 1}, both of length n."""
    truth = np.array(labels, dtype=bool)
    found = rates(np.array(scores) > threshold, truth)
    return {"image_auc": rank_auc(scores, truth), "image_acc": found["acc"],
            "image_sen": found["recall"], "image_spe": found["spe"],
            "image_f1": found["f1"] if truth.any() else None,
            "image_f1_hm": harmonic(found["recall"], found["spe"])}


def baselines(picture):
    """Trivial maps (H, W) of a PIL picture: what a network must beat."""
    x, y = (np.linspace(-1, 1, side) for side in picture.size)
    return {"all_ones": np.ones((y.size, x.size), dtype=np.float32),
            "centre": np.exp(-2 * (y[:, None] ** 2 + x ** 2)),    # (H, W) ours: sigma 1/4 of a side
            "edge": ecpl.soft_edges(data.to_tensor(picture)[None])[0, 0].numpy()}          # (H, W)


def evaluate(model, pictures, *, threshold=0.5, score_threshold=0.5, attack=None, raw=False,
             tiles=False):
    """The metrics of labelled pictures ([data.Picture]), of the model and of the baselines.

    attack: see data.attack. Returns (summary, one dict a picture); summary["excluded"] tells what
    could not count: {reason: number}.
    """
    def opener(entry):
        picture = data.open_image(entry.path)
        return data.attack(picture, attack) if attack else picture

    if attack:
        data.attack(Image.new("RGB", (8, 8)), attack)          # a wrong one stops here
    labelled = [entry for entry in pictures if entry.label is not None]
    rows, pixels, excluded = [], defaultdict(list), Counter()
    excluded["no label"] = len(pictures) - len(labelled)
    for entry, result, _ in stream(model, labelled, opener, raw, tiles):
        row = {"path": str(entry.path), "label": entry.label}
        rows.append(row)
        mask = attempt(data.read_mask, entry) if entry.label and entry.mask else None
        errors = [str(each) for each in (result, mask) if isinstance(each, Exception)]
        if errors:
            row["error"] = errors[0]
            excluded["no answer"] += 1
            continue
        row["score"] = result.score
        if not entry.label:
            row["fp_area"] = float((result.map > threshold).mean())
        elif mask is None or not mask.any():
            excluded["no mask (pixels)" if mask is None else "empty mask (pixels)"] += 1
        else:
            for name, map in ({"model": result.map} | baselines(opener(entry))).items():
                map = resize_map(torch.as_tensor(map), mask.shape).numpy()          # (H, W)
                pixels[name].append(pixel_scores(map, mask, threshold))
            row |= pixels["model"][-1]
            excluded["no genuine pixel (pixel_auc)"] += int(mask.all())
    scores, labels = ([row[key] for row in rows if "score" in row] for key in ("score", "label"))
    summary = {"n": len(labels), "n_manipulated": sum(labels), "n_genuine": labels.count(0),
               "n_masks": len(pixels["model"]), "excluded": dict(+excluded), "threshold": threshold,
               "score_threshold": score_threshold, **pixel_summary(pixels["model"]),
               **image_summary(scores, labels, score_threshold)}
    summary["comb_f1"] = harmonic(summary["pixel_f1"], summary["image_f1_hm"])
    summary["fp_area"] = mean(row.get("fp_area") for row in rows)
    summary["baselines"] = {x: pixel_summary(pixels[x]) for x in ("all_ones", "centre", "edge")}
    return summary, rows


def print_table(name, summary):
    """One set's summary on the screen, the baselines beside."""
    columns = {"model": summary} | summary["baselines"]
    counts, metrics = list(summary)[:7], list(summary)[7:-1]
    print(f"\n{name}:", ", ".join(f"{key} {summary[key]}" for key in counts))
    print(" " * 20 + "".join(f"{column:>10}" for column in columns))
    for metric in metrics:
        cells = [column[metric] for column in columns.values() if metric in column]
        cells = "".join(f"{'null' if x is None else format(x, '.3f'):>10}" for x in cells)
        print(f"{metric:20}{cells}", "oracle" * ("best" in metric))


def plot_robustness(path, rows):
    """Bars of pixel_f1 (red) and image_auc (blue), means over the sets, for every attack."""
    attacks = dict.fromkeys(row["attack"] for row in rows)
    image = Image.new("RGB", (560, 24 * len(attacks) + 32), "white")
    draw = ImageDraw.Draw(image)
    draw.text((80, 6), "pixel_f1 red, image_auc blue, full length 1", fill="black")
    for i, attack in enumerate(attacks):
        draw.text((8, 24 * i + 32), attack, fill="black")
        for y, metric, ink in (24 * i + 28, "pixel_f1", "#c22"), (24 * i + 38, "image_auc", "#22c"):
            value = mean(row[metric] for row in rows if row["attack"] == attack) or 0
            draw.rectangle((80, y, 80 + 400 * value, y + 8), fill=ink)
            draw.text((490, y - 1), f"{value:.3f}", fill=ink)
    image.save(path)


# ------------------------------------------------------------------- pictures for people to look at

def colour(grey):
    """PIL L image -> RGB, black, red, orange, pale yellow: brighter always means likelier."""
    bands = [grey.point([max(0, min(255, round(2.6 * v - 255 * k))) for v in range(256)])
             for k in range(3)]
    return Image.merge("RGB", bands)


def overlay(picture, result, heat):
    """heat (the map as L image) and contour of the mask over the picture, a legend -> PIL RGB."""
    W, H = picture.size
    alpha = heat.point([round(0.7 * v) for v in range(256)])
    canvas = Image.composite(colour(heat), picture, alpha)
    blur = ImageFilter.BoxBlur(max(W, H) // 500 + 1)
    soft = Image.fromarray(result.mask).convert("L").filter(blur)
    canvas.paste((255, 255, 255), mask=soft.point([255 * (0 < v < 255) for v in range(256)]))
    s = min(W // 40, H // 10)                                 # height of the letters
    if s >= 4:
        sign = "<>"[result.score > result.score_threshold]
        text = (f"{result.decision}   score {result.score:.2f} {sign} {result.score_threshold:.2f}"
                f"   map > {result.threshold:.2f}")
        draw = ImageDraw.Draw(canvas)
        draw.rectangle((0, H - 2 * s, W, H), fill="black")
        scale = Image.linear_gradient("L").rotate(90).resize((8 * s, s))
        canvas.paste(colour(scale), (s, H - 3 * s // 2))
        font = ImageFont.load_default(1.2 * s)
        draw.text((10 * s, H - s), text, fill="white", font=font, anchor="lm")
    return canvas


REPORT = """<!doctype html><meta charset="utf-8"><title>SAPL report</title><style>
body{font:15px sans-serif;background:#f4f4f2}div{position:relative}
main{display:flex;flex-wrap:wrap;gap:1em;align-items:start}img{width:100%;display:block}
figure{margin:0;padding:.6em;background:#fff;width:320px;overflow-wrap:anywhere}
img+img{position:absolute;top:0;opacity:var(--o,1)}
</style><h1>SAPL report</h1><p>picture <input type="range" min="0" max="1" step=".01" value="1"
oninput="document.body.style.setProperty('--o',this.value)"> overlay, sort by
<button onclick="sort('score',-1)">score</button> <button onclick="sort('path',1)">path</button>
<script>function sort(key,sign){const value=f=>key=='score'?+f.dataset.score:f.dataset.path;
[...document.querySelectorAll('figure')].sort((a,b)=>sign*(value(a)>value(b)?1:-1))
.forEach(f=>f.parentNode.append(f))}</script><main>
"""
FIELDS = ("path", "score", "decision", "threshold", "area", "width", "height", "seconds", "error")


def thumbnail(image):
    """PIL RGB image -> an HTML tag that contains it, at most 480 pixels long."""
    image.thumbnail((480, 480))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    code = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="" src="data:image/jpeg;base64,{code}">'


def show(folder, name, path, result):
    """Write a picture's map, mask and overlay below the folder -> its HTML for the report."""
    picture, strips = open_picture(path), np.array_split(result.map, 64)            # spares memory
    strips = [(255 * strip + 0.5).astype(np.uint8) for strip in strips]
    heat = Image.fromarray(np.concatenate(strips))                                  # (H, W)
    images = {"map": heat, "mask": Image.fromarray(result.mask).convert("L"),
              "overlay": overlay(picture, result, heat)}
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    for kind, image in images.items():
        image.save(folder / f"{name}_{kind}.png", compress_level=1)
    return (f"<div>{thumbnail(picture)}{thumbnail(images['overlay'])}</div>"
            f"<b>{result.decision}</b> {result.score:.3f}, area {result.area:.1%}<br>")


# --------------------------------------------------------------------------------- command line

def collect(arguments, out):
    """Files, folders, globs, "-" -> {where its images go: path}; ValueError if there is nothing.

    Below a folder its structure is kept; a name that is taken gets a number.
    """
    lines, names, out = [], {}, Path(out or os.devnull).resolve()
    for argument in arguments:
        lines += sys.stdin.read().splitlines() if argument == "-" else [argument]
    for line in lines:
        several = [] if os.path.lexists(line) else sorted(glob.glob(line, recursive=True))
        for root in map(Path, several or [line]):
            inside = [p for p in sorted(root.rglob("*")) if p.suffix.lower() in data.EXTENSIONS
                      and p.name[0] != "." and not p.is_dir() and out not in p.resolve().parents]
            for path in inside if root.is_dir() else [root]:
                name = path.relative_to(root if root.is_dir() else root.parent).with_suffix("")
                taken = name.with_name(f"{name.name}~{len(names)}")
                names[taken if name in names else name] = path
    if not any(map(os.path.lexists, names.values())):
        raise ValueError(f"no pictures at {' '.join(arguments)}: name files, folders or a glob")
    return names


def parse(arguments=None):
    """The command line. Exits with status 2 on what it does not know."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add, switch = parser.add_argument, {"action": argparse.BooleanOptionalAction, "default": False}
    add("paths", nargs="*", help="pictures: files, folders, globs, - for a list on standard input")
    add("--checkpoint", help="file that train.py wrote; default: the shipped weights/tiny.pt")
    add("--out", help="folder for maps, masks, overlays, results.csv, report.html, metrics.json")
    add("--threshold", type=float, help="of the map; default: the checkpoint's, 0.5 in --evaluate")
    add("--score-threshold", type=float, help="of the score, for the decision; default: likewise")
    add("--clip-cache", default=str(clip.CACHE), help="folder that keeps OpenAI's files")
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--json", **switch, help="print one JSON object a line")
    add("--bf16", **switch, help="compute in bfloat16, for GPUs")
    add("--raw", **switch, help="the map before it is closed, filled and smoothed")
    add("--tiles", **switch, help="refine large pictures at their own resolution")
    add("--skip-existing", **switch, help="leave out pictures whose images are in --out already")
    add("--evaluate", nargs="+", default=[], metavar="SET", help="labelled folders or lists")
    add("--attack", help="in --evaluate, first apply jpeg:QUALITY, blur:KERNEL or noise:VARIANCE")
    add("--robustness", **switch, help="in --evaluate, apply the whole grid of attacks")
    args = parser.parse_args(arguments)
    if bool(args.paths) == bool(args.evaluate):
        parser.error("name pictures, or --evaluate SET")
    return args


def write_csv(path, rows, mode="w"):
    """Dicts of plain values -> CSV file, columns in order of appearance; mode "a" goes on in it."""
    columns = dict.fromkeys(key for row in rows for key in row if key not in ("at", "baselines"))
    with open(path, mode, newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns), extrasaction="ignore")
        if not file.tell():
            writer.writeheader()
        writer.writerows(rows)


def run_evaluation(model, args):
    """`--evaluate`: tables, and with --out metrics.json, per_image.csv, robustness.csv and .png."""
    summaries, images, grid = {}, [], []
    for name in args.evaluate:
        pictures, report = data.read_set(name)
        bad = sum(problem.startswith("bad file") for problem in report.problems)
        for attack in [args.attack, *ATTACKS * args.robustness]:
            summary, rows = evaluate(model, pictures, threshold=model.threshold, attack=attack,
                                     score_threshold=model.score_threshold, raw=args.raw,
                                     tiles=args.tiles)
            summary["excluded"] |= {"unreadable": bad} if bad else {}
            print_table(f"{name} {attack or ''}", summary)
            grid.append({"set": name, "attack": attack or "none"} | summary)
            if name not in summaries:                                # the grid follows
                summaries[name] = summary
                images += [{"set": name} | row for row in rows]
    print("\ncomb_f1, mean over the sets:", mean(each["comb_f1"] for each in summaries.values()))
    if args.out:
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "metrics.json").write_text(json.dumps(summaries, indent=1), encoding="utf-8")
        write_csv(out / "per_image.csv", images)
        if args.robustness:
            write_csv(out / "robustness.csv", grid)
            plot_robustness(out / "robustness.png", grid)
    reasons = {reason for each in summaries.values() for reason in each["excluded"]}
    return int(not reasons.isdisjoint(("unreadable", "no answer")))


def run_pictures(model, args):
    """Print, and with --out write, the answer for every picture -> exit status 0 or 1."""
    names, out, failed = collect(args.paths, args.out), Path(args.out or ""), 0
    began = time.time()
    if args.skip_existing:
        names = {n: path for n, path in names.items() if not (out / f"{n}_overlay.png").exists()}
    if args.out:
        out.mkdir(parents=True, exist_ok=True)
        for file in ("results.csv", "report.html") * (not args.skip_existing):
            (out / file).unlink(missing_ok=True)
    answers = stream(model, names.values(), open_picture, args.raw, args.tiles)
    for i, (name, (path, result, seconds)) in enumerate(zip(names, answers), start=1):
        row = dict.fromkeys(FIELDS, "") | {"path": str(path), "seconds": round(seconds, 4)}
        if isinstance(result, Exception):
            failed, row["error"] = 1, str(result) or type(result).__name__
            print(f"error: {row['error']}", file=sys.stderr)
        else:
            row |= {key: value for key, value in result._asdict().items() if key in FIELDS}
            row["height"], row["width"] = result.map.shape
            with Image.open(path) as file:
                if getattr(file, "n_frames", 1) > 1:
                    print(f"note: {path}: first of {file.n_frames} frames", file=sys.stderr)
        if args.out:
            label, error = html.escape(str(path)), html.escape(row["error"])
            shown = error or show(out, name, path, result)
            write_csv(out / "results.csv", [row], "a")
            with open(out / "report.html", "a", encoding="utf-8") as report:
                report.write(REPORT * (not report.tell()))
                report.write(f'<figure data-score="{row["score"]}" data-path="{label}">'
                             f'{shown} {label}</figure>\n')
        if args.json:
            print(json.dumps(row), flush=True)
        elif not row["error"]:
            print(f"{path}  {result.decision}  {result.score:.3f}  {result.area:.3f}", flush=True)
        if sys.stderr.isatty() and len(names) > 20:
            left = (time.time() - began) / i * (len(names) - i)
            print(f"{i}/{len(names)}  {left:.0f} s left  ", end="\r", file=sys.stderr)
    return failed


def main(arguments=None):
    args = parse(arguments)
    clip.CACHE = args.clip_cache
    try:
        model = SAPL.load(args.checkpoint, args.device)
        if not args.checkpoint:
            print("note: the shipped model is a demonstration, often wrong: see the README",
                  file=sys.stderr)
        model.bf16 = args.bf16
        if args.evaluate:
            model.threshold = model.score_threshold = 0.5
        for name in ("threshold", "score_threshold"):
            if vars(args)[name] is not None:
                setattr(model, name, vars(args)[name])
        return run_evaluation(model, args) if args.evaluate else run_pictures(model, args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: what is done is kept", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
