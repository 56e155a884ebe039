"""Turn a finished training into the shipped weights/tiny.pt: fp16, calibrated. Run by hand.

    python weights/ship.py --checkpoint runs/NAME/best.pt --photos GENUINE_PHOTOS

Map and score are calibrated to 0.5 on genuine photos that trained nothing (train.calibrate): at
most 7 % of their pixels and 10 % of the pictures lie above, once resized and degraded. No mask.
"""
import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import clip                                                     # noqa: E402 (path first)
import ecpl                                                     # noqa: E402
import infer                                                    # noqa: E402
import train                                                    # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint", required=True, help="best.pt of a training")
    parser.add_argument("--photos", required=True, help="folder of genuine photos")
    parser.add_argument("--out", default=str(clip.TINY))
    args = parser.parse_args()

    model = infer.SAPL.load(args.checkpoint, "cpu")
    clip.merge_lora(model.clip)
    model.clip.name = "tiny"
    config = {key: model.config[key] for key in train.MODEL}
    model.config = config | {"clip": "tiny", "lora_rank": 0, "lora_share": 0.0}
    model.half().float()                                        # calibrate what will be stored
    photos = sorted(Path(args.photos).iterdir())
    train.calibrate(model, photos)
    shifts = model.map_shift.clone(), model.score_shift.clone()
    model.half()
    model.map_shift, model.score_shift = shifts                 # these two stay exact
    ecpl.save_checkpoint(args.out, model)
    print(f"{args.out}: {Path(args.out).stat().st_size / 1e6:.1f} MB, calibrated on {len(photos)} "
          f"photos: map {shifts[0]:.2f}, score {shifts[1]:.2f}")


if __name__ == "__main__":
    main()
