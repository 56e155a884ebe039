"""Inference: checkpoints, one picture, many pictures, every kind of picture, the command itself."""
import csv
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import clip
import data
import infer

torch.set_num_threads(1)                    # the models here are too small for more
ROOT = Path(__file__).resolve().parents[1]
CONFIG = {"clip": "mini", "levels": (1, 2), "context": 4, "class_words": ("genuine", "manipulated"),
          "edge_source": "image", "prompts": "edges", "dense": "plain", "rho": 0.1, "zoom": 1, "tune": "full",
          "lora_rank": 2, "lora_alpha": 4.0, "lora_share": 0.5, "size": 64, "max_side": 128}


def make_model(kind=infer.SAPL, **config):
    """A random SAPL of width 64 with 16-pixel patches, its bias such that maps lie about 0.5."""
    torch.manual_seed(0)
    backbone = clip.CLIP(embed_dim=48, image_resolution=64, vision_layers=2, vision_width=64,
                         vision_patch_size=16, context_length=77, vocab_size=514,
                         transformer_width=64, transformer_layers=2)
    backbone.name, backbone.sha256 = "mini", ""
    return kind(backbone, CONFIG | config).eval()


def photo(width, height, seed=0):
    """A smooth random picture with a noisy square: PIL RGB."""
    rng = np.random.default_rng(seed)
    array = np.asarray(Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC)).copy()
    array[height // 3:height // 2, width // 3:width // 2] = rng.integers(0, 256, 3)
    return Image.fromarray(array)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "mini.pt"
    infer.save_checkpoint(path, make_model())
    return path


# ---------------------------------------------------------------------------------- checkpoints

@pytest.mark.parametrize("tune", ["full", "lora", "none"])
def test_checkpoint_gives_the_same_model(tmp_path, tune):
    model, image = make_model(tune=tune), torch.rand(2, 3, 64, 96)
    for parameter in model.parameters():                  # some start at zero: move them
        parameter.data += 0.02 * torch.randn_like(parameter)
    model.threshold, model.score_threshold = 0.37, 0.61
    infer.save_checkpoint(tmp_path / "a.pt", model, epoch=3)
    assert infer.load_checkpoint(tmp_path / "a.pt")["epoch"] == 3
    for merge in (True, False):
        again = infer.SAPL.load(tmp_path / "a.pt", device="cpu", merge=merge)
        assert (again.threshold, again.score_threshold) == (0.37, 0.61) and not again.training
        assert torch.allclose(again(image).logits, model(image).logits, atol=1e-4)
    merged = infer.SAPL.load(tmp_path / "a.pt", device="cpu")
    infer.save_checkpoint(tmp_path / "b.pt", merged)
    assert torch.allclose(infer.SAPL.load(tmp_path / "b.pt", device="cpu")(image).logits,
                          model(image).logits, atol=1e-4)


def test_only_the_image_tower_is_tuned():
    for tune, some in (("full", True), ("lora", True), ("none", False)):
        parameters = make_model(tune=tune).clip.named_parameters()
        names = [name for name, p in parameters if p.requires_grad]
        assert bool(names) == some and all(name.startswith("visual.") for name in names)


def test_an_older_checkpoint_decides_at_a_half(tmp_path, checkpoint):
    state = infer.load_checkpoint(checkpoint)
    del state["score_threshold"]
    torch.save(state, tmp_path / "old.pt")
    assert infer.SAPL.load(tmp_path / "old.pt", "cpu").score_threshold == 0.5


def test_devices():
    assert infer.pick_device("cpu") == infer.pick_device(torch.device("cpu")) == torch.device("cpu")
    for name in ["gpu", *["cuda", "cuda:1"] * (not torch.cuda.is_available())]:
        with pytest.raises(ValueError, match=f"no device '{name}', expected one of auto, .*cpu"):
            infer.pick_device(name)


def test_an_interrupted_write_keeps_the_old_file(tmp_path):
    path, model = tmp_path / "m.pt", make_model()
    infer.save_checkpoint(path, model, epoch=1)
    with pytest.raises(Exception):
        infer.save_checkpoint(path, model, epoch=lambda: None)         # cannot be written
    assert infer.load_checkpoint(path)["epoch"] == 1
    infer.save_checkpoint(path, model, epoch=2)
    assert infer.load_checkpoint(path)["epoch"] == 2
    assert infer.load_checkpoint(f"{path}.previous")["epoch"] == 1


def test_wrong_checkpoints_are_named_in_one_line(tmp_path, checkpoint):
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "cut.pt").write_bytes(checkpoint.read_bytes()[:5000])
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pt")
    state = infer.load_checkpoint(checkpoint)
    state["model"].pop("ecpl.bias")
    torch.save(state, tmp_path / "short.pt")
    for name in ("text.pt", "cut.pt", "other.pt", "short.pt", "missing.pt"):
        with pytest.raises((ValueError, OSError), match=name) as error:
            infer.SAPL.load(tmp_path / name)
        assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------- one picture

