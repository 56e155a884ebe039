"""Inference: one picture, what people look at, many pictures of every kind, the command itself."""
import csv
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from PIL import Image

import clip
import data
import ecpl
import infer
import mini
from test_data import claim

ROOT = Path(__file__).resolve().parents[1]
WEB = ROOT.parent / "shared/data/web"
HEADER = "path,decision,score,area,width,height,seconds,error"


def make_model(**config):
    """A random SAPL whose maps and scores lie on both sides of 0.5."""
    model = mini.mini_sapl(infer.SAPL, **config)
    model.map_shift.fill_(0.4)
    model.score_shift.fill_(1.7)
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "mini.pt"
    ecpl.save_checkpoint(path, make_model())
    return path


@pytest.fixture
def infer_main(checkpoint):
    """The command in this process, with the miniature model -> exit status."""
    def call(*words):
        return infer.main([*map(str, words), "--checkpoint", str(checkpoint), "--device", "cpu"])
    return call


def read_rows(out):
    """results.csv of a folder -> {path: row}"""
    with open(out / "results.csv", newline="", encoding="utf-8") as file:
        return {row["path"]: row for row in csv.DictReader(file)}


# ----------------------------------------------------------------------------------- one picture

def test_localize_takes_path_image_and_array(tmp_path):
    model = make_model()
    picture = mini.photo(70, 45)
    picture.save(tmp_path / "p.png")
    first = model.localize(picture)
    for source in (tmp_path / "p.png", str(tmp_path / "p.png"), np.asarray(picture),
                   picture.convert("RGBA")):
        result = model.localize(source)
        assert np.array_equal(result.map, first.map)
        assert result[2:] == first[2:]
    with pytest.raises(ValueError, match="none.png"):
        model.localize(tmp_path / "none.png")


def test_the_result_agrees_with_itself():
    model = make_model()
    decisions = set()
    for seed in range(6):
        result = model.localize(mini.photo(140, 110, seed))
        assert result.map.shape == result.mask.shape == (110, 140)
        assert (result.map.dtype, result.mask.dtype) == (np.float32, bool)
        assert 0 <= result.map.min() and result.map.max() <= 1
        assert np.array_equal(result.mask, result.map > 0.5)
        assert 0 < result.mask.sum() < result.mask.size      # the model tries both
        assert result.area == pytest.approx(result.mask.mean())
        assert (result.decision == "manipulated") == (result.score > 0.5)
        decisions.add(result.decision)
    assert decisions == {"manipulated", "genuine"}


@pytest.mark.parametrize("raw", [False, True])
def test_the_map_is_what_the_network_says_above_its_mean_smoothed_and_shifted(raw):
    model = make_model()
    model.map_shift.fill_(0.4)
    picture = mini.photo(112, 64)                            # whole patches: nothing is resampled
    with torch.inference_mode():
        output = model(data.to_tensor(picture)[None])
    grid = output.logits - output.logits.mean()                                # (1, 4, 7)
    if not raw:
        grid = ecpl.smooth(grid)
    expected = torch.nn.functional.interpolate(grid[None], (64, 112), mode="bilinear")[0, 0]
    result = model.localize(picture, raw=raw)
    assert np.allclose(result.map, (expected - 0.4).sigmoid().numpy(), atol=1e-5)
    assert result.score == pytest.approx((output.score[0] - 1.7).sigmoid().item(), abs=1e-5)


def test_what_the_whole_picture_has_changes_the_score_alone():
    model = make_model()
    picture = mini.photo(112, 64)
    map, score = model.logits_of(picture)
    model.bias.data += 3                                     # of every patch
    other_map, other_score = model.logits_of(picture)
    assert torch.allclose(map, other_map, atol=1e-4)
    assert torch.allclose(score + 3, other_score, atol=1e-4)


def test_calibration_puts_the_shift_at_one_half():
    model = make_model()
    picture = mini.photo(96, 80)
    logits, score = model.logits_of(picture)
    model.map_shift.copy_(logits.median())
    assert model.localize(picture).area == pytest.approx(0.5, abs=0.05)
    model.score_shift.copy_(score - 0.1)
    assert model.localize(picture).decision == "manipulated"
    model.score_shift.copy_(score + 0.1)
    assert model.localize(picture).decision == "genuine"


