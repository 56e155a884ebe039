"""Turn a finished training run into the shipped weights/tiny.pt: fp16, calibrated. Run by hand.

    python weights/ship.py --checkpoint runs/NAME/best.pt --photos GENUINE_PHOTOS

train.validate calibrates it, so that 0.5 is the threshold, on genuine photos kept out of training.
"""
import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import clip                                                     # noqa: E402 (path first)
import infer                                                    # noqa: E402
import train                                                    # noqa: E402
from weights import synthesis                                   # noqa: E402


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--checkpoint", required=True, help="best.pt of a training run")
    parser.add_argument("--photos", required=True, help="folder or list of genuine photos")
    parser.add_argument("--out", default=str(clip.TINY))
    args = parser.parse_args(arguments)
    model = infer.load(args.checkpoint, "cpu", "fp32")
    model.config["clip"] = "tiny"

    model.half().float()                                        # calibrate what will be stored
    photos = synthesis.genuine_pictures(args.photos)
    train.validate(model, photos)
    shifts = model.map_shift.clone(), model.score_shift.clone()
    model.half()
    model.map_shift, model.score_shift = shifts                 # these two stay exact
    train.save_checkpoint(args.out, model)
    print(f"{args.out}: {Path(args.out).stat().st_size / 1e6:.1f} MB, calibrated on {len(photos)} "
          f"photos: map {shifts[0]:.2f}, score {shifts[1]:.2f}")


if __name__ == "__main__":
    main()
