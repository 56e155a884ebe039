"""Inference: checkpoints, one picture, the command."""
import csv
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import clip
import data
import ecpl
import infer
import mini
import train

ROOT = Path(__file__).resolve().parents[1]


def make_model(**config):
    """A random SAPL whose maps and scores lie on both sides of 0.5."""
    model = mini.mini_sapl(**config)
    model.map_shift.fill_(0.4)
    scores = [infer.logits_of(model, mini.photo(80, 60, seed))[1] for seed in range(6)]
    model.score_shift.copy_(torch.stack(scores).mean())
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "mini.pt"
    train.save_checkpoint(path, make_model())
    return path


@pytest.fixture
def infer_main(checkpoint):
    """The command in this process, with the miniature model unless another is named."""
    def call(*words):
        return infer.main(["--checkpoint", str(checkpoint), "--device", "cpu", *map(str, words)])
    return call


def read_rows(out):
    """The rows of results.csv, in order."""
    text = (out / "results.csv").read_text("utf-8")
    return list(csv.DictReader(text.splitlines()))


# ------------------------------------------------------------------------------------ checkpoints

@pytest.mark.parametrize("name, rank", [("mini", 0), ("mini", 4), ("ViT-B/16", 4)])
def test_a_checkpoint_gives_the_same_model(tmp_path, monkeypatch, name, rank):
    model = make_model(clip=name, lora_rank=rank)
    if name == "ViT-B/16":                                   # an official CLIP is stored by name
        weights = tmp_path / "ViT-B-16.pt"
        torch.save(mini.mini_clip().state_dict(), weights)
        monkeypatch.setenv("CLIP_CACHE", str(tmp_path))
        monkeypatch.setattr(clip, "OFFICIAL", {name: clip.sha256_of(weights)})

    train.save_checkpoint(tmp_path / "a.pt", model, epoch=3)
    assert infer.load_checkpoint(tmp_path / "a.pt")["epoch"] == 3
    again = infer.load(tmp_path / "a.pt", "cpu", "fp32")
    assert again.config == model.config
    assert not again.training
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)


def test_files_that_are_no_checkpoint_are_refused_in_one_line(tmp_path, checkpoint, recwarn):
    state = infer.load_checkpoint(checkpoint)
    (tmp_path / "cut.pt").write_bytes(checkpoint.read_bytes()[:5000])
    (tmp_path / "folder.pt").mkdir()
    torch.save(state["clip"], tmp_path / "weights.pt")
    torch.save(state | {"format": 5}, tmp_path / "older.pt")
    with zipfile.ZipFile(tmp_path / "openai.pt", "w") as archive:
        for name in ("data.pkl", "constants.pkl", "version"):                  # a TorchScript
            archive.writestr(f"openai/{name}", pickle.dumps([]))

    message = r"^found .*, expected a checkpoint of train.py \(format 6\)$"
    for name in ("missing", "folder", "cut", "weights", "openai", "older"):
        path = tmp_path / f"{name}.pt"
        with pytest.raises(data.BadInput, match=message) as caught:
            infer.load(path, "cpu")
        found = f"{path} (format" if path.is_file() else f"no {path},"
        assert f"found {found}" in str(caught.value)
        assert ("format" in infer.read_dict(path)) == (name == "older")
    assert not recwarn


