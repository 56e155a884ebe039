"""Turn a finished training into the shipped weights/tiny.pt. Run by hand.

    python weights/ship.py --checkpoint runs/NAME/best.pt --photos GENUINE_PHOTOS

The thresholds are set on genuine photos that trained nothing, as `train.py` sets them on its validation
pictures: at most 10 % of their pixels and of the pictures are flagged. No mask, no test set.
"""
import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import infer                                                    # noqa: E402 (path first)
import train                                                    # noqa: E402

SETTINGS = {"clip": "tiny", "window": 256, "max_side": 512, "tune": "full"}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint", required=True, help="best.pt or last.pt of a training")
    parser.add_argument("--photos", required=True, help="folder of genuine photos")
    parser.add_argument("--out", default=str(ROOT / "weights" / "tiny.pt"))
    args = parser.parse_args()
    model = infer.SAPL.load(args.checkpoint, "cpu")
    model.config = {key: value for key, value in model.config.items()
                    if key in infer.ECPL_KEYS + ("lora_rank", "lora_alpha")} | SETTINGS
    photos = sorted(Path(args.photos).iterdir())
    train.set_thresholds(model, photos)
    infer.save_checkpoint(args.out, model.half())
    print(f"{args.out}: {Path(args.out).stat().st_size / 1e6:.1f} MB, from {len(photos)} photos: "
          f"threshold {model.threshold:.3f}, score threshold {model.score_threshold:.3f}")


if __name__ == "__main__":
    main()
