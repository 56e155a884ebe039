"""Inference: checkpoints, one picture, the command."""
import csv
import os
import pickle
import re
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
    with open(out / "results.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# ------------------------------------------------------------------------------------ checkpoints

@pytest.mark.parametrize("name, rank", [("mini", 0), ("mini", 4), ("ViT-B/16", 4)])
def test_a_checkpoint_gives_the_same_model(tmp_path, monkeypatch, name, rank):
    model = make_model(clip=name, lora_rank=rank)
    if name == "ViT-B/16":                                   # of an official CLIP only the name
        torch.save(mini.mini_clip().state_dict(), tmp_path / "ViT-B-16.pt")
        model.clip.name = name
        model.clip.sha256 = clip.sha256_of(tmp_path / "ViT-B-16.pt")
        monkeypatch.setenv("CLIP_CACHE", str(tmp_path))
        monkeypatch.setattr(clip, "OFFICIAL", {name: model.clip.sha256})
    train.save_checkpoint(tmp_path / "a.pt", model, epoch=3)
    assert infer.load_checkpoint(tmp_path / "a.pt")["epoch"] == 3
    again = infer.load(tmp_path / "a.pt", "cpu", "fp32")
    assert again.config == model.config and not again.training
    assert (again.clip.name, again.clip.sha256) == (name, model.clip.sha256)
    assert (again.map_shift, again.score_shift) == (model.map_shift, model.score_shift)
    image = torch.rand(1, 3, 64, 48)
    with torch.no_grad():
        assert torch.allclose(again(image).logits, model(image).logits)


def test_files_that_are_no_checkpoint_are_refused_in_one_line(tmp_path, checkpoint, recwarn):
    state = infer.load_checkpoint(checkpoint)
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").touch()
    (tmp_path / "cut.pt").write_bytes(checkpoint.read_bytes()[:5000])
    (tmp_path / "folder.pt").mkdir()
    torch.save(state["clip"], tmp_path / "weights.pt")
    torch.save(state | {"format": 4}, tmp_path / "older.pt")
    with zipfile.ZipFile(tmp_path / "openai.pt", "w") as archive:
        for name in ("data.pkl", "constants.pkl", "version"):                  # a TorchScript
            archive.writestr(f"openai/{name}", pickle.dumps([]))
    damaged = "damaged or no checkpoint, expected one of train.py"
    expected = dict.fromkeys(("text", "empty", "cut", "weights", "openai"), damaged)
    expected |= dict.fromkeys(("missing", "folder"), "expected a checkpoint of train.py: check the")
    expected["older"] = "in format 4, expected format 5: .*train it again"
    for name, words in expected.items():
        with pytest.raises(ValueError, match=f"^found .*{name}.pt.*{words}.*$"):
            infer.load(tmp_path / f"{name}.pt", "cpu")
        assert infer.is_checkpoint(tmp_path / f"{name}.pt") == (name == "older")
    assert infer.is_checkpoint(checkpoint) and not infer.is_checkpoint("ViT-B/16") and not recwarn


def test_devices(monkeypatch):
    cpu = torch.device("cpu")
    for gpus, mps, best in ((0, False, "cpu"), (0, True, "mps"), (2, False, "cuda:0")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert infer.pick_device("auto") == torch.device(best)
        assert infer.pick_device("cpu") == infer.pick_device(cpu) == cpu
        for name in ("gpu", "cuda:2"):
            with pytest.raises(ValueError, match=f"found --device {name}, expected one of auto, "):
                infer.pick_device(name)
    assert infer.pick_device("cuda") == torch.device("cuda:0")
    assert infer.pick_device(torch.device("cuda:1")) == torch.device("cuda:1")


@pytest.mark.parametrize("amx, avx512", [(0, 0), (1, 0), (0, 1), (None, None)])
def test_precision(monkeypatch, amx, avx512):
    # None: a torch without its private functions
    for name, value in (("_is_amx_tile_supported", amx), ("_is_avx512_bf16_supported", avx512)):
        monkeypatch.setattr(torch.cpu, name, lambda value=value: bool(value), raising=False)
        if value is None:
            monkeypatch.delattr(torch.cpu, name)
    cpu = torch.device("cpu")
    assert infer.pick_dtype("auto", cpu) == (torch.bfloat16 if amx or avx512 else torch.float32)
    assert infer.pick_dtype("bf16", cpu) == torch.bfloat16
    assert infer.pick_dtype("fp32", cpu) == torch.float32
    with pytest.raises(ValueError, match="found --precision fp16, expected auto, bf16 or fp32"):
        infer.load(device="cpu", precision="fp16")


# ------------------------------------------------------------------------------------ one picture

def test_localize_takes_path_image_array_and_tensor(tmp_path):
    model = make_model()
    picture = mini.photo(70, 45)
    array = np.asarray(picture)                                                # (H, W, 3)
    picture.save(tmp_path / "p.png")
    turned = picture.transpose(Image.Transpose.ROTATE_90)    # shown upright by its EXIF
    turned.getexif()[0x112] = 6
    expected = infer.localize(model, picture)
    sources = [tmp_path / "p.png", str(tmp_path / "p.png"), array, picture.convert("RGBA"), turned,
               (array / 255).astype(np.float32), torch.tensor(array)]
    for source in sources:
        result = infer.localize(model, source)
        assert np.array_equal(result.map, expected.map)
        assert result[2:] == expected[2:]
    for unreadable in (tmp_path / "none.png", np.full((32, 32, 3), np.nan)):
        with pytest.raises(ValueError, match="none.png|found "):
            infer.localize(model, unreadable)


@pytest.mark.parametrize("size", [(112, 64), (100, 57), (300, 200)])
def test_the_map_is_what_the_network_says_of_the_view(size):
    model = make_model()                                     # max_side 128
    picture = mini.photo(*size)                              # whole patches; padded; reduced
    view = data.view(picture, 128, 16)
    grid = infer.patch_logits(model, view)[None]                               # (1, h, w)
    score = ecpl.pool_score(grid.flatten(1), model.config["rho"]) - model.score_shift  # (1,)
    grid = ecpl.smooth(grid - grid.mean())                                     # (1, h, w)
    map = F.interpolate(grid[None], view.shape[1:], mode="bilinear")           # (1, 1, H', W')
    width, height = data.reduced_size(size, 128)
    map = F.interpolate(map[..., :height, :width], size[::-1], mode="bilinear")[0, 0]  # (H, W)
    result = infer.localize(model, picture)
    assert np.allclose(result.map, (map - model.map_shift).sigmoid().numpy(), atol=1e-5)
    assert result.score == pytest.approx(score.sigmoid().item(), abs=1e-5)
    assert result.map.dtype == np.float32 and np.array_equal(result.mask, result.map > 0.5)
    assert 0 < result.area < 1 and result.area == pytest.approx(result.mask.mean())
    assert result.decision == ("manipulated" if result.score > 0.5 else "genuine")


def test_any_size_is_answered_but_what_has_nothing_to_compare():
    model = make_model(window=64)
    for size in ((16, 16), (17, 31), (2000, 16), (16, 2000), (500, 400)):
        result = infer.localize(model, mini.photo(*size))
        assert result.map.shape == size[::-1] and np.isfinite(result.map).all()
    for size in ((1, 1), (15, 100), (100, 15)):
        with pytest.raises(ValueError, match="found .* expected at least 16 a side"):
            infer.localize(model, Image.new("RGB", size))
    model.bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="found NaN or infinity"):
        infer.localize(model, mini.photo(64, 64))


def test_each_window_is_judged_twice_the_second_time_mirrored():
    model = make_model(window=64)
    image = torch.rand(3, 64, 112)                           # windows of 4 and of 3 patches
    expected = []
    with torch.inference_mode():
        for window in (image[None, ..., :64], image[None, ..., 64:]):
            straight = model(window).logits                                    # (1, 4, columns)
            mirrored = model(window.flip(3)).logits.flip(2)                    # (1, 4, columns)
            expected.append(torch.cat([straight, (straight + mirrored) / 2]))  # (2, 4, columns)
    for looks, grid in enumerate(torch.cat(expected, dim=2), start=1):         # (4, 7)
        assert torch.allclose(infer.patch_logits(model, image, looks), grid, atol=1e-5)


def test_tiles_are_few_equal_and_leave_no_gap():
    for length in range(1, 200):
        for size in (1, 3, 8, 32):
            starts, ends = zip(*infer.tiles(length, size))
            sides = np.subtract(ends, starts)
            assert (0, *ends) == (*starts, length) and (len(sides) - 1) * size < length
            assert max(sides) <= size and max(sides) - min(sides) <= 1


def test_bf16_and_fp32_agree(checkpoint):
    exact = infer.load(checkpoint, "cpu", "fp32")
    short = infer.load(checkpoint, "cpu", "bf16")
    assert (exact.dtype, short.dtype) == (torch.float32, torch.bfloat16)
    for seed in range(4):
        one = infer.localize(exact, mini.photo(96, 64, seed))
        two = infer.localize(short, mini.photo(96, 64, seed))
        assert two.score == pytest.approx(one.score, abs=0.01)
        assert 0 < np.abs(one.map - two.map).max() < 0.02    # it did compute in another format


def test_the_overlay_accuses_only_a_picture_called_manipulated():
    map = np.zeros((300, 400), np.float32)
    map[100:200, 100:200] = 0.9
    result = infer.Result(map, map > 0.5, 0.9, "manipulated", 0.08)
    picture = Image.new("RGB", (400, 300), (60, 120, 180))
    sheet = infer.overlay(picture, result)
    assert sheet.getpixel((20, 20)) == (60, 120, 180)        # outside: untouched
    red, _, blue = sheet.getpixel((150, 150))                # inside: orange, but not covered
    assert red > 100 and 0 < blue < 180
    assert {(0, 0, 0), (255, 255, 255)} <= {sheet.getpixel((x, 150)) for x in range(95, 105)}
    result = result._replace(score=0.1, decision="genuine")
    sheet = infer.overlay(picture, result)
    changed = (np.asarray(sheet) != np.asarray(picture)).any(axis=2)           # (H, W)
    assert not changed[:98].any() and not changed[103:197, 103:197].any()      # no tint
    assert 1 <= changed[150, 90:110].sum() <= 2              # a thin line
    assert {sheet.getpixel((100, y)) for y in range(110, 190)} == {(128, 128, 128)}


# ------------------------------------------------------------------------------------ the command

GOOD = {"grey.png": "L", "palette.png": "P", "alpha.png": "RGBA", "cmyk.jpg": "CMYK",
        "a b ü.png": "RGB", "<b>#%41&'.png": "RGB", "inside/grey.png": "RGB", "grey.jpg": "RGB"}
BROKEN = {"cut.jpg", "text.jpg", "empty.png", "thin.png"}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A folder of pictures of every kind, good and bad."""
    folder = tmp_path_factory.mktemp("zoo")
    (folder / "inside").mkdir()
    for seed, (name, mode) in enumerate(GOOD.items()):
        mini.photo(80, 60, seed).convert(mode).save(folder / name)
    mini.photo(200, 15).save(folder / "thin.png")
    (folder / "cut.jpg").write_bytes((folder / "grey.jpg").read_bytes()[:700])
    for name in ("text.jpg", "empty.png", "1.heic"):
        (folder / name).write_text("hello" * (name != "empty.png"))
    return folder


@pytest.fixture
def answered(zoo, infer_main, tmp_path):
    """The folder of answers for the zoo, and its rows by the path below the zoo."""
    out = tmp_path / "out"
    assert infer_main(zoo, "--out", out) == 1                # some failed
    return out, {Path(row["path"]).relative_to(zoo).as_posix(): row for row in read_rows(out)}


def test_every_kind_of_picture_gets_its_row_and_outputs(answered, zoo, checkpoint):
    out, rows = answered
    header = "path,decision,score,area,width,height,seconds,model,error\n"
    assert (out / "results.csv").read_text(encoding="utf-8").startswith(header)
    assert rows.keys() == GOOD.keys() | BROKEN
    for name, row in rows.items():
        assert row["model"] == f"mini.pt {clip.sha256_of(checkpoint)[:12]}"
        values = [row[key] for key in ("decision", "score", "area", "width", "height")]
        if name in BROKEN:
            assert set(values) == {""} and row["error"].count("\n") == 0       # no answer
        else:
            assert values[3:] == ["80", "60"] and float(row["seconds"]) >= 0 and not row["error"]
    assert rows["thin.png"]["error"].startswith("found 200 x 15 pixels, expected at least 16")

    result = infer.localize(infer.load(checkpoint, "cpu"), zoo / "cmyk.jpg")
    expected = {"map": 255 * result.map, "mask": 255 * result.mask,
                "overlay": infer.overlay(data.open_image(zoo / "cmyk.jpg"), result)}
    for kind, picture in expected.items():
        assert np.allclose(np.asarray(Image.open(out / f"cmyk_{kind}.png")), picture, atol=0.52)
    assert rows["cmyk.jpg"]["decision"] == result.decision
    assert float(rows["cmyk.jpg"]["score"]) == pytest.approx(result.score, abs=1e-4)
    assert float(rows["cmyk.jpg"]["area"]) == pytest.approx(result.area, abs=1e-4)


def test_the_report_shows_each_row_with_its_overlay_and_model(answered):
    out, rows = answered
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "http" not in page and "<script" not in page and "<b>#%41" not in page
    assert infer.CAUTION in page and 'name="viewport"' in page
    assert "max-height" in page and "object-fit" in page     # 50 x 12000 pixels are no column
    assert page.count("<figure") == page.count(rows["grey.png"]["model"]) == len(rows)
    links = re.findall(r'href="([^"]*)"', page)
    assert links == re.findall(r'src="([^"]*)"', page)
    assert {out / unquote(link) for link in links} == set(out.glob("*_overlay.png"))
    assert len(set(links)) == len(GOOD)                      # three are named grey

    decisions = [row["decision"] for row in rows.values()]
    for words in ("manipulated", "genuine; most suspicious part outlined"):
        assert page.count(f">{words}<") == decisions.count(words.split(";")[0]) > 0
    orders = [int(order) for order in re.findall(r"order:(-?\d+)", page)]
    scores = [-1000 * float(row["score"] or -0.001) for row in rows.values()]  # failed ones last
    assert orders == pytest.approx(scores, abs=1)


def test_lines_say_what_was_found_and_where_to_look(capsys, answered, zoo):
    out, _ = answered
    printed, errors = capsys.readouterr()
    assert len(printed.splitlines()) == len(GOOD)
    form = r"(manipulated|genuine)  score 0\.\d\d  \d+% marked  -> "
    assert re.search(f"(?m)^{zoo}/cmyk.jpg  {form}{out}/cmyk_overlay.png$", printed)
    assert errors.count("error: ") == len(BROKEN) and f"error: {zoo / 'text.jpg'}: " in errors
    assert "left out 1 .heic" in errors and f"8 of 12 done: {out}/report.html" in errors


def test_later_runs_and_other_models_add_rows_and_overwrite_nothing(zoo, infer_main, tmp_path):
    train.save_checkpoint(tmp_path / "other.pt", make_model(context=3))
    out = tmp_path / "o"
    assert infer_main(zoo / "grey.png", "--out", out) == 0
    first = (out / "grey_overlay.png").read_bytes()
    assert infer_main(zoo / "inside/grey.png", zoo / "grey.jpg", "--out", out) == 0
    assert infer_main(zoo / "grey.png", "--out", out, "--checkpoint", tmp_path / "other.pt") == 0
    names = {file.name for file in out.glob("*.png")}
    assert len(names) == 4 * 3
    assert all(re.fullmatch(r"grey(~[0-9a-f]{8})?_(map|mask|overlay)\.png", x) for x in names)

    for path in (zoo / "grey.png", zoo / "grey.jpg"):        # again: their outputs, not more
        assert infer_main(path, "--out", out) == 0
    assert {file.name for file in out.glob("*.png")} == names
    assert (out / "grey_overlay.png").read_bytes() == first
    paths = [row["path"].removeprefix(f"{zoo}/") for row in read_rows(out)]
    assert paths == ["grey.png", "inside/grey.png", "grey.jpg", "grey.png", "grey.png", "grey.jpg"]
    models = [row["model"].split()[0] for row in read_rows(out)]
    assert models == ["mini.pt"] * 3 + ["other.pt"] + ["mini.pt"] * 2
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("<figure") == 6 and page.count("other.pt") == 1


def test_two_runs_at_once_keep_all_rows(zoo, infer_main, tmp_path, monkeypatch):
    localize = infer.localize
    def with_another_run(model, picture):
        monkeypatch.undo()
        assert infer_main(zoo / "inside/grey.png", "--out", tmp_path) == 0
        return localize(model, picture)
    monkeypatch.setattr(infer, "localize", with_another_run)
    assert infer_main(zoo / "grey.png", zoo / "cmyk.jpg", "--out", tmp_path) == 0
    assert len(read_rows(tmp_path)) == len(list(tmp_path.glob("*_overlay.png"))) == 3
    assert (tmp_path / "report.html").read_text(encoding="utf-8").count("<figure") == 3


@pytest.mark.parametrize("end", [KeyboardInterrupt, NameError])
def test_what_is_done_survives_any_end(zoo, infer_main, tmp_path, monkeypatch, capsys, end):
    localize = infer.localize
    def ending(model, picture):
        if (tmp_path / "results.csv").stat().st_size > 100:
            assert len(read_rows(tmp_path)) == 1             # on the disk before the end
            raise end("of a test")
        return localize(model, picture)
    monkeypatch.setattr(infer, "localize", ending)
    words = [zoo / "cmyk.jpg", zoo / "alpha.png", zoo / "grey.jpg", "--out", tmp_path]
    if end is NameError:
        with pytest.raises(NameError):                       # a programmer's error is not hidden
            infer_main(*words)
    else:
        assert infer_main(*words) == 130
        assert "interrupted: what is done is kept" in capsys.readouterr().err
    assert len(read_rows(tmp_path)) == 1
    assert (tmp_path / "report.html").read_text(encoding="utf-8").count("<figure") == 1


def test_what_does_not_fit_disk_or_memory_fails_alone(zoo, infer_main, tmp_path, monkeypatch):
    (tmp_path / "palette_map.png").mkdir()
    open_image = data.open_image
    def small_memory(path):
        if path.name == "alpha.png":
            raise MemoryError
        return open_image(path)
    monkeypatch.setattr(data, "open_image", small_memory)
    paths = [zoo / name for name in ("palette.png", "alpha.png", "grey.png")]
    assert infer_main(*paths, "--out", tmp_path) == 1
    errors = [row["error"] for row in read_rows(tmp_path)]
    assert "palette_map.png" in errors[0] and errors[1:] == ["MemoryError", ""]


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
    names = ["it's \"new\" ü.png", "x" * 250 + ".png", "caf\udce9.png", "plain.png"]
    for name in names:
        mini.photo(60, 40).save(folder / name)
    command = [sys.executable, ROOT / "infer.py", folder, "--checkpoint", checkpoint]
    plain_c = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0"}
    call = subprocess.run(command, cwd=tmp_path, capture_output=True, env=plain_c, timeout=300)
    assert call.returncode == 0, call.stderr
    paths = {f"{folder}/{name}".replace("\udce9", "\\xe9") for name in names}
    assert {row["path"] for row in read_rows(tmp_path / "out")} == paths
    assert f"{folder}/plain.png  " in call.stdout.decode()
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    links = re.findall(r'href="([^"]*)"', page)
    assert len(links) == 4 and all((tmp_path / "out" / unquote(link)).is_file() for link in links)
    for stem in (names[0].removesuffix(".png"), "x" * 200):
        assert (tmp_path / f"out/{stem}_overlay.png").is_file()


def test_control_c_while_torch_is_imported_prints_no_traceback(tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    call = subprocess.run([sys.executable, ROOT / "infer.py", "x.png"], capture_output=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)}, timeout=60)
    assert call.returncode != 0 and call.stderr == b""


def test_without_a_checkpoint_the_shipped_model_answers_with_its_caution(zoo, tmp_path, capsys):
    assert infer.main([str(zoo / "grey.png"), "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert infer.CAUTION in capsys.readouterr().err
    assert read_rows(tmp_path)[0]["model"] == f"tiny.pt {clip.sha256_of(clip.TINY)[:12]}"


def test_wrong_calls_exit_2_with_one_line(zoo, infer_main, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    Path("mine/results.csv").write_text("name,grade\nme,1\n")
    picture = zoo / "grey.png"
    calls = {
        "found no picture at missing.jpg": ["missing.jpg"],
        "found no picture at mine": ["mine"],
        "found no picture at , expected": [""],              # not the current folder
        "cannot write into mine/results.csv": [picture, "--out", "mine/results.csv"],
        "found another header in mine/results.csv": [picture, "--out", "mine"],
        "found no lost.pt": [picture, "--checkpoint", "lost.pt"],
        "found --precision fp16": [picture, "--precision", "fp16"],
        "found --device gpu": [picture, "--device", "gpu"],
    }
    for expected, words in calls.items():
        assert infer_main(*words) == 2
        printed, errors = capsys.readouterr()
        assert printed == "" and expected in errors
        assert errors.startswith("error: ") and errors.count("\n") == 1
    assert os.listdir("mine") == ["results.csv"] and not Path("out").exists()

    for words in (["--threshold", "44"], ["--chec", "x"], []):
        pytest.raises(SystemExit, infer.main, words).match("2")