def test_devices(monkeypatch):
    for gpus, mps, best in ((0, False, "cpu"), (0, True, "mps"), (2, False, "cuda:0")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert infer.pick_device("auto") == torch.device(best)
        assert infer.pick_device(torch.device("cpu")) == torch.device("cpu")
        for name in ("gpu", "cuda:2"):
            with pytest.raises(data.BadInput, match=f"found --device {name}, expected one of auto"):
                infer.pick_device(name)
    assert infer.pick_device("cuda") == torch.device("cuda:0")


@pytest.mark.parametrize("has_bf16, auto", [(True, torch.bfloat16), (False, torch.float32)])
def test_precision(monkeypatch, has_bf16, auto):
    features = {"avx512_bf16": has_bf16}
    capability = (8, 0) if has_bf16 else (7, 5)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for device in (torch.device("cpu"), torch.device("cuda:0")):
        assert infer.pick_dtype("auto", device) == auto
        assert infer.pick_dtype("bf16", device) == torch.bfloat16
        assert infer.pick_dtype("fp32", device) == torch.float32
    monkeypatch.delattr(torch.cpu, "get_capabilities")       # older torch
    assert infer.pick_dtype("auto", torch.device("cpu")) == torch.float32
    with pytest.raises(data.BadInput, match="found --precision fp16, expected auto, bf16 or fp32"):
        infer.load(device="cpu", precision="fp16")
    assert infer.load(device="cpu", precision="bf16").dtype == torch.bfloat16


# ------------------------------------------------------------------------------------ one picture

def test_localize_takes_path_image_array_and_tensor(tmp_path):
    model = make_model()
    picture = mini.photo(70, 45)
    array = np.asarray(picture)                                                # (H, W, 3)
    path = tmp_path / "p.png"
    picture.save(path)
    turned = picture.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x112] = 6                              # shown upright
    expected = infer.localize(model, picture)
    for source in (path, str(path), array, picture.convert("RGBA"), turned, torch.tensor(array)):
        result = infer.localize(model, source)
        assert np.array_equal(result.map, expected.map)
        assert result[2:] == expected[2:]
    for unreadable in (tmp_path / "none.png", np.full((32, 32), np.nan, np.float32)):
        with pytest.raises(data.BadInput, match="none.png|found "):
            infer.localize(model, unreadable)


@pytest.mark.parametrize("size", [(112, 64), (100, 57), (300, 200)])
def test_the_map_is_what_the_network_says_of_the_view(size):
    model = make_model()                                     # max_side 128
    picture = mini.photo(*size)                              # whole patches; padded; reduced
    view = data.view(picture, 128, 16)
    grid = infer.patch_logits(model, view)[None]                               # (1, h, w)
    score = ecpl.pool_score(grid.flatten(1), model.config["rho"]) - model.score_shift  # (1,)
    grid = ecpl.smooth(grid)                                                   # (1, h, w)
    grid = 3 * (grid - np.quantile(grid, 0.2)) / (np.std(grid.numpy()) + 0.5)
    map = F.interpolate(grid[None], view.shape[1:], mode="bilinear")           # (1, 1, H', W')
    width, height = data.reduced_size(size, 128)
    map = F.interpolate(map[..., :height, :width], size[::-1], mode="bilinear")    # (1, 1, H, W)
    map = (map - model.map_shift).sigmoid().numpy()

    result = infer.localize(model, picture)
    assert result.map.dtype == np.float32
    assert np.allclose(result.map, map[0, 0], atol=1e-5)
    assert np.array_equal(result.mask, result.map > 0.5)
    assert result.score == pytest.approx(score.sigmoid().item(), abs=1e-5)
    assert result.area == pytest.approx(result.mask.mean())
    assert result.decision == ("manipulated" if result.score > 0.5 else "genuine")


def test_any_size_is_answered():
    model = make_model(window=64)
    for size in ((1, 1), (15, 100), (17, 31), (2000, 16), (16, 2000), (500, 400)):
        result = infer.localize(model, mini.photo(*size))
        assert result.map.shape == size[::-1]
        assert np.isfinite(result.map).all()
    model.bias.data.fill_(float("nan"))
    with pytest.raises(data.BadInput, match="found NaN or infinity"):
        infer.localize(model, mini.photo(64, 64))


def test_the_second_look_is_mirrored_and_shifts_its_windows():
    model = make_model(window=64)                            # of 4 patches
    image = torch.rand(3, 80, 112)                           # 5 rows, 7 columns of patches

    def look(image, rows, columns):
        """The logits of windows whose sides, in pixels, are given, put together."""
        strips = [[model(window[None]).logits[0] for window in strip.split(columns, dim=2)]
                  for strip in image.split(rows, dim=1)]
        return torch.cat([torch.cat(strip, dim=1) for strip in strips])        # (5, 7)

    with torch.inference_mode():
        first = look(image, [32, 48], [48, 64])
        second = look(image.flip(2), [16, 32, 32], [16, 64, 32]).flip(1)
        whole = look(image, [80], [112]) + look(image.flip(2), [80], [112]).flip(1)
    assert torch.allclose(infer.patch_logits(model, image), (first + second) / 2, atol=1e-5)
    model.config["window"] = 0                               # no limit
    assert torch.allclose(infer.patch_logits(model, image), whole / 2, atol=1e-5)


