"""Plot logs of training runs: label_loss, patch_loss and val_auc by epoch, one line a run.

    python tests/plot.py runs/a/log.csv runs/b/log.csv --out runs/plot.png
"""
import argparse
import csv
import itertools
import sys

from PIL import Image, ImageDraw, ImageFont

PANELS = ("label_loss", "patch_loss", "val_auc")          # columns of log.csv
COLOURS = ("#1f5fa8", "#c8501e", "#2f8f5b", "#7b4fa3", "#8a8a2a", "#444444")
WIDTH, HEIGHT, MARGIN = 640, 520, 90                       # of a panel, pixels
SHRINK = 2                                                 # draw large, then reduce: smooth lines


def read_log(file):
    """A log.csv -> {column: values, one an epoch}."""
    with open(file, newline="") as text:
        rows = list(csv.DictReader(text))
    names = [name for name in ("epoch", *PANELS) if name in rows[0]]
    if len(names) < 2:
        raise LookupError(f"found none of {', '.join(PANELS)} in {file}")
    return {name: [float(row[name]) for row in rows] for name in names}


def draw_panel(name, logs):
    """One column of all logs over the epochs -> PIL RGB."""
    panel = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(panel)
    font = ImageFont.load_default(size=24)
    values = [value for log in logs for value in log[name]]
    low = min(values)
    high = max(values)
    room = 0.05 * (high - low) or 0.1
    low -= room
    high += room
    last = max(max(log["epoch"]) for log in logs)

    def place(epoch, value):
        x = MARGIN + (WIDTH - 1.5 * MARGIN) * (epoch - 1) / max(1, last - 1)
        y = HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * (value - low) / (high - low)
        return x, y

    # axes and their numbers
    draw.text((WIDTH / 2, MARGIN / 2), name, "black", font, anchor="mm")
    draw.line([place(1, high), place(1, low), place(last, low)], "black", 2)
    for value in (low + room, (low + high) / 2, high - room):
        x, y = place(1, value)
        draw.line([(x - 8, y), (x, y)], "black", 2)
        draw.text((x - 12, y), f"{value:.2f}", "black", font, anchor="rm")
    for epoch in range(1, int(last) + 1):
        x, y = place(epoch, low)
        draw.text((x, y + 24), str(epoch), "black", font, anchor="mm")
    draw.text((WIDTH / 2, HEIGHT - MARGIN / 4), "epoch", "black", font, anchor="mm")

    for log, colour in zip(logs, itertools.cycle(COLOURS)):
        points = [place(epoch, value) for epoch, value in zip(log["epoch"], log[name])]
        draw.line(points, colour, 4)
        for x, y in points:
            draw.ellipse((x - 6, y - 6, x + 6, y + 6), colour)
    return panel


def main(arguments=None):
    """The command line; returns the exit status: 0 done, 2 wrong call."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("logs", nargs="+", metavar="LOG", help="log.csv of train.py")
    parser.add_argument("--out", default="runs/plot.png")
    args = parser.parse_args(arguments)
    try:
        logs = [read_log(file) for file in args.logs]
        # a run on genuine photos alone has no val_auc
        panels = [name for name in PANELS if all(name in log for log in logs)]
        sheet = Image.new("RGB", (len(panels) * WIDTH, HEIGHT))
        for i, name in enumerate(panels):
            sheet.paste(draw_panel(name, logs), (i * WIDTH, 0))
        sheet.reduce(SHRINK).save(args.out)
    except (OSError, LookupError, ValueError) as error:
        print(f"error: {error}; expected log.csv files of train.py, and a file for --out",
              file=sys.stderr)
        return 2
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
