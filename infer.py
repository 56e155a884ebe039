"""SAPL used: is a picture manipulated, and where? The command, and the same as a library.

    python infer.py photo.jpg FOLDER "*.png"         maps, masks, overlays, a table and a report
    result = SAPL.load().localize("photo.jpg")       .map .mask .score .decision .area

Reading order: picture -> answer -> what people look at -> the command. A map is in [0, 1], 1 =
manipulated; above 0.5 it is the mask. Shapes: h, w patch grid, H, W pixels of the picture.
"""
import argparse
import csv
import datetime
import glob
import html
import itertools
import json
import math
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter

import clip
import data
import ecpl

MIN_SIDE = 16              # pixels: less has nothing to compare
CAUTION = ("A score is not a proof: genuine pictures are called manipulated too. "
           "Never decide by it alone.")
SHIPPED = "The shipped model is a small demonstration. "


# ---------------------------------------------------------------------------- picture -> answer

class Result(NamedTuple):
    """What `SAPL.localize` finds in a picture of H x W pixels."""
    map: np.ndarray       # (H, W) float32 in [0, 1], 1 = manipulated
    mask: np.ndarray      # (H, W) bool, map > 0.5
    score: float          # of the whole picture, in [0, 1]
    decision: str         # "manipulated" if score > 0.5, else "genuine"
    area: float           # share of the mask in the picture, in [0, 1]


def starts(length, size):
    """Where windows of a size begin that cover a length, overlapping by a quarter at least."""
    last = max(0, length - size)
    count = 1 + math.ceil(last / (0.75 * size))
    return np.linspace(0, last, count).astype(int).tolist()


class SAPL(ecpl.SAPL):
    """The network of ecpl.py with what it takes to answer for a picture of any size."""

    def view(self, picture):
        """PIL RGB -> what the network sees (3, H', W') in [0, 1]: at most `max_side` long."""
        scale = min(1, self.config["max_side"] / max(picture.size)) / self.cell
        size = [max(1, round(side * scale)) * self.cell for side in picture.size]
        return data.to_tensor(picture.resize(size, Image.Resampling.BICUBIC, reducing_gap=3))

    @torch.inference_mode()
    def patch_logits(self, image):
        """image (3, H', W') -> (h, w) on the CPU: the mean over overlapping windows [ours].

        A tower trained on small pictures does not know what to attend to in large ones. A window
        has config["window"] pixels a side; 0: the whole image.
        """
        p = self.cell
        _, H, W = image.shape
        h, w = H // p, W // p
        size = max(h, w)
        if self.config["window"] > 0:
            size = self.config["window"] // p
        rows = min(size, h)                                           # of a window
        columns = min(size, w)

        total = torch.zeros(h, w)
        times = torch.zeros(h, w)
        for top, left in itertools.product(starts(h, rows), starts(w, columns)):
            window = image[:, p * top:p * (top + rows), p * left:p * (left + columns)]
            with self.autocast():
                logits = self(window[None].to(self.bias.device)).logits       # (1, rows, columns)
            total[top:top + rows, left:left + columns] += logits[0].float().cpu()
            times[top:top + rows, left:left + columns] += 1
        return total / times                                          # (h, w)

    def logits_of(self, picture, raw=False):
        """PIL RGB -> logits of the map (H, W), less their mean, and of the score (), before
        calibration.

        raw: the map as the network gives it, not smoothed. Raises ValueError.
        """
        if min(picture.size) < MIN_SIDE:
            raise ValueError(f"found {picture.width} x {picture.height} pixels, expected at least "
                             f"{MIN_SIDE} a side: there is nothing to compare in it")

        grid = self.patch_logits(self.view(picture))                  # (h, w)
        if not torch.isfinite(grid).all():
            raise ValueError("found an answer that is not a number, expected numbers: the "
                             "checkpoint is damaged, or try --precision fp32")

        score = ecpl.pool_score(grid.flatten()[None], self.config["rho"])[0]      # ()
        grid = grid - grid.mean()                # ours: what is everywhere tells nothing of where
        if not raw:
            grid = ecpl.smooth(grid[None])[0]                         # (h, w)
        W, H = picture.size
        map = F.interpolate(grid[None, None], (H, W), mode="bilinear")[0, 0]      # (H, W)
        return map, score

    def localize(self, source, raw=False):
        """A path, a PIL image or an array (H, W, 3) uint8 -> Result. Raises ValueError,
        one line."""
        if isinstance(source, (str, Path)):
            source = data.open_image(source)
        elif isinstance(source, np.ndarray):
            source = Image.fromarray(source)

        map, score = self.logits_of(data.to_rgb(source), raw)
        map = (map - self.map_shift.cpu()).sigmoid().numpy()          # (H, W)
        score = (score - self.score_shift.cpu()).sigmoid().item()

        mask = map > 0.5                                              # (H, W)
        decision = "manipulated" if score > 0.5 else "genuine"
        return Result(map, mask, score, decision, float(mask.mean()))


