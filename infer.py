"""SAPL assembled and used: checkpoints, picture -> map -> mask, evaluation, command line.

    python infer.py photo.jpg                        manipulated or genuine, score, share of the picture
    python infer.py FOLDER --out DIR                 with maps, masks, overlays, results.csv, report.html
    python infer.py --evaluate SET [SET ..]          the metrics, beside trivial baselines
    result = SAPL.load().localize("photo.jpg")       the same as a library

Shapes: B images, h, w patch grid, H, W pixels. A map is in [0, 1], 1 = manipulated.
"""
import os
import pickle
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn

import clip
import ecpl

SHIPPED = Path(__file__).parent / "weights" / "tiny.pt"
ECPL_KEYS = ("levels", "context", "class_words", "edge_source", "edges", "dense", "rho", "text")


# ---------------------------------------------------------------------------------- checkpoints

def save_checkpoint(path, model, half=False, **state):
    """Write a SAPL checkpoint so that an interruption never leaves a broken file.

    model: SAPL. state: further entries, tensors and plain types only (optimizer, epoch, ..).
    half: floating-point weights as fp16, for a model to be shared. The file that was there
    before is kept as `<path>.previous`. Layout: "format", "config", "clip", "model", "threshold".
    """
    tensors = {key: value.detach().cpu() for key, value in model.state_dict().items()}
    if half:
        tensors = {key: value.half() if value.is_floating_point() else value
                   for key, value in tensors.items()}
    backbone = {key.removeprefix("clip.").replace("parametrizations.", "").removesuffix(".original"):
                tensors.pop(key) for key in list(tensors) if is_backbone(key)}
    if model.config["tune"] != "full" and model.clip.name in clip.OFFICIAL:
        backbone = {"name": model.clip.name, "sha256": model.clip.sha256}
    entries = {"format": 1, "config": model.config, "clip": backbone, "model": tensors,
               "threshold": float(model.threshold), **state}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        torch.save(entries, file)
        file.flush()
        os.fsync(file.fileno())
    if path.exists():
        os.replace(path, path.with_name(path.name + ".previous"))
    os.replace(part, path)


def is_backbone(key):
    """Whether a key of SAPL's state dict is a weight of CLIP itself, not of ECPL or LoRA."""
    return key.startswith("clip.") and (".parametrizations." not in key or key.endswith(".original"))


def load_checkpoint(path):
    """Read a checkpoint of `save_checkpoint`: a dict of tensors and plain types, on the CPU.

    Raises FileNotFoundError or ValueError with one line: found, expected, remedy.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: train one with `python train.py --data "
                                "FOLDER` and name it with --checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = f"format {state['format']}"
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError) as error:
        state, found = {}, f"{type(error).__name__} while reading it"
    if not {"config", "clip", "model", "threshold"} <= state.keys() or state["format"] != 1:
        raise ValueError(f"{path} is not a SAPL checkpoint of format 1 ({found}): use a file that "
                         "train.py wrote, or its copy ending in .previous")
    return state


# --------------------------------------------------------------------------------- the network

class Result(NamedTuple):
    """What `SAPL.localize` finds in a picture of H x W pixels."""
    map: np.ndarray       # (H, W) float32 in [0, 1], probability of manipulation
    mask: np.ndarray      # (H, W) bool, map > threshold
    score: float          # of the whole picture, in [0, 1]
    decision: str         # "manipulated" if score > threshold, else "genuine"
    threshold: float
    area: float           # share of the mask in the picture, in [0, 1]


def pick_device(name):
    """"auto", "cpu", "cuda", "mps" -> torch.device."""
    if name == "auto":
        name = ("cuda" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() else "cpu")
    return torch.device(name)


class SAPL(nn.Module):
    """CLIP and the prompt learner ECPL (paper: "Semantic-Agnostic Prompt Learning in CLIP").

    config: plain dict with `clip`, the keys of ECPL, `tune` ("lora", "full", "none"), `lora_rank`,
    `lora_alpha`, `size` (training crop) and `max_side` (longest side of a whole-picture view, pixels).
    """

    def __init__(self, clip_model, config):
        super().__init__()
        self.config, self.threshold = dict(config), 0.5
        self.clip = clip_model
        self.clip.requires_grad_(config["tune"] == "full")
        self.ecpl = ecpl.ECPL(clip_model, **{key: config[key] for key in ECPL_KEYS})
        if config["tune"] == "lora":
            clip.add_lora(clip_model, config["lora_rank"], config["lora_alpha"])

    def forward(self, image):
        """image (B, 3, H, W) in [0, 1], sides multiples of the patch -> ecpl.Output."""
        return self.ecpl(self.clip, image)

    @classmethod
    def load(cls, path=None, device="auto", merge=True):
        """The model of a checkpoint (None: the shipped weights/tiny.pt), in eval mode.

        merge: fold LoRA into the weights (for use); False keeps it trainable.
        Raises ValueError or OSError with one line: found, expected, remedy.
        """
        path = Path(path or SHIPPED)
        state = load_checkpoint(path)
        if "name" in state["clip"]:
            backbone = clip.load(state["clip"]["name"])
            if backbone.sha256 != state["clip"]["sha256"]:
                raise ValueError(f"{path} was trained on {backbone.name} with SHA-256 "
                                 f"{state['clip']['sha256']}, found {backbone.sha256}")
        else:
            backbone = clip.build(state["clip"])
            backbone.name, backbone.sha256 = state["config"]["clip"], ""
        model = cls(backbone, state["config"])
        model.threshold = state["threshold"]
        try:
            missing, extra = model.load_state_dict(state["model"], strict=False)
        except RuntimeError as error:
            raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
        missing = [key for key in missing if not is_backbone(key)]
        if missing or extra:
            raise ValueError(f"{path} does not fit its own settings: missing {missing[:3]}, "
                             f"unknown {extra[:3]}; train it again with this version")
        if merge and state["config"]["tune"] == "lora":
            clip.merge_lora(model.clip)
        return model.to(pick_device(device)).eval()
