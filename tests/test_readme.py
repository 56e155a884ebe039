"""The README stays true: its commands, paths, symbols and line counts are those of the code."""
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.fixture(scope="module")
def flags():
    """{script: flags its --help names}, asked once a script."""
    found = {}

    def ask(script):
        if script not in found:
            result = run(script, "--help")
            assert result.returncode == 0, result.stderr
            found[script] = set(re.findall(r"--[a-z][a-z0-9-]*", result.stdout))
        return found[script]
    return ask


def test_there_are_commands():
    assert len(PYTHON) >= 8 and any(c.startswith("torchrun") for c in PYTHON)


@pytest.mark.parametrize("command", PYTHON)
def test_commands_name_scripts_and_flags_that_exist(command, flags):
    words = shlex.split(command)
    if words[1] == "-m":
        assert words[2] in ("pytest", "venv")
        return
    script = next(word for word in words if word.endswith(".py"))
    assert (ROOT / script).is_file(), script
    used = {word.split("=")[0] for word in words[words.index(script):] if word.startswith("--")}
    if used:
        assert used <= flags(script), used - flags(script)


@pytest.mark.parametrize("name", ["clip", "ecpl", "hecl"])
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