def test_tiles_are_few_and_nearly_equal_and_leave_no_gap():
    for length in range(1, 200):
        for size in (1, 2, 3, 8, 32):
            starts, ends = zip(*infer.tiles(length, size, shifted=False))
            sides = np.subtract(ends, starts)
            assert (0, *ends) == (*starts, length)
            assert len(sides) == math.ceil(length / size)
            assert max(sides) - min(sides) <= 1


def test_shifted_tiles_meet_inside_the_others():
    assert infer.tiles(64, 32, shifted=True) == [(0, 16), (16, 48), (48, 64)]
    for length in range(1, 200):
        for size in (1, 2, 6, 8, 32):                        # a window of one patch cannot shift
            plain = infer.tiles(length, size, shifted=False)
            starts, ends = zip(*infer.tiles(length, size, shifted=True))
            assert (0, *ends) == (*starts, length)
            assert max(np.subtract(ends, starts)) <= size
            assert min(np.subtract(ends, starts)) >= 1
            if size >= 6:
                assert len(starts) == (1 if len(plain) == 1 else len(plain) + 1)
                assert set(starts) & {start for start, _ in plain} == {0}


def test_the_overlay_accuses_only_a_picture_called_manipulated():
    map = np.zeros((300, 400), np.float32)
    map[100:200, 100:200] = 0.9
    result = infer.Result(map, map > 0.5, 0.9, "manipulated", 0.08)
    picture = Image.new("RGB", (400, 300), (60, 120, 180))
    sheet = infer.overlay(picture, result)
    assert sheet.getpixel((20, 20)) == (60, 120, 180)        # outside: untouched
    assert sheet.getpixel((100, 150)) == (255, 255, 255)     # outline
    red, _, blue = sheet.getpixel((150, 150))                # inside: orange, but not covered
    assert red > 100 and 0 < blue < 180

    sheet = infer.overlay(picture, result._replace(decision="genuine"))
    changed = (np.asarray(sheet) != np.asarray(picture)).any(axis=2)           # (H, W)
    assert not changed[103:197, 103:197].any()               # no tint
    assert 1 <= changed[150, 90:110].sum() <= 2              # a thin line
    assert sheet.getpixel((100, 150)) == (128, 128, 128)


# ------------------------------------------------------------------------------------ the command

