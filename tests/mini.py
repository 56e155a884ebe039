"""What the tests share: a miniature CLIP and SAPL, which need no file, and pictures."""
import numpy as np
import torch
from PIL import Image

import clip
import ecpl

CONFIG = {"clip": "mini", "levels": (1, 2), "context": 4, "rho": 0.1, "zoom": 1,
          "lora_rank": 0, "lora_share": 0.5, "max_side": 128, "window": 0}


def close(a, b, tolerance=1e-5):
    """Whether two tensors differ by at most `tolerance` anywhere."""
    return torch.allclose(a, b, rtol=0, atol=tolerance)


def mini_clip(patch=16, stem=()):
    """A random CLIP of 2 blocks and width 64, with byte tokens alone; always the same numbers."""
    torch.manual_seed(0)
    model = clip.CLIP(embed_dim=48, image_resolution=4 * patch, vision_layers=2, vision_width=64,
                      vision_patch_size=patch, context_length=77, vocab_size=514,
                      transformer_width=64, transformer_layers=2, stem=stem)
    return model.eval()


def mini_sapl(**config):
    """A random SAPL on the miniature CLIP; always the same numbers."""
    return ecpl.SAPL(mini_clip(), CONFIG | config).eval()


def photo(width, height, seed=0):
    """Smooth random colours with a square of one colour: PIL RGB."""
    rng = np.random.default_rng(seed)
    colours = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    smooth = colours.resize((width, height), Image.Resampling.BICUBIC)
    array = np.asarray(smooth).copy()                                          # (H, W, 3)
    array[height // 3:height // 2, width // 3:width // 2] = rng.integers(0, 256, 3)
    return Image.fromarray(array)


def draw(label, side, rng):
    """A smooth gradient, the manipulated ones (label 1) with a noisy square: PIL RGB.

    rng: a NumPy generator.
    """
    column = np.linspace(rng.integers(40, 90), rng.integers(130, 220), side)   # (H,)
    array = np.repeat(column[:, None, None], side, axis=1).repeat(3, axis=2)   # (H, W, 3)
    array += rng.normal(0, 2, array.shape)
    if label == 1:
        y, x = rng.integers(0, side - 30, 2)
        array[y:y + 30, x:x + 30] += rng.normal(0, 40, (30, 30, 3))
    return Image.fromarray(array.clip(0, 255).astype(np.uint8))


def draw_set(root, count):
    """So many genuine pictures in root/au and manipulated ones in root/tp, of three sizes; those
    with the same number are one scene."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(("au", "tp")):
        (root / name).mkdir(parents=True)
        for i in range(count):
            draw(label, (64, 50, 80)[i % 3], rng).save(root / name / f"{i}.png")


def disturb(monkeypatch, where, call, action):
    """Let `action` come before a call, counted from 1, of the function `where`: (owner, name)."""
    real = getattr(*where)
    calls = []

    def disturbed(*arguments, **names):
        calls.append(1)
        if len(calls) == call:
            action(*arguments)
        return real(*arguments, **names)

    monkeypatch.setattr(*where, disturbed)


def failing(error):
    """An action that raises an error."""
    def action(*arguments):
        raise error
    return action