# ------------------------------------------------------------------------- what people look at

def overlay(picture, result):
    """The picture, tinted and outlined where the map lies above 0.5 -> PIL RGB."""
    mask = Image.fromarray(result.mask).convert("L")
    canvas = picture.copy()
    canvas.paste("orangered", mask=mask.point(lambda value: 0.4 * value))

    # a contour that shows on dark and on bright: white, with black around it
    thickness = max(picture.size) // 800 + 1
    for colour, reach in (("black", 2 * thickness), ("white", thickness)):
        soft = np.asarray(mask.filter(ImageFilter.BoxBlur(reach)))             # (H, W)
        line = (0 < soft) & (soft < 255)
        canvas.paste(colour, mask=Image.fromarray(line))
    return canvas


REPORT = """<!doctype html><meta charset="utf-8"><title>SAPL report</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body{font:16px sans-serif;margin:1em;background:#f4f4f2}img{width:100%;display:block}
main{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr));gap:1em;
align-items:start}
figure{margin:0;padding:.6em;background:#fff;overflow-wrap:anywhere}.manipulated{color:#a00}
</style><h1>SAPL report</h1>
"""


def write_report(out, rows, names, checkpoint):
    """out/report.html from the rows of results.csv: shows the overlays beside it, highest first."""
    model = f"{Path(checkpoint).name}, SHA-256 {clip.sha256_of(checkpoint)[:12]}"
    caution = SHIPPED + CAUTION if checkpoint == clip.TINY else CAUTION
    done = [row for row in rows if not row["error"]]
    failed = [row for row in rows if row["error"]]
    count = Counter(row["decision"] for row in done)
    parts = [REPORT, f"<p>Pictures: {len(done)}, {count['manipulated']} called manipulated, "
             f"{len(failed)} failed. Model: {html.escape(model)}. {datetime.date.today()}.</p>"
             f"<p><b>{caution}</b> Outlined and tinted: where the map lies above 0.5. Sorted by "
             "score.</p><main>\n"]

    for row in sorted(done, key=lambda row: -float(row["score"])):
        link = quote(f"{names[row['path']]}_overlay.png")
        parts.append(f'<figure><a href="{link}"><img alt="overlay" loading="lazy" src="{link}"></a>'
                     f'<b class="{row["decision"]}">{row["decision"]}</b>, score '
                     f'{float(row["score"]):.2f}, {float(row["area"]):.0%} marked<br>'
                     f'{html.escape(row["path"])}</figure>\n')
    for row in failed:
        parts.append(f"<figure>{html.escape(row['path'])}: {html.escape(row['error'])}</figure>\n")
    (out / "report.html").write_text("".join(parts), encoding="utf-8")


# ---------------------------------------------------------------------------------- the command

FIELDS = ("path", "decision", "score", "area", "width", "height", "seconds", "error")


def collect(arguments, out):
    """Files, folders, globs, "-" (a list on standard input) -> paths, each once, none in `out`."""
    words = []
    for argument in arguments:
        words += sys.stdin.read().splitlines() if argument == "-" else [argument]

    paths = []
    for word in words:
        if not word.strip():                         # it would be this folder
            continue
        if not Path(word).exists():
            found = sorted(glob.glob(word, recursive=True))
            paths += [Path(name) for name in found or [word]]        # a name that fits nothing
            continue
        if not Path(word).is_dir():
            paths.append(Path(word))
            continue
        for path in sorted(Path(word).rglob("*")):
            hidden = path.name.startswith(".")
            ours = out.resolve() in path.resolve().parents
            if path.suffix.lower() in data.EXTENSIONS and not hidden and not ours:
                paths.append(path)

    if not any(path.exists() for path in paths):
        raise ValueError(f"found no picture at {' '.join(arguments)}, expected files "
                         f"({', '.join(data.EXTENSIONS)}), folders or a glob: check the path")
    return list(dict.fromkeys(paths))


