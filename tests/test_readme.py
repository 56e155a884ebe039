"""The README stays true: its commands, paths, symbols and line counts are those of the code."""
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
MODULES = ("clip", "ecpl", "hecl", "data", "train", "infer")
BLOCKS = re.findall(r"```sh\n(.*?)```", TEXT, re.S)
COMMANDS = [line.split("  #")[0].strip() for block in BLOCKS
            for line in block.replace("\\\n", " ").splitlines() if line.strip()]
PYTHON = sorted({c for c in COMMANDS if re.match(r"(python|torchrun)\b", c)})


def run(*words):
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True,
                          timeout=60)


SMALL = {     # what a command gets besides, so that it ends in seconds
    "train.py --data": "--size 64 --epochs 1 --batch 4 --workers 0",
    "train.py --synthesize": "--size 32 --count 8 --epochs 1 --batch 4 --workers 0",
    "train.py --out": "--workers 0",
    "data.py --synthesize": "--count 2 --size 64",
}
NOT_HERE = ("-m venv", "-m pytest", "tests/benchmark.py")          # CI runs the first two


def place(folder):
    """A folder that looks like the repository, with pictures under the README's names for them."""
    for name in (*(f"{module}.py" for module in MODULES), "tests", "weights"):
        (folder / name).symlink_to(ROOT / name)
    rng = np.random.default_rng(0)
    for name in ("au", "tp", "mask"):
        for where in ("FOLDER", "SET"):
            (folder / where / name).mkdir(parents=True)
            for i in range(8 if where == "FOLDER" else 1):
                array = rng.integers(0, 256, (64, 80, 3), np.uint8)
                array = (array > 200) * np.uint8(255) if name == "mask" else array
                Image.fromarray(array).save(folder / where / name / f"{i}.png")
    for other in ("PHOTOS", "PICTURES"):
        (folder / other).symlink_to(folder / "FOLDER" / "au")


def test_there_are_commands():
    assert len(PYTHON) >= 8 and any(c.startswith("torchrun") for c in PYTHON)


def test_every_command_runs(tmp_path):
    """As a reader types them, one after the other, with small pictures and small sizes; those that
    need OpenAI's files end with the one line that says where to put them."""
    place(tmp_path)
    torchrun = f"{sys.executable} -m torch.distributed.run"
    run_here, failures = [c for c in COMMANDS if not any(word in c for word in NOT_HERE)], []
    assert set(PYTHON) - set(run_here) and len(run_here) >= 8
    for i, command in enumerate(run_here):
        more = [words for key, words in SMALL.items() if key in command]
        line = re.sub("^python", sys.executable, command).replace("torchrun", torchrun)
        line = f"{line} {' '.join(more)}".replace("nproc_per_node=4", "nproc_per_node=1")
        if "train.py" in command and "--resume" not in command and i != first_training(run_here):
            line += f" --out runs/{i}"                 # one run a folder
        official = "ViT-B/16" in command
        line += " --clip-cache nothing" * official
        result = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True,
                                timeout=120, env={**os.environ, "https_proxy": "http://127.0.0.1:9",
                                                  "OMP_NUM_THREADS": "1"})
        said = f"{command}: {result.returncode} {result.stdout[-500:]} {result.stderr[-500:]}"
        if official and "cannot be downloaded" not in result.stderr or \
                not official and result.returncode:
            failures.append(said)
    assert not failures, "\n".join(failures)
    assert (tmp_path / "out" / "report.html").exists() and (tmp_path / "sheet.png").exists()


def first_training(commands):
    return next(i for i, command in enumerate(commands) if "train.py" in command)


@pytest.mark.parametrize("name", ["clip", "ecpl", "hecl", "data"])
def test_every_demo_prints_its_lesson(name):
    result = run(f"{name}.py")
    assert result.returncode == 0 and len(result.stdout.splitlines()) > 5, result.stderr


def test_paths_exist():
    quoted = r"`((?:tests|weights|\.ci)/[\w./-]+|[\w-]+\.(?:py|md|txt)|LICENSE)`"
    named = set(re.findall(quoted, TEXT))
    named |= set(re.findall(r"\]\((?!http)([^)#]+)\)", TEXT))
    assert named and [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_symbols_import():
    symbols = re.findall(rf"`((?:{'|'.join(MODULES)})\.[A-Za-z_][\w.]*)`", TEXT)
    symbols = [s for s in symbols if not s.endswith(".py")]
    assert len(symbols) > 10
    for symbol in symbols:
        module, *names = symbol.split(".")
        value = importlib.import_module(module)
        for name in names:
            value = getattr(value, name)


def test_line_counts_are_right_within_a_tenth():
    rows = re.findall(r"^\| `([\w/.]+\.py)` \| (\d+) \|", TEXT, re.M)
    assert {f"{name}.py" for name in MODULES} <= {path for path, _ in rows}
    for path, count in rows:
        lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
        assert abs(lines - int(count)) <= 0.1 * lines, (path, lines, count)