@pytest.mark.parametrize("size", [(16, 16), (17, 31), (2000, 16), (16, 2000), (500, 400)])
def test_any_size(size):
    model = make_model(window=64)
    result = model.localize(mini.photo(*size))
    assert result.map.shape == size[::-1]
    assert np.isfinite(result.map).all()


def test_the_view_is_bounded_and_fits_the_patches():
    model = make_model()                                     # max_side 128, 16-pixel patches
    for size in ((16, 16), (3000, 20), (20, 3000), (500, 400), (90, 41)):
        _, height, width = model.view(mini.photo(*size)).shape
        assert max(height, width) <= 128
        assert height % 16 == width % 16 == 0 and min(height, width) >= 16
    picture = mini.photo(64, 96)
    assert torch.equal(model.view(picture), data.to_tensor(picture))           # untouched


@pytest.mark.parametrize("size", [(1, 1), (15, 100), (100, 15)])
def test_too_small_a_picture_is_an_error_never_an_answer(size):
    picture = Image.new("RGB", size)
    with pytest.raises(ValueError, match="found .* expected at least 16 a side"):
        make_model().localize(picture)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_not_a_number_is_an_error_never_an_answer(number):
    model = make_model()
    model.bias.data.fill_(number)
    with pytest.raises(ValueError, match="not a number"):
        model.localize(mini.photo(64, 64))


def test_windows_are_the_mean_of_what_each_window_says():
    model = make_model(window=64)
    image = torch.rand(3, 64, 112)
    with torch.inference_mode():
        left = model(image[None, :, :, :64]).logits[0]                         # (4, 4)
        right = model(image[None, :, :, 48:]).logits[0]                        # (4, 4)
    both = (left[:, 3:] + right[:, :1]) / 2                                    # (4, 1)
    expected = torch.cat([left[:, :3], both, right[:, 1:]], dim=1)             # (4, 7)
    assert torch.allclose(model.patch_logits(image), expected, atol=1e-5)
    small = image[:, :, :64]                                 # no larger than a window
    assert torch.allclose(model.patch_logits(small), left, atol=1e-5)
    whole = make_model(window=0).patch_logits(image)
    assert not torch.allclose(whole, expected, atol=1e-3)


def test_windows_leave_no_gap():
    for length in range(1, 40):
        begins = infer.starts(length, 8)
        covered = set()
        for begin in begins:
            covered |= set(range(begin, begin + min(8, length)))
        assert covered == set(range(length))
        assert all(b - a <= 6 for a, b in zip(begins, begins[1:]))             # a quarter overlaps


@pytest.mark.parametrize("shift, decision", [(0.5, "manipulated"), (4.5, "genuine")])
def test_bf16_and_fp32_agree(checkpoint, shift, decision):
    exact = infer.SAPL.load(checkpoint, "cpu", "fp32")
    short = infer.SAPL.load(checkpoint, "cpu", "bf16")
    assert (exact.dtype, short.dtype) == (torch.float32, torch.bfloat16)
    differ = 0
    for seed in range(4):
        picture = mini.photo(96, 64, seed)
        exact.score_shift.fill_(shift)
        short.score_shift.fill_(shift)
        one = exact.localize(picture)
        two = short.localize(picture)
        assert one.decision == two.decision == decision
        assert two.score == pytest.approx(one.score, abs=0.005)
        assert np.abs(one.map - two.map).max() < 0.02
        differ += not np.array_equal(one.map, two.map)
    assert differ                                            # it did compute in another format


@pytest.mark.skipif(not WEB.is_dir(), reason="needs the shared pictures")
def test_bf16_and_fp32_agree_with_the_shipped_model():
    exact = infer.SAPL.load(device="cpu", precision="fp32")
    short = infer.SAPL.load(device="cpu", precision="bf16")
    for path in sorted(WEB.glob("*/*.jpg"))[::24]:
        picture = data.open_image(path)
        picture.thumbnail((192, 192))                        # to save time
        one = exact.localize(picture)
        two = short.localize(picture)
        assert two.score == pytest.approx(one.score, abs=0.02)       # 0.016 was measured
        assert one.decision == two.decision or abs(one.score - 0.5) < 0.02
        assert two.area == pytest.approx(one.area, abs=0.02)


# ------------------------------------------------------------------------- what people look at

