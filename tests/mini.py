"""What all tests share: a miniature CLIP and SAPL, which need no file, and pictures."""
import numpy as np
import torch
from PIL import Image

import clip
import ecpl

CONFIG = {"clip": "mini", "levels": (1, 2), "context": 4, "rho": 0.1, "zoom": 1,
          "lora_rank": 0, "lora_share": 0.5, "max_side": 128, "window": 0, "size": 64}


def mini_clip(seed=0):
    """A random CLIP of 2 blocks and width 64, with 16-pixel patches and byte tokens alone."""
    torch.manual_seed(seed)
    model = clip.CLIP(embed_dim=48, image_resolution=64, vision_layers=2, vision_width=64,
                      vision_patch_size=16, context_length=77, vocab_size=514,
                      transformer_width=64, transformer_layers=2)
    model.name = "mini"
    model.sha256 = ""
    return model.eval()


def mini_sapl(kind=ecpl.SAPL, **config):
    """A random SAPL, or a subclass of it, on the miniature CLIP; always the same numbers."""
    return kind(mini_clip(), CONFIG | config).eval()


def photo(width, height, seed=0):
    """Smooth random colours with a square of one colour: PIL RGB."""
    rng = np.random.default_rng(seed)
    colours = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    smooth = colours.resize((width, height), Image.Resampling.BICUBIC)
    array = np.asarray(smooth).copy()                                          # (H, W, 3)
    array[height // 3:height // 2, width // 3:width // 2] = rng.integers(0, 256, 3)
    return Image.fromarray(array)


def draw(label, rng):
    """A smooth gradient of 72 x 72 pixels, the manipulated ones (label 1) with a noisy square.

    rng: a NumPy generator. -> uint8 (72, 72, 3)
    """
    column = np.linspace(rng.integers(40, 90), rng.integers(130, 220), 72)     # (H,)
    array = np.repeat(column[:, None, None], 72, axis=1).repeat(3, axis=2)     # (H, W, 3)
    array += rng.normal(0, 2, array.shape)
    if label == 1:
        y, x = rng.integers(0, 40, 2)
        array[y:y + 30, x:x + 30] += rng.normal(0, 40, (30, 30, 3))
    return array.clip(0, 255).astype(np.uint8)