def test_localize_takes_path_image_and_array(checkpoint, tmp_path):
    model, picture = infer.SAPL.load(checkpoint, device="cpu"), photo(70, 45)
    picture.save(tmp_path / "p.png")
    results = [model.localize(source)
               for source in (tmp_path / "p.png", picture, np.asarray(picture))]
    for result in results:
        assert result.map.shape == result.mask.shape == (45, 70) and result.map.dtype == np.float32
        assert 0 <= result.map.min() and result.map.max() <= 1
        assert np.array_equal(result.mask, result.map > result.threshold)
        assert result.area == pytest.approx(result.mask.mean())
        assert result.decision == ("manipulated" if result.score > 0.5 else "genuine")
        assert np.array_equal(result.map, results[0].map)
    grid, _ = next(model.predict([model.view(picture)[1]]))       # 16-pixel patches: smoothed by 1
    for raw, expected in ((True, grid), (False, infer.ecpl.regions(grid[None], radius=1)[0])):
        expected = infer.resize_map(expected, (45, 70)).numpy()
        assert np.array_equal(model.localize(picture, raw=raw).map, expected)


def test_view_is_bounded_and_fits_the_patches(checkpoint):
    model = infer.SAPL.load(checkpoint, device="cpu")
    for size in ((1, 1), (3000, 20), (20, 3000), (500, 400), (64, 64)):
        own, image = model.view(photo(*size))
        assert own == size[::-1] and max(image.shape[1:]) <= 128
        assert all(side >= 16 and side % 16 == 0 for side in image.shape[1:])
    assert torch.equal(model.view(photo(64, 64))[1], data.to_tensor(photo(64, 64)))      # untouched


def test_nan_is_an_error_never_genuine():
    model = make_model()
    model.ecpl.bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not a number"):
        model.localize(photo(64, 64))


class Local(infer.SAPL):
    """Every patch answers with its own mean brightness, whatever lies around it."""

    def answer(self, image):
        grid = torch.nn.functional.avg_pool2d(image.mean(dim=1), 16)                 # (B, h, w)
        return grid, grid.flatten(1).mean(dim=1)


def test_windows_are_means_of_what_each_window_says():
    model, image = make_model(window=64), torch.rand(2, 3, 64, 112)
    with torch.no_grad():
        left, right = (model(image[..., x:x + 64]).logits for x in (0, 48))
    middle = (left[..., 3:] + right[..., :1]) / 2
    expected = torch.cat([left[..., :3], middle, right[..., 1:]], dim=2)             # (2, 4, 7)
    grids, scores = model.answer(image)
    assert torch.allclose(grids, expected.sigmoid(), atol=1e-5)
    pooled = infer.ecpl.pool_score(expected.flatten(1), 0.1).sigmoid()
    assert torch.allclose(scores, pooled, atol=1e-5)
    whole, small = make_model(), image[..., :64]
    assert torch.allclose(model.answer(small)[0], whole.answer(small)[0], atol=1e-6)
    for length in range(1, 40):                                   # windows leave no gap
        begin = infer.starts(length, 8)
        assert set(range(length)) <= {s + k for s in begin for k in range(8)}
        assert max(begin) + min(8, length) <= length


class Local(infer.SAPL):
    """Every patch answers with its own mean brightness, whatever lies around it."""

    def forward(self, image):
        grid = torch.nn.functional.avg_pool2d(image.mean(dim=1), 16)                 # (B, h, w)
        return infer.ecpl.Output(grid, None, None, None, None, None)


@pytest.mark.parametrize("window", [0, 64])
def test_tiles_equal_the_whole_at_its_own_size(window):
    model, picture = make_model(Local, window=window), photo(400, 336)
    grid = model.answer(data.to_tensor(picture)[None])[0][0]                         # (21, 25)
    tiled = model.tiles(picture, grid)
    assert tiled.shape == grid.shape and torch.allclose(tiled, grid, atol=1e-5)


def test_tiles_take_any_size():
    model, small = make_model(), photo(112, 96)              # no larger than a view: the same
    assert np.array_equal(model.localize(small, tiles=True).map, model.localize(small).map)
    for odd in ((401, 339), (1000, 17), (15, 700), (16, 129)):
        result = model.localize(photo(*odd), tiles=True)
        assert result.map.shape == odd[::-1] and np.isfinite(result.map).all()


def test_the_whole_picture_decides_the_score():
    model, picture = make_model(), photo(500, 300)
    assert model.localize(picture, tiles=True).score == model.localize(picture).score
    assert not np.array_equal(model.localize(picture, tiles=True).map, model.localize(picture).map)


