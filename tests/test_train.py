"""Training: what is learned, that nothing is lost, that several processes are one."""
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import data
import infer
import train
from train import Config

ROOT = Path(train.__file__).parent


def draw(path, manipulated, rng):
    """A smooth picture with a gradient; the manipulated ones get a noisy square."""
    column = np.linspace(rng.integers(40, 90), rng.integers(130, 220), 72)
    base = np.broadcast_to(column[:, None, None], (72, 72, 3)).copy()
    base += rng.normal(0, 2, base.shape)
    if manipulated:
        y, x = rng.integers(0, 40, 2)
        base[y:y + 30, x:x + 30] += rng.normal(0, 40, (30, 30, 3))
    Image.fromarray(base.clip(0, 255).astype(np.uint8)).save(path, quality=95)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a data set of 24 + 24 pictures, and a miniature CLIP as a plain state dict."""
    import clip
    root, rng = tmp_path_factory.mktemp("train"), np.random.default_rng(0)
    for name, label in (("au", 0), ("tp", 1)):
        (root / "set" / name).mkdir(parents=True)
        for i in range(24):
            draw(root / "set" / name / f"{name}{i}.jpg", label, rng)
    torch.manual_seed(0)
    model = clip.CLIP(embed_dim=48, image_resolution=64, vision_layers=2, vision_width=64,
                      vision_patch_size=16, context_length=77, vocab_size=514, transformer_width=64,
                      transformer_layers=2)
    torch.save(model.state_dict(), root / "mini.pt")
    return root


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two threads wait for each other where the machine is busy; these models are too small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def settings(place, out, **changes):
    """A short run on the CPU that shows everything, into the folder `out`."""
    return Config(**{"data": str(place / "set"), "clip": str(place / "mini.pt"),
                     "out": str(place / out), "size": 64, "batch": 8, "epochs": 2, "workers": 0,
                     "val": 0.25, "lr": 2e-3, "hecl_queue": 40, "device": "cpu", **changes})


def state(config, name="last.pt"):
    return infer.load_checkpoint(Path(config.out, name))


def same(a, b, skip=("config", "settings", "history")):
    """Are two checkpoints equal, bit for bit, but for times and folders?"""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k], skip) for k in a if k not in skip)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


@pytest.fixture(scope="module")
def reference(place):
    """An undisturbed run of 2 epochs: its settings."""
    config = settings(place, "reference", ema=0.9)
    train.train(config)
    return config


# ------------------------------------------------------------------------------- what is learned

def test_lora_and_ecpl_learn_and_nothing_else(place):
    config = settings(place, "lora", weight_decay=0.0, epochs=1)
    torch.manual_seed(config.seed)
    before = train.make_model(config).state_dict()
    train.train(config)
    after = infer.SAPL.load(Path(config.out, "last.pt"), "cpu", merge=False).state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    ours = {key for key in before if not infer.is_backbone(key)}
    assert any(".lora." in key for key in ours)                # LoRA is there
    assert moved == ours


def test_tune_none_and_full(place):
    for tune, backbone in (("none", False), ("full", True)):
        run = train.Run(settings(place, "-", tune=tune))
        trained = {k for k, p in run.model.named_parameters() if p.requires_grad}
        assert any(map(infer.is_backbone, trained)) == backbone
        assert all(key.startswith(("clip.visual.", "ecpl.")) for key in trained)
        groups = run.groups()
        assert {group["lr"] for group in groups} == ({2e-3, 1e-5} if backbone else {2e-3})
        assert all((group["weight_decay"] > 0) == (p.ndim > 1)
                   for group in groups for p in group["params"])


def test_thresholds_are_calibrated_on_genuine_pictures(reference):
    """At most 10 % of the pixels are flagged, at most 10 % of the pictures called manipulated."""
    model = infer.SAPL.load(Path(reference.out, "best.pt"), "cpu", merge=False)
    found = [model.localize(p.path) for p in train.make_sets(reference)[3] if not p.label]
    assert 0.05 < np.mean([result.mask.mean() for result in found]) <= 0.1
    scores = [result.score for result in found]
    assert 0 <= np.mean([score > model.score_threshold for score in scores]) <= 0.1
    assert model.score_threshold in np.float64(scores)
    assert model.threshold != 0.5 != model.score_threshold


def test_calibration_survives_a_kill(reference, place):
    """A kill between two renames leaves best.pt.previous alone: --resume calibrates that."""
    shutil.copytree(reference.out, place / "lost")
    config = Config(**{**vars(reference), "out": str(place / "lost"), "resume": True})
    os.replace(place / "lost" / "best.pt", place / "lost" / "best.pt.previous")
    train.train(config)
    assert same(state(config, "best.pt"), state(reference, "best.pt"))


@pytest.mark.parametrize("tune", ["none", "lora"])
def test_hecl_trains_every_level_of_the_map(place, tune):
    """On a frozen tower too: its own features have no gradient, the gates that join them have."""
    run = train.Run(settings(place, "reach", tune=tune))
    objective = train.Objective(run.model, run.hecl, run.config, 1.0)
    objective(torch.rand(4, 3, 64, 64), torch.tensor([0, 1, 0, 1]), 1.0)[2].backward()
    assert all(gate.weight.grad.abs().sum() > 0 for gate in run.model.ecpl.level_gates)


def test_a_run_with_another_hecl_is_not_resumed(place, reference):
    shutil.copytree(reference.out, place / "old")
    old = state(reference)
    old["hecl"]["heads.0.weight"] = torch.zeros(64, 7)
    torch.save(old, place / "old" / "last.pt")
    with pytest.raises(ValueError, match="older version with another HECL.*--init"):
        train.train(Config(out=str(place / "old"), resume=True))


def test_unreadable_masks_change_nothing(place, reference):
    shutil.copytree(place / "set", place / "masked")
    (place / "masked" / "mask").mkdir()
    for path in (place / "masked" / "tp").iterdir():
        (place / "masked" / "mask" / f"{path.stem}.png").write_bytes(b"no picture")
    config = settings(place, "blind", ema=0.9, data=str(place / "masked"))
    train.train(config)
    assert same(state(config)["model"], state(reference)["model"])


def test_mosaics_keep_cells_apart():
    image = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 4, 6)
    tiled = train.tile(image, 2)                                                  # (2, 3, 8, 12)
    assert tiled.shape == (2, 3, 8, 12)
    assert tiled[1, 0, ::4, ::6].tolist() == [[4, 5], [6, 7]]
    patches = tiled[:, 0, ::2, ::2].flatten(1)                  # cells of 2 x 3 patches
    cells = image[:, 0, ::2, ::2].flatten(1)                                      # (8, 6)
    assert torch.equal(train.untile(patches, 2, 2, 3), cells)
    deep = patches[..., None].expand(-1, -1, 5)                                   # (2, 24, 5)
    assert torch.equal(train.untile(deep, 2, 2, 3)[..., 4], cells)


@pytest.mark.parametrize("tune, blocks", [("lora", 1), ("none", 0), ("full", 2)])
def test_validation_keeps_what_is_frozen(place, monkeypatch, tune, blocks):
    """The second time only trained blocks are computed, no picture is read, the numbers stay."""
    config = settings(place, f"kept-{tune}", tune=tune, lora_share=0.5)
    _, val_set, *_ = train.make_sets(config)
    run, calls, reads = train.Run(config), [], []
    for block in run.model.clip.visual.transformer.resblocks:
        block.register_forward_hook(lambda *_: calls.append(1))
    read = type(val_set).__getitem__
    monkeypatch.setattr(type(val_set), "__getitem__", lambda *item: reads.append(1) or read(*item))
    first = train.validate(run, val_set)
    steps = len(run.kept)
    assert len(reads) == len(val_set) and len(calls) == 2 * steps > 0
    with torch.no_grad():                                # training goes on
        for p in run.model.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn_like(p)
    calls.clear(), reads.clear()
    second = train.validate(run, val_set)
    assert (len(reads), len(calls)) == (0, blocks * steps)
    run.kept, run.room = [], 0
    assert second == train.validate(run, val_set) != first      # computed anew, bit for bit
    assert run.kept == []                                       # no room


def test_parts_and_recomputation_change_nothing(place):
    """Without HECL, whose contrast needs the whole batch, the gradients are the same."""
    plain, parts = (settings(place, out, hecl=0.0, epochs=1, **more) for out, more in (
        ("whole", {}), ("parts", {"accumulate": 2, "recompute": True})))
    for config in (plain, parts):
        train.train(config)
    a, b = state(plain)["model"], state(parts)["model"]
    assert max((a[key] - b[key]).abs().max() for key in a) < 1e-4


def test_start_from_a_checkpoint(place, reference):
    config = settings(place, "-", init=str(Path(reference.out, "best.pt")), tune="full")
    start, old = train.make_model(config).eval(), infer.SAPL.load(config.init, "cpu")
    image = torch.rand(2, 3, 64, 64)
    assert torch.allclose(start(image).logits, old(image).logits, atol=1e-5)
    assert start.config["size"] == 64
    assert all(p.requires_grad for p in start.clip.visual.parameters())


# --------------------------------------------------------------------------- order and selection

def test_batches():
    labels, config = [0] * 30 + [1] * 20, Config(batch=10, seed=3)
    plan = train.batches(labels, 0, config, epoch=1)
    assert sorted(plan.ravel().tolist()) == list(range(50))
    assert all(Counter(labels[i] for i in row)[1] == 4 for row in plan)   # as in the whole
    assert np.array_equal(plan, train.batches(labels, 0, config, epoch=1))
    assert not np.array_equal(plan, train.batches(labels, 0, config, epoch=2))
    made = Config(batch=10, seed=3, synthesize="photos")
    plan = train.batches([0, 1] * 22, 44, made, epoch=0)
    assert len(np.unique(plan)) == 40
    for row in plan:                                             # pairs stay together
        assert {i ^ 1 for i in row} == set(row)
    mixed = Config(batch=10, seed=3, pairs=0.4)                  # 6 with labels, 2 pairs
    plan = train.batches(labels + [0, 1] * 16, 32, mixed, epoch=0)
    assert plan.shape == (8, 10) and len(np.unique(plan)) == 80
    for row in plan.tolist():
        assert sum(i < 50 for i in row) == 6 and {labels[i] for i in row if i < 50} == {0, 1}
        assert {i ^ 1 for i in row if i >= 50} == {i for i in row if i >= 50}


def test_mosaics_keep_pairs_apart_and_mix_the_classes():
    config = Config(batch=24, seed=1, synthesize="photos")
    plan = train.batches([0, 1] * 1200, 2400, config, epoch=0)
    mosaics = plan.reshape(-1, 4)                                # 2 x 2
    assert all(i ^ 1 not in row for row in mosaics.tolist() for i in row)
    count = Counter((mosaics % 2).sum(axis=1).tolist())          # manipulated cells of each
    assert all(abs(count[k] / 600 - share / 16) < 0.06 for k, share in enumerate((1, 4, 6, 4, 1)))


def test_training_from_photos_sees_pairs(place, monkeypatch):
    """What a step gets: both of each pair, alone or beside pictures with labels."""
    seen, before = [], train.Objective.forward
    monkeypatch.setattr(train.Objective, "forward", lambda self, image, labels, ramp: (
        seen.append((image, labels)), before(self, image, labels, ramp))[1])
    photos = str(place / "set" / "au")
    train.train(settings(place, "pairs", data="", synthesize=photos, count=32, epochs=1))
    for image, labels in seen:                                   # the lower half lies 4 further on
        assert labels[:4].tolist() == (1 - labels[4:]).tolist()
        near = (image[:4, None] - image[None, 4:]).abs().mean(dim=(2, 3, 4)).argmin(dim=1)
        assert (near == torch.arange(4)).float().mean() > 0.7
    seen.clear()
    train.train(settings(place, "mixed", pairs=0.5, epochs=1))
    assert len(seen) == 36 // 4
    for image, labels in seen:
        assert set(labels[:4].tolist()) == {0, 1}
        assert labels[4:6].tolist() == (1 - labels[6:]).tolist()


def test_validation_part_shares_nothing(place):
    training, validation, seen, held_out = train.make_sets(settings(place, "-"))
    a, b = ({photo.tobytes() for photo in part.photos} for part in (training, validation))
    assert not a & b and len(a | b) == 48
    assert [p.label for p in seen] == training.labels and set(training.labels) == {0, 1}
    assert [p.label for p in held_out] == validation.labels and set(validation.labels) == {0, 1}
    assert not {p.path for p in seen} & {p.path for p in held_out}
    photos = settings(place, "-", data="", synthesize=str(place / "set" / "au"), count=64)
    training, validation, seen, held_out = train.make_sets(photos)
    assert len(training) == 64 and len(validation) == 32 and len(seen) == 18 and len(held_out) == 6


def test_best_is_the_best_epoch_by_labels(reference):
    history = state(reference)["now"]["history"]
    best = max(history, key=lambda row: (row["val_auc"], -row["val_loss"]))
    assert state(reference, "best.pt")["metrics"] == best
    lines = Path(reference.out, "log.csv").read_text().splitlines()
    assert len(lines) == 3 and lines[0].startswith("epoch,loss,bce,hecl,val_loss,val_auc")
    curves = np.asarray(Image.open(Path(reference.out, "curves.png")))
    for top, key in zip(range(0, len(curves), 100), train.CURVES):     # a line in every strip
        blue = (curves[top:top + 100] == (0, 0, 255)).all(axis=2)
        rise = history[1][key] - history[0][key]
        left, right = (np.flatnonzero(blue[:, x]).mean() for x in (30, 610))
        assert np.sign(left - right) == np.sign(rise) or rise == 0


def test_collapse_is_said(place, capsys):
    row = {"epoch": 1, "bce": 0.7, "hecl": 0.0, "val_loss": 0.7, "val_auc": 0.5,
           "map_genuine": 0.1, "map_manipulated": 0.1, "map_low": 0.1, "map_high": 0.3}
    for low, high, word in ((0.1, 0.3, "all 0"), (0.6, 0.9, "all 1"), (0.1, 0.9, "")):
        train.log([row | {"map_low": low, "map_high": high}], place)
        assert word in capsys.readouterr().err


# ------------------------------------------------------------------------------ nothing gets lost

def interrupted(config, disturb, monkeypatch, limit=30):
    """Train with --resume until it ends; `disturb` may stop each attempt -> how many it took."""
    for attempt in range(1, limit):
        with monkeypatch.context() as patch:
            disturb(patch, attempt)
            try:
                train.train(config)
                return attempt
            except (SystemExit, Killed):
                pass
    raise AssertionError("never ends")


class Killed(BaseException):
    """Stands for kill -9: nothing of ours catches it."""


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_and_resumed_is_the_same_run(place, reference, monkeypatch, number, code):
    config = settings(place, f"stopped{code}", ema=0.9, resume=True)
    real, steps = train.train_step, []

    def step(*arguments):
        steps.append(1)
        if len(steps) % 3 == 0:              # steps 3, 6: amid and between epochs
            signal.raise_signal(number)
        return real(*arguments)

    def disturb(patch, attempt):
        patch.setattr(train, "train_step", step)

    attempts = interrupted(config, disturb, monkeypatch)
    assert attempts == 3 and len(steps) == 8                 # no step is done twice
    assert same(state(config), state(reference))
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
    monkeypatch.setattr(train, "train_step", lambda *a: [signal.raise_signal(number), real(*a)][1])
    with pytest.raises(SystemExit) as stop:
        train.train(settings(place, f"code{code}"))
    assert stop.value.code == code


def test_killed_at_any_moment_of_a_save(place, reference, monkeypatch):
    """Every call that touches the disk while saving is, in turn, the last one of the process."""
    config, count = settings(place, "killed", ema=0.9, resume=True, save_every=0.0), [0]

    def disturb(patch, attempt):
        count[0] = 0
        for module, name in ((torch, "save"), (os, "fsync"), (os, "replace")):
            def call(*arguments, real=getattr(module, name), **more):
                count[0] += 1
                if count[0] == attempt:
                    raise Killed
                return real(*arguments, **more)
            patch.setattr(module, name, call)

    interrupted(config, disturb, monkeypatch, limit=60)
    assert same(state(config), state(reference))


def test_kill_minus_nine(place, reference):
    """The real thing, once: SIGKILL while the command writes a checkpoint after every step."""
    out = place / "kill9"
    command = [sys.executable, "train.py", "--out", str(out), "--resume"]
    for key in "data clip size batch workers val lr hecl_queue device ema".split():
        command += ["--" + key.replace("_", "-"), str(getattr(reference, key))]
    command += ["--epochs", "200", "--save-every", "0"]
    process = subprocess.Popen(command, cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for line in process.stdout:
        if line.startswith("epoch 2"):
            break
    process.kill()
    process.communicate()
    found = infer.load_checkpoint(train.newest(out))
    assert found["now"]["epoch"] >= 1 and len(found["now"]["history"]) == found["now"]["epoch"]


def test_full_disk_keeps_the_last_good(place, monkeypatch, capsys):
    config, real, calls = settings(place, "full"), torch.save, []

    def save(entries, file):
        calls.append(1)
        if len(calls) > 2:                   # best.pt and last.pt of epoch 1 are written
            file.write(b"half")
            raise OSError(28, "No space left on device")
        real(entries, file)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="No space left on device.*last good.*last.pt.*--resume"):
        train.train(config)
    assert state(config)["now"]["epoch"] == 1 and not list(Path(config.out).glob("*.part"))


def test_nonfinite_loss_stops_and_names_the_batch(place):
    config = settings(place, "nan", lr=1e30, warmup=0.5, epochs=2, save_every=0.0)
    message = r"epoch 1, step \d, pictures .*set/../..\d*.jpg, .*lower --lr.*last.pt"
    with pytest.raises(ValueError, match=message):
        train.train(config)
    assert all(value.isfinite().all() for value in state(config)["mean"].values())
    assert state(config)["now"]["step"] >= 1


def test_bad_pictures_are_named_counted_and_limited(place, capsys):
    shutil.copytree(place / "set", place / "bad")
    for i in range(4):                                       # whole headers, half the data
        path = place / "bad" / "au" / f"au{i}.jpg"
        path.write_bytes(path.read_bytes()[:700])
    config = settings(place, "bad_run", data=str(place / "bad"), epochs=1)
    expected = {f"au{i}.jpg" for i in range(4)} & {p.path.name for p in train.make_sets(config)[2]}
    train.train(config)
    named = capsys.readouterr().err
    assert expected and all(named.count(name) == 1 for name in expected)
    assert len(state(config)["now"]["bad"]) == len(expected)
    with pytest.raises(ValueError, match="unreadable pictures, --bad-limit is 0"):
        train.train(settings(place, "limit", data=str(place / "bad"), epochs=1, bad_limit=0))


def test_resume_keeps_its_settings(reference):
    other = {**vars(reference), "resume": True}
    with pytest.raises(ValueError, match="--lr 0.5"):
        train.resumed(Config(**{**other, "lr": 0.5}))
    config, found = train.resumed(Config(out=reference.out, resume=True, workers=3))
    assert (config.lr, config.workers, found["now"]["epoch"]) == (reference.lr, 3, 2)
    with pytest.raises(ValueError, match="--resume"):
        train.resumed(reference)


# ------------------------------------------------------------------------------ several processes

def test_two_processes_are_one(place, reference):
    """The same global batch on two gloo processes: the same losses, queues and weights."""
    config = settings(place, "two", ema=0.9)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])

    def work(rank):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                       "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
        train.train(config)
        torch.distributed.destroy_process_group()

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=work, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    one, two = state(reference), state(config)
    for a, b in zip(one["now"]["history"], two["now"]["history"]):
        assert all(abs(a[k] - b[k]) < 1e-5 for k in ("loss", "bce", "hecl", "val_loss", "val_auc"))
    for part, error in (("hecl", 1e-5), ("model", 1e-4)):
        assert all(torch.allclose(one[part][k], two[part][k], atol=error) for k in one[part])
    assert one["hecl"]["queues.0.filled"] == 40                   # full, so it has wrapped


# ----------------------------------------------------------------------------------- command line

def test_command_line_is_the_dataclass():
    assert train.parse([]) == Config()
    words = "--data X --levels 1 2 --recompute --no-resume --lr 1e-3 --class-words a b"
    assert train.parse(words.split()) == Config(data="X", levels=(1, 2), recompute=True, lr=1e-3,
                                                class_words=("a", "b"))
    for words in (["--dta", "X"], ["--dat", "X"], ["--batch", "many"], ["--precision", "fp8"]):
        with pytest.raises(SystemExit) as stop:
            train.parse(words)
        assert stop.value.code == 2


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        train.parse(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "(default 0.1)" in text
    assert "--hecl-tau" in text and "--no-resume" in text


@pytest.mark.parametrize("words, message", [
    ("", "--data and --synthesize"),
    ("--data {0}/set --synthesize {0}/set", "--data and --synthesize"),
    ("--data {0}/nowhere", "nowhere"),
    ("--data {0}/set/au", "both classes"),
    ("--synthesize {0}/empty", "empty"),
    ("--data {0}/set --batch 500", "--batch 500, expected"),
    ("--data {0}/set --size 65", "65"),
    ("--data {0}/set --levels 7", "numbers from 1 to 2"),
    ("--data {0}/set --batch 9 --accumulate 2", "multiple"),
    ("--data {0}/set --pairs 1", "below 1"),
    ("--data {0}/set --pairs 0.25 --batch 8 --mosaic 2", "shares a mosaic"),
    ("--data {0}/set --init {0}/mini.pt", "not a SAPL checkpoint"),
    ("--data {0}/set --clip nothing", "nothing")])
def test_user_errors_are_one_line_and_status_2(place, capsys, words, message):
    (place / "empty").mkdir(exist_ok=True)
    base = f"--out {place}/wrong --clip {place}/mini.pt --workers 0 --size 64".split()
    assert train.main(base + words.format(place).split()) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error and "\n" not in error