def square_result(level=0.9):
    """A map of 400 x 300 pixels, `level` in a square and 0.45 around it, and its Result."""
    map = np.full((300, 400), 0.45, np.float32)
    map[100:200, 100:250] = level
    mask = map > 0.5
    return infer.Result(map, mask, 0.84, "manipulated", float(mask.mean()))


def near_the_border(mask, reach):
    """Pixels at most `reach` away from the border of a mask -> (H, W) bool."""
    image = Image.fromarray(mask).convert("L")
    larger = np.asarray(image.filter(infer.ImageFilter.MaxFilter(2 * reach + 1)))
    smaller = np.asarray(image.filter(infer.ImageFilter.MinFilter(2 * reach + 1)))
    return larger != smaller


@pytest.mark.parametrize("level", [0, 90, 255])
def test_the_overlay_changes_nothing_but_the_region_and_its_contour(level):
    picture = Image.new("RGB", (400, 300), (level, level, level))
    result = square_result()
    canvas = np.asarray(infer.overlay(picture, result)).astype(int)            # (H, W, 3)
    assert canvas.shape == (300, 400, 3)
    contour = near_the_border(result.mask, 10)
    outside = ~result.mask & ~contour
    inside = result.mask & ~contour
    assert (canvas[outside] == level).all()                  # 0.45 is not tinted
    tinted = np.abs(canvas[inside] - level).max(axis=1)
    assert (tinted > 30).all()

    # the contour stands out on its way around, whatever is below
    differs = np.abs(canvas - level).min(axis=2) > 100                         # (H, W)
    assert differs[:, 90:110].any(axis=1)[100:200].all()
    assert differs[90:110].any(axis=0)[100:250].all()


def test_the_overlay_of_a_picture_without_a_region_is_the_picture():
    picture = mini.photo(400, 300)
    sheet = infer.overlay(picture, square_result(level=0.49))
    assert np.array_equal(np.asarray(sheet), np.asarray(picture))


# ---------------------------------------------------------------------------------- many pictures

GOOD = {"grey.png": "L", "palette.png": "P", "alpha.png": "RGBA", "cmyk.jpg": "CMYK",
        "a b ü 图.png": "RGB", "<b>#%41&'.png": "RGB"}
BROKEN = {"cut.jpg", "text.jpg", "empty.png", "bomb.png", "link.jpg", "damaged.tif",
          "one.png", "thin.png"}
ALL_GOOD = len(GOOD) + 6                                     # those of every_kind, too