def names_for(paths):
    """Paths, texts -> {path: name of its output files}: the stem, numbered if that is taken."""
    names = {}
    taken = set()
    for path in paths:
        stem = Path(path).stem
        name = stem
        number = 1
        while name.lower() in taken:
            number += 1
            name = f"{stem}~{number}"
        taken.add(name.lower())
        names[path] = name
    return names


def read_rows(file):
    """Rows of an earlier results.csv, {path: row}; nothing if there is none."""
    if not file.exists():
        return {}
    with open(file, newline="", encoding="utf-8") as lines:
        reader = csv.DictReader(lines)
        if reader.fieldnames != list(FIELDS):
            raise ValueError(f"found {file}, which is not of this program, expected a folder of "
                             "its own: choose another --out")
        return {row["path"]: row for row in reader}


def answer(model, path, out, name, raw):
    """Localize one picture and write its map, mask and overlay -> its row."""
    row = dict.fromkeys(FIELDS) | {"path": str(path)}
    began = time.time()
    try:
        picture = data.open_image(path)
        result = model.localize(picture, raw)
        row["seconds"] = round(time.time() - began, 3)

        grey = Image.fromarray((255 * result.map + 0.5).astype(np.uint8))
        grey.save(out / f"{name}_map.png", compress_level=1)
        Image.fromarray(result.mask).convert("L").save(out / f"{name}_mask.png")
        overlay(picture, result).save(out / f"{name}_overlay.png", compress_level=1)
        row |= {"decision": result.decision, "score": round(result.score, 4),
                "area": round(result.area, 4), "width": picture.width, "height": picture.height}
    except (ValueError, MemoryError, torch.OutOfMemoryError) as error:       # of this picture alone
        row["error"] = (str(error) or type(error).__name__).removeprefix(f"{path}: ")
    return row


def run(model, args):
    """Answer for all pictures -> exit status: 0 all done, 1 some failed."""
    out = Path(args.out)
    paths = collect(args.paths, out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"found a file, {out}, expected a folder: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    rows = read_rows(out / "results.csv")            # of an earlier run: they stay
    names = names_for(rows | dict.fromkeys(map(str, paths)))

    failed = 0
    try:
        for path in paths:
            name = names[str(path)]
            row = answer(model, path, out, name, args.raw)
            rows[str(path)] = row
            if row["error"]:
                failed += 1
                print(f"error: {path}: {row['error']}", file=sys.stderr)
            if args.json:
                print(json.dumps(row), flush=True)
            elif not row["error"]:
                print(f"{path}  {row['decision']}  score {row['score']:.2f}  {row['area']:.0%} "
                      f"marked  -> {out / name}_overlay.png", flush=True)
    finally:                                         # Ctrl-C too: what is done is kept
        with open(out / "results.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows.values())
        write_report(out, rows.values(), names, args.checkpoint or clip.TINY)

    print(f"{len(paths) - failed} of {len(paths)} pictures done: {out / 'report.html'}, "
          f"{out / 'results.csv'}", file=sys.stderr)
    return 1 if failed else 0


def parse(arguments=None):
    """The command line. Exits with status 2 on what it does not know."""
    parser = argparse.ArgumentParser(description="Is a picture manipulated, and where?",
                                     allow_abbrev=False)
    parser.add_argument("paths", nargs="+", metavar="PATH",
                        help="files, folders, globs, - for a list on standard input")
    parser.add_argument("--checkpoint", metavar="FILE",
                        help="of train.py (default: the shipped weights/tiny.pt)")
    parser.add_argument("--out", metavar="DIR", default="out", help="(default out)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    parser.add_argument("--raw", action="store_true", help="a map that is not smoothed")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto",
                        help="auto: bf16 where the hardware has it")
    return parser.parse_args(arguments)


def main(arguments=None):
    args = parse(arguments)
    try:
        model = SAPL.load(args.checkpoint, args.device, args.precision)
        if not args.checkpoint:
            print(f"note: {SHIPPED}{CAUTION}", file=sys.stderr)
        return run(model, args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: what is done is kept", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
