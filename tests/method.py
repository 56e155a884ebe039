"""The README's row of pictures: the steps of the method on tests/forged.png.

    python tests/method.py [OUT.png]       default: out/method.png
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent))

import clip                                                    # noqa: E402 (path first)
import data                                                    # noqa: E402
import ecpl                                                    # noqa: E402
import infer                                                   # noqa: E402

CROP = (100, 0, 356, 256)                                      # left, top, right, bottom
STEP = 264                                                     # pixels from panel to panel


@torch.no_grad()
def steps_of(model, picture):
    """PIL RGB -> {name of a step: (H, W) or (h, w), values in [0, 1]}."""
    image = data.view(picture, model.config["max_side"], model.cell)[None]     # (1, 3, H, W)
    h = image.shape[2] // model.cell
    w = image.shape[3] // model.cell
    levels, dense, _ = model.read(image)                           # [(1, N, Dv)], (1, N, D)
    variation = ecpl.feature_variation(levels[-1], h, w).mean(dim=-1)          # (1, N)
    result = infer.localize(model, picture)

    # the map of CLIP alone: its own features, and sentences of one word, "genuine", "manipulated"
    words = clip.tokenize(ecpl.CLASSES, vocab_size=len(model.clip.token_embedding.weight))
    text = F.normalize(model.clip.encode_text(words), dim=-1)                  # (C, D)
    alone = model.similarity(dense, text[None])                                # (1, N)
    alone = (alone - alone.mean()) / alone.std()                   # for display only
    return {"soft edges": ecpl.soft_edges(image)[0, 0],                        # (H, W)
            "feature variation": variation.view(h, w) / variation.max(),       # (h, w)
            "CLIP alone": alone.view(h, w).sigmoid(),                          # (h, w)
            "map": torch.from_numpy(result.map),                               # (H, W)
            "mask": torch.from_numpy(result.mask)}                             # (H, W)


def main(out="out/method.png"):
    """Print the shape and mean of each step and draw all of them beside the picture."""
    picture = data.open_image(TESTS / "forged.png").crop(CROP)
    model = infer.load(device="cpu", precision="fp32")
    steps = steps_of(model, picture)

    row = Image.new("RGB", ((len(steps) + 1) * STEP, STEP), "white")
    row.paste(picture, (4, 4))
    for i, (name, x) in enumerate(steps.items(), start=1):
        print(f"{name:18} {str(tuple(x.shape)):11} mean {x.float().mean():.2f}")
        panel = Image.fromarray((255 * x).byte().numpy())
        row.paste(panel.resize(picture.size), (STEP * i + 4, 4))
    Path(out).parent.mkdir(exist_ok=True)
    row.save(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