def damaged_tiff():
    """A TIFF that says its pixels lie at a fraction: Pillow raises TypeError."""
    buffer = io.BytesIO()
    mini.photo(60, 40).save(buffer, "TIFF")
    whole = np.array([273, 4], np.uint16).tobytes()          # StripOffsets, a whole number
    fraction = np.array([273, 5], np.uint16).tobytes()
    assert buffer.getvalue().count(whole) == 1
    return buffer.getvalue().replace(whole, fraction)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A folder of pictures of every kind, good and bad."""
    folder = tmp_path_factory.mktemp("zoo")
    small = mini.photo(60, 40)
    for name, mode in GOOD.items():
        small.convert(mode).save(folder / name)
    deep = np.arange(2400, dtype=np.uint16).reshape(40, 60) * 27
    Image.fromarray(deep).save(folder / "deep.png")
    exif = Image.Exif()
    exif[0x112] = 6                                          # turned by 90 degrees
    small.save(folder / "rotated.jpg", exif=exif)
    small.save(folder / "moving.webp", save_all=True, append_images=[mini.photo(60, 40, 1)])
    mini.photo(2000, 16).save(folder / "long.png")
    (folder / "inside").mkdir()
    small.save(folder / "inside/grey.png")                   # the same stem in another folder
    small.save(folder / "grey.jpg")                          # and with another extension

    Image.new("RGB", (1, 1)).save(folder / "one.png")
    mini.photo(200, 15).save(folder / "thin.png")
    (folder / "cut.jpg").write_bytes((folder / "grey.jpg").read_bytes()[:700])
    (folder / "text.jpg").write_text("hello")
    (folder / "empty.png").touch()
    (folder / "damaged.tif").write_bytes(damaged_tiff())
    (folder / "link.jpg").symlink_to("nowhere")
    claim(folder / "bomb.png", 60_000, 60_000)

    (folder / ".hidden.png").write_text("skipped")
    (folder / "notes.txt").write_text("skipped")
    return folder


@pytest.fixture(scope="module")
def answered(zoo, checkpoint, tmp_path_factory):
    """The folder of answers for the zoo, and its rows by the path below the zoo."""
    out = tmp_path_factory.mktemp("answers") / "out"
    status = infer.main([str(zoo), "--checkpoint", str(checkpoint), "--device", "cpu",
                         "--out", str(out)])
    assert status == 1                                       # some failed
    rows = {}
    for path, row in read_rows(out).items():
        rows[Path(path).relative_to(zoo).as_posix()] = row
    return out, rows


def test_every_kind_of_picture_gets_its_row(answered):
    out, rows = answered
    assert (out / "results.csv").read_text(encoding="utf-8").splitlines()[0] == HEADER
    assert len(rows) == ALL_GOOD + len(BROKEN)
    assert {name for name, row in rows.items() if row["error"]} == BROKEN
    for name, row in rows.items():
        if name in BROKEN:
            values = [row[key] for key in ("decision", "score", "area", "width", "height")]
            assert set(values) == {""}                       # no answer
            assert "\n" not in row["error"]
        else:
            score = float(row["score"])
            assert row["decision"] == ("manipulated" if score > 0.5 else "genuine")
            assert 0 <= score <= 1 and 0 <= float(row["area"]) <= 1
            assert float(row["seconds"]) >= 0
    assert rows["one.png"]["error"].startswith("found 1 x 1 pixels, expected at least 16 a side")
    assert (rows["rotated.jpg"]["width"], rows["rotated.jpg"]["height"]) == ("40", "60")


def test_every_picture_gets_a_map_a_mask_and_an_overlay(answered):
    out, _ = answered
    for kind, mode in (("map", "L"), ("mask", "L"), ("overlay", "RGB")):
        files = list(out.glob(f"*_{kind}.png"))
        assert len(files) == ALL_GOOD                        # none wrote over another
        assert len([file for file in files if file.name.startswith("grey")]) == 3
        image = Image.open(out / f"rotated_{kind}.png")
        assert image.size == (40, 60)                        # upright
        assert image.mode == mode
    mask = np.asarray(Image.open(out / "rotated_mask.png"))
    assert set(np.unique(mask)) <= {0, 255}


def test_the_report_is_sorted_by_score_and_shows_overlays_that_are_there(answered, checkpoint):
    out, rows = answered
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "http" not in page and "<script" not in page
    done = [row for row in rows.values() if not row["error"]]
    manipulated = [row for row in done if row["decision"] == "manipulated"]
    assert f"Pictures: {len(done)}, {len(manipulated)} called manipulated" in page
    assert f"{len(BROKEN)} failed" in page
    assert "mini" in page
    assert clip.sha256_of(checkpoint)[:8] in page
    assert infer.CAUTION in page
    assert 'name="viewport"' in page

    assert page.count("<figure") == len(rows)
    links = re.findall(r'href="([^"]*)"', page)
    assert links == re.findall(r'src="([^"]*)"', page)
    assert len(set(links)) == len(done)
    for link in links:
        assert (out / unquote(link)).is_file()
    assert "<b>#%41" not in page                             # a name is no markup

    answers = re.findall(r'<b class="(?:manipulated|genuine)">.*?(\d\.\d+)', page)
    scores = [float(score) for score in answers]
    assert len(scores) == len(done)
    assert scores == sorted(scores, reverse=True)


def test_the_outputs_are_the_result(infer_main, checkpoint, tmp_path):
    mini.photo(90, 50).save(tmp_path / "p.png")
    out = tmp_path / "o"
    assert infer_main(tmp_path / "p.png", "--out", out) == 0
    result = infer.SAPL.load(checkpoint, "cpu").localize(tmp_path / "p.png")
    map = np.asarray(Image.open(out / "p_map.png"), dtype=np.float32) / 255
    assert np.abs(map - result.map).max() <= 0.5 / 255 + 1e-4
    mask = np.asarray(Image.open(out / "p_mask.png"))
    assert np.array_equal(mask == 255, result.mask)
    row = read_rows(out)[str(tmp_path / "p.png")]
    assert row["decision"] == result.decision
    assert float(row["score"]) == pytest.approx(result.score, abs=1e-4)
    assert float(row["area"]) == pytest.approx(result.area, abs=1e-4)

    raw = tmp_path / "raw"
    assert infer_main(tmp_path / "p.png", "--out", raw, "--raw") == 0
    raw_map = Image.open(raw / "p_map.png")
    assert not np.array_equal(raw_map, Image.open(out / "p_map.png"))


def test_lines_say_what_was_found_and_where_to_look(zoo, infer_main, tmp_path, capsys):
    assert infer_main(zoo / "grey.png", zoo / "text.jpg", "--out", tmp_path / "o") == 1
    printed, errors = capsys.readouterr()
    line, = printed.splitlines()
    row = read_rows(tmp_path / "o")[str(zoo / "grey.png")]
    assert line.startswith(f"{zoo / 'grey.png'}  {row['decision']}  score ")
    assert line.endswith(f"marked  -> {tmp_path / 'o' / 'grey_overlay.png'}")
    assert f"error: {zoo / 'text.jpg'}: " in errors
    assert "1 of 2 pictures done" in errors
    assert str(tmp_path / "o" / "report.html") in errors


def test_json_is_one_object_a_line_and_null_where_there_is_no_answer(zoo, infer_main, tmp_path,
                                                                     capsys):
    assert infer_main(zoo / "g*.png", zoo / "one.png", "--json", "--out", tmp_path / "o") == 1
    lines = capsys.readouterr().out.splitlines()
    good, bad = [json.loads(line) for line in lines]
    assert ",".join(good) == ",".join(bad) == HEADER
    assert good["error"] is None
    assert isinstance(good["score"], float) and isinstance(good["width"], int)
    assert "16 a side" in bad["error"]
    assert {bad[key] for key in ("decision", "score", "area", "width", "height")} == {None}


def test_a_second_run_adds_to_the_first(zoo, infer_main, tmp_path):
    out = tmp_path / "o"
    assert infer_main(zoo / "grey.png", "--out", out) == 0
    first = (out / "grey_map.png").read_bytes()
    assert infer_main(zoo / "inside/grey.png", zoo / "one.png", "--out", out) == 1
    assert infer_main(zoo / "grey.png", "--out", out) == 0              # again: no row more
    assert list(read_rows(out)) == [str(zoo / name)
                                    for name in ("grey.png", "inside/grey.png", "one.png")]
    assert (out / "grey_map.png").read_bytes() == first
    assert len(list(out.glob("*_map.png"))) == 2
    assert (out / "report.html").read_text(encoding="utf-8").count("<figure") == 3

    # a picture that the user took away does not matter
    (out / "grey_overlay.png").unlink()
    assert infer_main(zoo / "alpha.png", "--out", out) == 0
    assert (out / "report.html").read_text(encoding="utf-8").count("<figure") == 4


def test_answers_in_the_folder_are_no_pictures_to_answer_for(infer_main, tmp_path, monkeypatch):
    mini.photo(60, 40).save(tmp_path / "p.png")
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert infer_main(".") == 0                          # the answers lie in ./out
        assert list(read_rows(tmp_path / "out")) == ["p.png"]


def test_names_for_pictures_of_one_stem():
    paths = ["a/x.png", "b/x.png", "b/X.jpg", "x~2.png"]
    names = infer.names_for(paths)
    assert names["a/x.png"] == "x"
    assert list(names) == paths
    assert len({name.lower() for name in names.values()}) == 4
    more = infer.names_for([*paths, "c/x.png"])
    assert [more[path] for path in paths] == [names[path] for path in paths]    # later ones, later


def test_a_picture_is_answered_for_once(zoo, infer_main, tmp_path, capsys):
    assert infer_main(zoo / "grey.png", zoo / "grey.*", "--out", tmp_path / "o") == 0
    assert len(capsys.readouterr().out.splitlines()) == 2    # .png and .jpg


def test_a_list_on_standard_input_may_have_blank_lines(zoo, infer_main, tmp_path, monkeypatch):
    mini.photo(60, 40).save(tmp_path / "not_asked_for.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"\n{zoo / 'grey.png'}\n\n"))
    assert infer_main("-", "--out", "o") == 0
    assert list(read_rows(tmp_path / "o")) == [str(zoo / "grey.png")]


def test_an_error_without_words_is_named(zoo, infer_main, tmp_path, monkeypatch, capsys):
    def full(path):
        raise MemoryError
    monkeypatch.setattr(data, "open_image", full)
    assert infer_main(zoo / "grey.png", "--out", tmp_path / "o") == 1
    printed, errors = capsys.readouterr()
    assert printed == ""
    assert errors.startswith(f"error: {zoo / 'grey.png'}: MemoryError\n")


def test_what_is_done_survives_an_interruption(zoo, infer_main, tmp_path, monkeypatch, capsys):
    overlay = infer.overlay
    calls = []

    def interrupted(picture, result):
        calls.append(result)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return overlay(picture, result)

    monkeypatch.setattr(infer, "overlay", interrupted)
    names = ("grey.png", "palette.png", "alpha.png", "grey.jpg")
    paths = [zoo / name for name in names]
    assert infer_main(*paths, "--out", tmp_path) == 130
    assert list(read_rows(tmp_path)) == [str(path) for path in paths[:2]]
    assert (tmp_path / "report.html").read_text(encoding="utf-8").count("<figure") == 2
    errors = capsys.readouterr().err
    assert "interrupted: what is done is kept" in errors and "Traceback" not in errors


# ---------------------------------------------------------------------------------- the command

def test_the_real_command(zoo, checkpoint, tmp_path):
    paths = [f"{zoo}/grey.png", f"{zoo}/a b ü 图.png"]
    command = [sys.executable, ROOT / "infer.py", "-", "--checkpoint", checkpoint]
    call = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300,
                          encoding="utf-8", input="\n".join(paths))
    assert call.returncode == 0, call.stderr
    assert [line.split("  ")[0] for line in call.stdout.splitlines()] == paths
    assert call.stdout.splitlines()[0].endswith(f"-> {Path('out/grey_overlay.png')}")
    assert list(read_rows(tmp_path / "out")) == paths        # out/ in the current folder
    assert (tmp_path / "out/report.html").is_file()


@pytest.mark.skipif(not clip.TINY.is_file(), reason="needs the shipped model")
def test_without_a_checkpoint_the_shipped_model_answers_with_its_caution(zoo, tmp_path, capsys):
    out = tmp_path / "o"
    assert infer.main([str(zoo / "grey.png"), "--device", "cpu", "--out", str(out)]) == 0
    assert infer.CAUTION in capsys.readouterr().err
    page = (out / "report.html").read_text(encoding="utf-8")
    assert infer.CAUTION in page
    assert clip.sha256_of(clip.TINY)[:8] in page


def test_wrong_calls_exit_2_with_one_line(zoo, infer_main, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/results.csv").write_text("name,grade\nme,1\n")
    (tmp_path / "heic").mkdir()
    (tmp_path / "heic/1.heic").write_bytes(b"?")
    calls = {
        "missing.jpg": ["missing.jpg"],
        "*.xyz": ["*.xyz"],
        "found no picture": ["-"],                           # nothing on standard input
        "found a file, file": [zoo / "grey.png", "--out", "file"],
        str(Path("mine/results.csv")): [zoo / "grey.png", "--out", "mine"],
        ".webp), folders": ["heic"],
    }
    for expected, words in calls.items():
        assert infer_main(*words) == 2
        printed, errors = capsys.readouterr()
        assert printed == ""
        assert errors.startswith("error: found ") and errors.count("\n") == 1
        assert expected in errors
    assert (tmp_path / "file").read_text() == "mine"
    assert (tmp_path / "mine/results.csv").read_text() == "name,grade\nme,1\n"


def test_a_checkpoint_that_is_none_is_one_line(zoo, tmp_path, capsys):
    (tmp_path / "text.pt").write_text("hello")
    for name in ("missing.pt", "text.pt"):
        assert infer.main([str(zoo / "grey.png"), "--checkpoint", str(tmp_path / name)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: found ") and said.count("\n") == 1
        assert name in said and "train.py" in said


@pytest.mark.parametrize("words", [["--threshold", "44"], ["--precision", "fp8"], ["--chec", "x"]])
def test_unknown_flags_are_refused(zoo, words, capsys):
    with pytest.raises(SystemExit) as stop:
        infer.main([str(zoo / "grey.png"), *words])
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in last and words[0] in last