GOOD = ("grey.png", "grey.jpg", "inside/grey.png", "blue.jpg", "a b ü.png", "<b>#%41&'.png")
BROKEN = ("cut.jpg", "text.jpg", "1.heic")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A folder of good and bad pictures."""
    folder = tmp_path_factory.mktemp("zoo")
    (folder / "inside").mkdir()
    for seed, name in enumerate(GOOD):
        mini.photo(80, 60, seed).save(folder / name)
    (folder / "cut.jpg").write_bytes((folder / "grey.jpg").read_bytes()[:700])
    (folder / "text.jpg").write_text("hello")
    (folder / "1.heic").write_text("hello")
    return folder


def test_a_folder_of_good_and_bad_pictures(zoo, checkpoint, infer_main, tmp_path, capsys):
    assert infer_main(zoo, "--out", tmp_path) == 1           # some failed
    rows = {Path(row["path"]).relative_to(zoo).as_posix(): row for row in read_rows(tmp_path)}
    assert rows.keys() == {*GOOD, *BROKEN}
    model = f"mini.pt {clip.sha256_of(checkpoint)[:12]}"
    for name, row in rows.items():
        assert row["model"] == model
        assert bool(row["error"]) == (name in BROKEN)
        assert row["width"] == ("" if name in BROKEN else "80")
    assert rows["text.jpg"]["error"].startswith("cannot identify image file")
    header = "path,decision,score,area,width,height,seconds,model,error"
    assert list(rows["text.jpg"]) == header.split(",")

    # one picture
    result = infer.localize(infer.load(checkpoint, "cpu"), zoo / "blue.jpg")
    expected = {"map": 255 * result.map, "mask": 255 * result.mask,
                "overlay": infer.overlay(Image.open(zoo / "blue.jpg"), result)}
    for kind, picture in expected.items():
        found = Image.open(tmp_path / f"blue_{kind}.png")
        assert np.allclose(np.asarray(found), picture, atol=0.52)
    row = rows["blue.jpg"]
    assert row["decision"] == result.decision
    assert float(row["score"]) == pytest.approx(result.score, abs=1e-4)
    assert float(row["area"]) == pytest.approx(result.area, abs=1e-4)

    # what is printed
    printed, errors = capsys.readouterr()
    assert len(printed.splitlines()) == len(GOOD)
    answer = f"{result.decision}  score {result.score:.2f}  {result.area:.0%} marked"
    assert f"{zoo}/blue.jpg  {answer}  -> {tmp_path}/blue_overlay.png\n" in printed
    assert errors.count("error: ") == len(BROKEN)
    for words in (f"error: {zoo}/text.jpg: ",
                  f"6 of 9 done: {tmp_path}/report.html", infer.CAUTION):
        assert words in errors

    # report
    page = (tmp_path / "report.html").read_text("utf-8")
    assert infer.CAUTION in page
    assert "max-height" in page                              # 50 x 12000 pixels are no column
    assert "<b>#%41" not in page
    assert page.count("<figure") == page.count(model) == len(GOOD)
    links = re.findall(r'href="([^"]*)"', page)
    assert links == re.findall(r'src="([^"]*)"', page)
    assert {tmp_path / unquote(link) for link in links} == set(tmp_path.glob("*_overlay.png"))
    assert len(set(links)) == len(GOOD)                      # three are named grey
    assert f"\n{answer}\n{zoo}/blue.jpg\n{model}</figure>" in page
    assert f'order:{-1000 * float(row["score"]):.0f}"' in page                 # high scores first


def test_no_run_overwrites_another(zoo, infer_main, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "grey~2_map.png").write_text("a picture of the user")
    train.save_checkpoint(tmp_path / "other.pt", make_model(context=3))

    def another_run(model, picture):
        monkeypatch.undo()
        assert infer_main(zoo / "inside/grey.png", "--out", out) == 0
    mini.disturb(monkeypatch, (infer, "localize"), 1, another_run)
    assert infer_main(zoo / "grey.png", zoo / "grey.jpg", "--out", out) == 0
    first = (out / "grey_overlay.png").read_bytes()
    assert infer_main(zoo / "grey.png", "--out", out, "--checkpoint", tmp_path / "other.pt") == 0

    names = {file.name for file in out.glob("*_overlay.png")}
    assert names == {f"grey{end}_overlay.png" for end in ("", "~3", "~4", "~5")}
    assert (out / "grey_overlay.png").read_bytes() == first
    assert (out / "grey~2_map.png").read_text() == "a picture of the user"
    rows = read_rows(out)
    paths = [row["path"].removeprefix(f"{zoo}/") for row in rows]
    assert paths == ["inside/grey.png", "grey.png", "grey.jpg", "grey.png"]
    assert [row["model"].split()[0] for row in rows] == ["mini.pt"] * 3 + ["other.pt"]
    assert (out / "report.html").read_text("utf-8").count("<figure") == 4


def test_a_full_disk_or_memory_stops_one_picture_and_any_end_keeps_the_rows(
        zoo, infer_main, tmp_path, monkeypatch):
    def end(path):
        errors = [row["error"] for row in read_rows(tmp_path)]   # on the disk before the end
        assert "blue_overlay.png" in errors[0]
        assert errors[1:] == ["MemoryError", ""]
        assert (tmp_path / "report.html").read_text("utf-8").count("</figure>") == 1
        raise NameError("of a test")                         # a programmer's error is not hidden
    (tmp_path / "blue_overlay.png").symlink_to("missing/folder.png")
    mini.disturb(monkeypatch, (data, "open_image"), 2, mini.failing(MemoryError()))
    mini.disturb(monkeypatch, (data, "open_image"), 4, end)
    with pytest.raises(NameError):
        infer_main(*[zoo / name for name in GOOD[-3:] + GOOD[:2]], "--out", tmp_path)


def test_outputs_are_no_pictures_and_each_picture_counts_once(infer_main, tmp_path):
    (tmp_path / "in").mkdir()
    mini.photo(60, 40).save(tmp_path / "in/p.png")
    (tmp_path / "link").symlink_to("in")
    words = [tmp_path / "in", tmp_path / "in/p.png", tmp_path / "link"]
    for out in (tmp_path / "out", tmp_path / "in"):
        for _ in range(2):
            assert infer_main(*words, "--out", out) == 0
        assert [row["path"] for row in read_rows(out)] == [f"{tmp_path}/in/p.png"] * 2


def test_the_real_command_with_names_of_every_kind(checkpoint, tmp_path):
    folder = tmp_path / "a b ü"
    folder.mkdir()
    stems = ("it's \"new\" ü", "caf\udce9", "plain")         # the second is not in UTF-8
    for stem in stems:
        mini.photo(60, 40).save(folder / f"{stem}.png")
    command = [sys.executable, ROOT / "infer.py", folder, "--checkpoint", checkpoint]
    plain_c = os.environ | {"LC_ALL": "C"}
    call = subprocess.run(command, cwd=tmp_path, capture_output=True, env=plain_c, timeout=300)
    assert call.returncode == 0, call.stderr
    assert f"{folder}/plain.png  ".encode() in call.stdout
    out = tmp_path / "out"
    paths = {f"{folder}/{stem}.png".replace("\udce9", "\\udce9") for stem in stems}
    assert {row["path"] for row in read_rows(out)} == paths
    links = re.findall(r'href="([^"]*)"', (out / "report.html").read_text("utf-8"))
    names = {unquote(link, errors="surrogateescape") for link in links}
    assert names == {f"{stem}_overlay.png" for stem in stems}
    assert all((out / name).is_file() for name in names)


def test_control_c_prints_no_traceback_and_keeps_the_rows(checkpoint, tmp_path):
    mini.photo(60, 40).save(tmp_path / "1.png")
    os.mkfifo(tmp_path / "2.png")                            # to open it is to wait for ever
    command = [sys.executable, ROOT / "infer.py", "1.png", "2.png", "--checkpoint", checkpoint]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=tmp_path, **pipes) as call:
        assert b"1.png" in call.stdout.readline()
        call.send_signal(signal.SIGINT)
        assert call.communicate() == (b"", b"")
    assert call.returncode == -signal.SIGINT
    assert [row["path"] for row in read_rows(tmp_path / "out")] == ["1.png"]


def test_wrong_calls_exit_2_with_one_line(zoo, infer_main, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    Path("mine/notes.txt").touch()
    picture = zoo / "grey.png"
    calls = {
        "found no picture at missing.jpg": ["missing.jpg"],
        "found no picture at mine": ["mine"],
        "found no picture at , expected": [""],              # not the current folder
        "mine/notes.txt": [picture, "--out", "mine/notes.txt"],
        "found no lost.pt": [picture, "--checkpoint", "lost.pt"],
        "found --precision fp16": [picture, "--precision", "fp16"],
        "found --device gpu": [picture, "--device", "gpu"],
    }
    for expected, words in calls.items():
        assert infer_main(*words) == 2
        printed, errors = capsys.readouterr()
        assert printed == ""
        assert re.fullmatch(f"error: .*{expected}.*\n", errors)
    assert os.listdir() == ["mine"]                          # no empty folder of outputs

    pytest.raises(SystemExit, infer.main, ["--chec", "x.pt"]).match("2")