# ------------------------------------------------------------------------------ many pictures

def test_answers_do_not_depend_on_batch_or_order(monkeypatch):
    model = make_model()
    sizes = [(64, 64), (96, 64), (64, 64), (200, 90), (64, 64), (96, 64), (64, 64)]
    sources = [photo(*size, seed) for seed, size in enumerate(sizes)]
    def answers(order, batch):
        monkeypatch.setattr(infer, "BATCH", batch)
        found = infer.stream(model, [sources[i] for i in order], infer.open_picture, False, False)
        return {i: (source, result) for i, (source, result, _) in zip(order, found)}
    forward, backward = answers(range(7), 8), answers(range(6, -1, -1), 1)
    for i, source in enumerate(sources):
        assert forward[i][0] is source
        assert np.allclose(forward[i][1].map, backward[i][1].map, atol=1e-4)
        assert forward[i][1].score == pytest.approx(backward[i][1].score, abs=1e-4)
        assert np.allclose(forward[i][1].map, model.localize(source).map, atol=1e-4)


def bomb():
    """A PNG whose header claims 60000 x 60000 pixels."""
    def chunk(kind, body):
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
            + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))


GOOD = {"grey.png": "L", "palette.png": "P", "alpha.png": "RGBA", "cmyk.jpg": "CMYK",
        "a b ü 图.png": "RGB"}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A folder of pictures of every kind, good and bad."""
    folder = tmp_path_factory.mktemp("zoo")
    for name, mode in GOOD.items():
        photo(60, 40).convert(mode).save(folder / name)
    Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60) * 27).save(folder / "deep.png")
    exif = Image.Exif()
    exif[0x112] = 6                                          # turned by 90 degrees
    photo(60, 40).save(folder / "rotated.jpg", exif=exif)
    photo(60, 40).save(folder / "moving.webp", save_all=True, append_images=[photo(60, 40, 1)])
    photo(1, 1).save(folder / "one.png")
    photo(2000, 5).save(folder / "long.png")
    (folder / "inside").mkdir()
    photo(60, 40).save(folder / "inside/grey.png")           # the same stem in another folder
    photo(60, 40).save(folder / "grey.jpg")                  # and with another extension
    (folder / ".hidden.png").write_text("skipped")
    (folder / "notes.txt").write_text("skipped")
    (folder / "cut.jpg").write_bytes((folder / "grey.jpg").read_bytes()[:700])
    (folder / "text.jpg").write_text("hello")
    (folder / "empty.png").touch()
    (folder / "bomb.png").write_bytes(bomb())
    (folder / "link.jpg").symlink_to("nowhere")
    return folder


BROKEN = {"cut.jpg", "text.jpg", "empty.png", "bomb.png", "link.jpg"}


def test_every_kind_of_picture(zoo, checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    assert infer.main([str(zoo), "--checkpoint", str(checkpoint), "--out", str(out)]) == 1
    printed, errors = capsys.readouterr()
    with open(out / "results.csv", newline="", encoding="utf-8") as file:
        rows = {os.path.relpath(row["path"], zoo): row for row in csv.DictReader(file)}
    assert list(next(iter(rows.values()))) == [
        "path", "score", "decision", "threshold", "area", "width", "height", "seconds", "error"]
    assert len(rows) == 12 + len(BROKEN) and len(printed.splitlines()) == 12
    assert {name for name, row in rows.items() if row["error"]} == BROKEN
    for name in BROKEN:
        assert any(line.startswith("error: ") and name in line for line in errors.splitlines())
        assert rows[name]["decision"] == "" and name in rows[name]["error"]
    assert "moving.webp: first of 2 frames" in errors and "Traceback" not in errors
    maps = sorted(str(path.relative_to(out)) for path in out.rglob("*_map.png"))
    assert len(maps) == 12 and "inside/grey_map.png" in maps
    assert len([m for m in maps if "grey" in m]) == 3
    for name, row in rows.items():
        if not row["error"]:
            assert row["decision"] in ("manipulated", "genuine") and 0 <= float(row["score"]) <= 1
    assert (rows["rotated.jpg"]["width"], rows["rotated.jpg"]["height"]) == ("40", "60")
    for kind in ("map", "mask", "overlay"):
        image = Image.open(out / f"rotated_{kind}.png")
        assert image.size == (40, 60) and image.mode == ("RGB" if kind == "overlay" else "L")
    assert set(np.unique(np.asarray(Image.open(out / "rotated_mask.png")))) <= {0, 255}
    report = (out / "report.html").read_text(encoding="utf-8")
    assert report.count("<figure") == 17 and report.count("data:image/jpeg") == 24
    assert "http" not in report and " src=\"data:" in report


def test_outputs_are_the_result(checkpoint, tmp_path):
    photo(90, 50).save(tmp_path / "p.png")
    infer.main([str(tmp_path / "p.png"), "--checkpoint", str(checkpoint),
                "--out", str(tmp_path / "o")])
    result = infer.SAPL.load(checkpoint, device="cpu").localize(tmp_path / "p.png")
    map = np.asarray(Image.open(tmp_path / "o/p_map.png"), dtype=np.float32) / 255
    assert np.abs(map - result.map).max() <= 0.5 / 255 + 1e-4
    assert np.array_equal(np.asarray(Image.open(tmp_path / "o/p_mask.png")) == 255, result.mask)


def test_colours_and_contour():
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    weights = np.array([0.2126, 0.7152, 0.0722])
    lightness = (np.asarray(infer.colour(ramp), dtype=float)[0] / 255) ** 2.2 @ weights
    assert (np.diff(lightness) >= -1e-4).all()                # brighter always means likelier
    grey, map = Image.new("RGB", (300, 200), (90, 90, 90)), np.zeros((200, 300), np.float32)
    map[40:100, 50:150] = 0.9
    result = infer.Result(map, map > 0.5, 0.8, "manipulated", 0.5, 0.1)
    overlay = np.asarray(infer.overlay(grey, result, Image.fromarray((255 * map).astype(np.uint8))))
    assert (overlay[70, 49:51] == 255).all() and (overlay[20, 200] == 90).all()
    assert (overlay[70, 100] != 90).any() and (overlay[-14:] == 255).any()       # legend


def test_lists_globs_json_and_skipping(zoo, checkpoint, tmp_path, capsys, monkeypatch):
    def run(*words):
        status = infer.main([*words, "--checkpoint", str(checkpoint)])
        return status, capsys.readouterr().out.splitlines()
    status, lines = run(str(zoo / "*.png"), "--json")
    rows = [json.loads(line) for line in lines]
    assert status == 1 and len(rows) == 9 and all("score" in row for row in rows)
    monkeypatch.setattr("sys.stdin", open(os.devnull))
    assert run(str(tmp_path / "none"))[0] == run(str(tmp_path))[0] == run("-")[0] == 2
    out = str(tmp_path / "o")
    assert run(str(zoo / "grey.png"), "--out", out)[1] and not run(
        str(zoo / "grey.png"), "--out", out, "--skip-existing")[1]
    assert len(run(str(zoo / "grey.*"), "--out", out, "--skip-existing")[1]) == 1
    assert len(Path(out, "results.csv").read_text().splitlines()) == 3


def test_thresholds_move_mask_and_decision(zoo, checkpoint, capsys):
    def run(*words):
        infer.main([str(zoo / "grey.png"), "--checkpoint", str(checkpoint), "--json", *words])
        row = json.loads(capsys.readouterr().out)
        return row["decision"], row["area"], row["threshold"]
    decision, area, _ = run()
    assert run("--threshold", "0") == (decision, 1.0, 0.0)
    assert run("--threshold", "1") == (decision, 0.0, 1.0)
    assert run("--score-threshold", "0") == ("manipulated", area, 0.5)
    assert run("--score-threshold", "1") == ("genuine", area, 0.5)


def test_an_error_without_words_is_named(zoo, checkpoint, monkeypatch, capsys):
    def full(path):
        raise MemoryError
    monkeypatch.setattr(data, "open_image", full)
    assert infer.main([str(zoo / "grey.png"), "--checkpoint", str(checkpoint)]) == 1
    assert capsys.readouterr() == ("", "error: MemoryError\n")


def test_what_is_done_survives_an_interruption(zoo, checkpoint, tmp_path, monkeypatch):
    shown = []
    def interrupt(*arguments):
        if len(shown) == 2:
            raise KeyboardInterrupt
        shown.append(arguments)
        return ""
    monkeypatch.setattr(infer, "show", interrupt)
    assert infer.main([str(zoo), "--checkpoint", str(checkpoint), "--out", str(tmp_path)]) == 130
    assert sum(",0.5," in line for line in (tmp_path / "results.csv").read_text().splitlines()) == 2


def test_the_real_command(zoo, checkpoint, tmp_path):
    command = [sys.executable, ROOT / "infer.py"]
    paths = [f"{zoo}/grey.png", f"{zoo}/a b ü 图.png"]
    listed = subprocess.run([*command, "-", "--checkpoint", checkpoint], capture_output=True,
                            text=True, input="\n".join(paths), timeout=300)
    assert listed.returncode == 0, listed.stderr
    assert [line.split("  ")[0] for line in listed.stdout.splitlines()] == paths


def test_no_model_is_said_in_one_line(zoo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(infer, "SHIPPED", tmp_path / "weights/tiny.pt")
    assert infer.main([str(zoo)]) == 2
    error = capsys.readouterr().err
    assert "train.py" in error and "--checkpoint" in error and len(error.splitlines()) == 1
