"""Training: what it learns, that nothing hangs or is lost, that a wrong call is one clear line."""
import contextlib
import importlib
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import ecpl
import infer
import mini
import train
from train import Config

ROOT = Path(train.__file__).parent


def draw_set(root, count):
    """count genuine pictures in root/au, as many manipulated ones in root/tp. Those of a number
    are one scene."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(("au", "tp")):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(mini.draw(label, rng)).save(root / name / f"{i}.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a data set of 24 + 24 pictures, and a miniature CLIP as a plain state dict."""
    root = tmp_path_factory.mktemp("train")
    draw_set(root / "set", 24)
    torch.save(mini.mini_clip().state_dict(), root / "mini.pt")
    return root


def settings(place, out, **changes):
    """A run of 2 epochs of 4 steps on the CPU, into the folder `out`."""
    usual = {"data": str(place / "set"), "clip": str(place / "mini.pt"), "out": str(place / out),
             "size": 64, "batch": 8, "epochs": 2, "workers": 0, "val": 0.25, "lr": 2e-3,
             "lora_rank": 4, "hecl_queue": 40, "device": "cpu", "precision": "fp32"}
    return Config(**{**usual, **changes})


def words_of(config):
    """The command line of a Config, those of its settings that are not the defaults."""
    words = []
    for name, value in vars(config).items():
        if value is True:
            words.append(train.flag(name))
        elif value != getattr(Config, name, ()):
            words += [train.flag(name), str(value)]
    return words


def start_or_resume(config):
    """Train; go on where the folder of the run has one."""
    if not Path(config.out, "last.pt").exists():
        return train.train(config)
    config, state = train.settings_of({"out": config.out, "resume": True})
    return train.train(config, state)


def saved(config, name="last.pt"):
    return ecpl.load_checkpoint(Path(config.out, name))


NOT_COMPARED = ("settings", "config", "pictures_per_s", "minutes_left")      # folders, times


def same(a, b):
    """Are two checkpoints equal, bit for bit?"""
    if isinstance(a, dict):
        keys = [key for key in a if key not in NOT_COMPARED]
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in keys)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if torch.is_tensor(a):
        return torch.equal(a, b)
    return a == b


def largest_difference(a, b):
    """Of two dicts of tensors with the same keys."""
    assert a.keys() == b.keys()
    return max((a[key] - b[key]).abs().max().item() for key in a)


@pytest.fixture(scope="module")
def reference(place):
    """An undisturbed run: its settings, and what it said on standard output and error."""
    config = settings(place, "reference")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        with contextlib.redirect_stderr(io.StringIO()) as err:
            assert train.main(words_of(config)) == 0
    return SimpleNamespace(config=config, out=out.getvalue(), err=err.getvalue())


# --------------------------------------------- trainings that are disturbed, beside these tests
# `python tests/test_train.py FOLDER` makes one process for each entry of DISTURB; all train with
# loader processes, and what disturbs comes in the second epoch.

LIMIT = 60           # seconds that they have left when the other tests are done: hanging is longer


def fail():
    raise RuntimeError("unforeseen")


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def kill_loader():
    multiprocessing.active_children()[0].kill()


DISTURB = {"exception": fail, "SIGINT": interrupt, "SIGTERM": terminate, "dead loader": kill_loader}


def train_disturbed(config, disturb):
    """The command line, as in a process of its own -> its exit status."""
    real = train.Objective.forward
    steps = []

    def forward(*arguments):
        steps.append(1)
        if len(steps) == 6:
            disturb()
        return real(*arguments)

    train.Objective.forward = forward
    return train.main(words_of(config))


def report(name, process, said):
    """When nobody holds the pipe `said` any more, so not a single loader: print how it ended."""
    text = open(said).read()
    _, status = os.waitpid(process, 0)
    print(json.dumps([name, os.waitstatus_to_exitcode(status), text]), flush=True)


def train_all_disturbed(place):
    """Import once, fork often: the imports take longer than the training."""
    importlib.import_module("torch._dynamo")     # by every optimizer
    ends = []
    for name, disturb in DISTURB.items():
        said, pipe = os.pipe()
        process = os.fork()
        if process == 0:
            os.dup2(pipe, 1)
            os.dup2(pipe, 2)
            os.close(pipe)
            config = settings(place, name, epochs=1000, workers=2)
            sys.exit(train_disturbed(config, disturb))
        os.close(pipe)
        ends.append(threading.Thread(target=report, args=(name, process, said)))
    for end in ends:
        end.start()


@pytest.fixture(scope="module", autouse=True)
def disturbed(place):
    """The process that makes the others."""
    process = subprocess.Popen([sys.executable, __file__, str(place)], stdout=subprocess.PIPE,
                               env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
                                    "CUDA_VISIBLE_DEVICES": ""},
                               text=True, start_new_session=True)
    yield process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def ends(disturbed):
    """{key of DISTURB: (exit status, what it said)} of those that ended."""
    try:
        lines, _ = disturbed.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(disturbed.pid, signal.SIGKILL)
        lines, _ = disturbed.communicate()
    found = [json.loads(line) for line in lines.splitlines()]
    return {name: (status, said) for name, status, said in found}


# ------------------------------------------------------------------------------- what is learned

def test_training_learns(place):
    """Noise in a drawn picture is found in pictures that were never seen; in the number format that
    is fast here."""
    draw_set(place / "large", 60)
    config = settings(place, "learned", data=str(place / "large"), val=0.3, epochs=4, zoom=4,
                      lora_share=1.0, lr=3e-3, precision="auto")
    train.train(config)
    history = saved(config)["history"]
    assert history[-1]["val_auc"] > 0.8                          # 36 pictures, chance: 0.5 +- 0.1
    assert history[-1]["entropy"] < 0.8 * history[0]["entropy"]


def test_bf16_trains_nearly_as_fp32(place, reference):
    """With two processes that load, too."""
    config = settings(place, "bf16", precision="bf16", workers=2)
    train.train(config)
    histories = saved(config)["history"], saved(reference.config)["history"]
    for half, full in zip(*histories, strict=True):
        assert half["loss"] != full["loss"]
        assert abs(half["loss"] / full["loss"] - 1) < 0.02


def test_lora_and_ecpl_learn_and_nothing_else(reference):
    before = train.make_model(reference.config, ()).state_dict()
    last = Path(reference.config.out, "last.pt")
    after = ecpl.SAPL.load(last, "cpu").state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    calibration = {"map_shift", "score_shift"}                   # only best.pt has it
    ours = {key for key in before if not ecpl.is_backbone(key)} - calibration
    assert any("lora" in key for key in ours)
    assert moved == ours


def test_a_frozen_clip_stays_as_it_is(place):
    """The default: ECPL, the depths, scale and bias learn, CLIP does not."""
    run = train.Run(settings(place, "-", lora_rank=0), None, ())
    trained = {key for key, p in run.model.named_parameters() if p.requires_grad}
    assert trained == {key for key in run.model.state_dict() if not key.startswith("clip.")
                       and not key.endswith("_shift")}
    expected = [*run.model.parameters(), *run.hecl.parameters()]
    members = run.optimizer.param_groups[0]["params"]
    assert {id(p) for p in members} == {id(p) for p in expected if p.requires_grad}


@pytest.mark.parametrize("rank", [0, 4])
def test_hecl_trains_every_level_of_the_map(place, rank):
    """On a frozen tower too: its features have no gradient, but the projections of each level."""
    run = train.Run(settings(place, "-", lora_rank=rank), None, ())
    objective = train.Objective(run.model, run.hecl, 0.1, 1.0)
    losses = objective(torch.rand(4, 3, 64, 64), torch.tensor([0, 1, 0, 1]), 1.0)        # (3,)
    losses[2].backward()
    matrices = [p for p in run.model.depths.parameters() if p.ndim == 2]
    assert len(matrices) == 2
    for matrix in matrices:
        assert matrix.grad.abs().sum() > 0


def test_the_sum_of_the_losses(place):
    run = train.Run(settings(place, "-"), None, ())
    objective = train.Objective(run.model.eval(), run.hecl.eval(), 0.5, 3.0)
    image = torch.rand(4, 3, 64, 64)
    labels = torch.tensor([0, 1, 0, 0])
    with torch.no_grad():
        total, entropy, contrast = objective(image, labels, 0.2)
        output = run.model(image)
    score = output.score                                                                 # (4,)
    each = torch.where(labels == 1, 3 * torch.log1p((-score).exp()), torch.log1p(score.exp()))
    half = -ecpl.pool_score(-output.logits.flatten(1), 0.5)                              # (4,)
    genuine = torch.log1p(half.exp())                            # of the least suspicious half
    assert torch.allclose(entropy, each.mean() + genuine.mean())
    assert contrast > 0
    assert torch.allclose(total, entropy + 0.2 * 0.5 * contrast)


def test_unreadable_masks_change_nothing(place, reference):
    shutil.copytree(place / "set", place / "masked")
    (place / "masked" / "mask").mkdir()
    for path in (place / "masked" / "tp").iterdir():
        (place / "masked" / "mask" / path.name).write_bytes(b"no picture")
    config = settings(place, "blind", data=str(place / "masked"))
    train.train(config)
    assert same(saved(config), saved(reference.config))


def test_a_start_from_sapl_answers_like_it(place, reference):
    best = Path(reference.config.out, "best.pt")
    config = settings(place, "-", clip=str(best), lora_rank=0)
    start = train.make_model(config, ()).eval()
    old = ecpl.SAPL.load(best, "cpu")
    image = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(start(image).logits, old(image).logits, atol=1e-5)
        assert torch.allclose(start(image).score, old(image).score, atol=1e-5)
    assert start.config["context"] == old.config["context"]
    assert start.map_shift == start.score_shift == 0             # calibrated anew in the end


# --------------------------------------------------------------------------- order and selection

def test_batches_are_the_same_for_an_epoch_and_others_for_the_next():
    labels = [0] * 30 + [1] * 20
    config = Config(batch=10, seed=3, data="set")
    plan = train.batches(labels, config, epoch=1)                                # (steps, batch)
    assert plan.shape == (5, 10)
    assert sorted(plan.ravel().tolist()) == list(range(50))
    assert np.array_equal(plan, train.batches(labels, config, epoch=1))
    assert not np.array_equal(plan, train.batches(labels, config, epoch=2))


def test_batches_keep_pairs_together():
    config = Config(batch=10, seed=3, synthesize="photos")
    plan = train.batches([0, 1] * 22, config, epoch=0)
    assert len(np.unique(plan)) == plan.size == 40
    for row in plan.tolist():
        assert {i ^ 1 for i in row} == set(row)


def test_training_from_photos_sees_pairs(place, monkeypatch):
    """With a loader process, as the command line has: each manipulation beside its original."""
    config = settings(place, "pairs", data="", synthesize=str(place / "set" / "au"), count=32,
                      epochs=1, workers=1)
    seen = []
    real = train.Objective.forward

    def forward(self, image, labels, ramp):
        seen.append((image, labels))
        return real(self, image, labels, ramp)

    monkeypatch.setattr(train.Objective, "forward", forward)
    assert train.main(words_of(config)) == 0
    assert len(seen) == 4
    for image, labels in seen:
        assert labels.tolist() == [0, 1] * 4
        difference = image[1::2, None] - image[None, 0::2]                       # (4, 4, 3, H, W)
        nearest = difference.abs().mean(dim=(2, 3, 4)).argmin(dim=1)             # (4,)
        assert (nearest == torch.arange(4)).sum() >= 3
        assert (image[0::2] != image[1::2]).flatten(1).any(dim=1).all()


def test_validation_shares_no_scene(place):
    config = settings(place, "-")
    training, held_out = train.read_pictures(config)
    assert len(training) + len(held_out) == 48
    assert not {p.source for p in training} & {p.source for p in held_out}
    for part in (training, held_out):
        assert {p.label for p in part} == {0, 1}
        assert all(p.mask is None for p in part)
    photos = settings(place, "-", data="", synthesize=str(place / "set" / "au"), count=64)
    training, held_out = train.read_pictures(photos)
    assert not {p.path for p in training} & {p.path for p in held_out}
    train_set, val_set = train.make_sets(photos, training, held_out)
    assert len(train_set) == 64
    assert len(val_set) == 32
    assert len(train_set.photos) + len(val_set.photos) == 24


def test_auc_counts_ties_half():
    labels = np.array([0, 0, 1, 1])
    assert train.auc(np.array([0.0, 1, 2, 3]), labels) == 1
    assert train.auc(np.array([3.0, 2, 1, 0]), labels) == 0
    assert train.auc(np.array([1.0, 1, 1, 1]), labels) == 0.5
    assert train.auc(np.array([0.0, 2, 1, 2]), labels) == 0.625


def test_best_is_the_best_epoch_by_labels(reference):
    rows = [{"val_auc": 0.7, "val_loss": 0.5}, {"val_auc": 0.8, "val_loss": 0.9},
            {"val_auc": 0.8, "val_loss": 0.6}]
    assert train.best_of(rows) is rows[2]
    assert train.best_of(rows[:2]) is rows[1]
    history = saved(reference.config)["history"]
    best = train.best_of(history)
    assert f"the best is epoch {best['epoch']}, val_auc {best['val_auc']:.3f}" in reference.out


def test_best_is_of_its_epoch(place, monkeypatch):
    """best.pt holds the weights of the epoch that the log calls the best, not of the last one."""
    config = settings(place, "falling")
    kept = {}
    aucs = iter((0.9, 0.6))
    real = train.validate

    def validate(*arguments):
        return real(*arguments) | {"val_auc": next(aucs)}

    def save_checkpoint(path, model, real=ecpl.save_checkpoint, **state):
        kept.setdefault(path.name, []).append(model.bias.item())
        real(path, model, **state)

    monkeypatch.setattr(train, "validate", validate)
    monkeypatch.setattr(ecpl, "save_checkpoint", save_checkpoint)
    train.train(config)
    first, second = kept["last.pt"]
    assert first != second
    assert kept["best.pt"] == [first, first]                     # the second time calibrated


def test_log(reference):
    config = reference.config
    history = saved(config)["history"]
    lines = Path(config.out, "log.csv").read_text().splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("epoch,loss,entropy,hecl,val_loss,val_auc,pictures_per_s")
    assert len(history) == 2


# ----------------------------------------------------------------------------------- calibration

def test_few_of_the_genuine_lie_above_one_half(reference):
    """At most 7 % of the pixels and 10 % of the pictures on which best.pt is calibrated."""
    best = Path(reference.config.out, "best.pt")
    model = infer.SAPL.load(best, "cpu", "fp32")
    _, held_out = train.read_pictures(reference.config)
    rng = np.random.default_rng(0)
    found = [model.localize(train.worn(p.path, rng)) for p in held_out if p.label == 0]
    assert len(found) == 6
    assert 0.05 < np.mean([result.mask.mean() for result in found]) <= 0.07
    scores = [result.score for result in found]
    assert np.mean([score > 0.5 for score in scores]) <= 0.1
    assert max(scores) == pytest.approx(0.5)                     # no higher than it must be
    assert "note: only 6 genuine pictures to calibrate on" in reference.err


def test_enough_genuine_pictures_need_no_note(place, capsys):
    model = mini.mini_sapl(infer.SAPL)
    paths = [place / "set" / "au" / f"{i}.png" for i in range(20)]
    train.calibrate(model, paths)
    assert capsys.readouterr().err == ""
    rng = np.random.default_rng(0)
    called = [model.localize(train.worn(path, rng)).decision for path in paths]
    assert called.count("manipulated") <= 2
    train.calibrate(model, paths[:19])
    assert "note: only 19 genuine pictures" in capsys.readouterr().err


def test_calibration_survives_a_kill(place, reference, monkeypatch):
    """Killed after the last epoch: --resume calibrates."""
    config = settings(place, "uncalibrated")
    with monkeypatch.context() as patch:
        patch.setattr(train, "calibrate", kill)
        with pytest.raises(Killed):
            train.train(config)
    assert saved(config, "best.pt")["model"]["map_shift"] == 0
    assert train.main(["--out", config.out, "--resume"]) == 0
    assert same(saved(config, "best.pt"), saved(reference.config, "best.pt"))
    assert saved(config, "best.pt")["model"]["map_shift"] != 0


# ------------------------------------------------------------------------------ nothing gets lost

class Killed(BaseException):
    """Stands for kill -9: nothing of ours catches it."""


def kill(*arguments):
    raise Killed


@pytest.mark.parametrize("steps", [4, 5, 7])
def test_killed_and_resumed_is_the_same_run(place, reference, monkeypatch, steps):
    """After the first epoch, which has four steps, and amid the second."""
    config = settings(place, f"killed-{steps}")
    real = train.Objective.forward
    done = []

    def forward(*arguments):
        if len(done) == steps:
            kill()
        done.append(1)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train.Objective, "forward", forward)
        with pytest.raises(Killed):
            train.train(config)
    assert len(saved(config)["history"]) == 1
    start_or_resume(config)
    assert same(saved(config), saved(reference.config))
    assert same(saved(config, "best.pt"), saved(reference.config, "best.pt"))


def test_killed_at_any_moment_of_a_save(place, reference, monkeypatch):
    """Every call that touches the disk while saving is, in turn, the last one of the process."""
    config = settings(place, "killed-saving")
    calls = []
    deadline = 1

    def deadly(real):
        def call(*arguments):
            calls.append(real)
            if len(calls) == deadline:
                raise Killed
            return real(*arguments)
        return call

    for module, name in ((torch, "save"), (os, "fsync"), (os, "replace")):
        monkeypatch.setattr(module, name, deadly(getattr(module, name)))
    for deadline in range(1, 30):
        calls.clear()
        try:
            start_or_resume(config)
            break
        except Killed:
            pass
    assert deadline > 6                      # each of the six calls of an epoch was the last one
    assert same(saved(config), saved(reference.config))


def test_full_disk_keeps_the_last_good(place, monkeypatch):
    config = settings(place, "full-disk")
    real = os.fsync
    calls = []

    def fsync(file):
        calls.append(1)
        if len(calls) > 2:                   # best.pt and last.pt of epoch 1 are written
            raise OSError(28, "No space left on device")
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left on device.*what was there is kept.*--resume"):
        train.train(config)
    assert len(saved(config)["history"]) == 1
    assert not list(Path(config.out).glob("*.part"))


@pytest.mark.filterwarnings("error")
def test_a_loss_that_is_no_number_stops_and_is_not_saved(place):
    config = settings(place, "nan", lr=1e30)
    with pytest.raises(ValueError, match="found loss nan.* in epoch 1.*lower --lr"):
        train.train(config)
    assert not Path(config.out, "last.pt").exists()


@pytest.mark.parametrize("where", ["read_pictures", "calibrate"])
def test_ctrl_c_beside_the_loop_is_one_line(place, monkeypatch, capsys, where):
    def press(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, where, press)
    try:
        status = train.main(words_of(settings(place, f"ctrl-c-{where}", epochs=1)))
    except KeyboardInterrupt:
        status = "a traceback"
    assert status == 130
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


# ---------------------------------------------------------------------------------------- resume

def test_resume_keeps_its_settings(reference, capsys):
    words = ["--out", reference.config.out, "--resume", "--epochs", "3"]
    assert train.main([*words, "--lr", "0.5"]) == 2
    error = capsys.readouterr().err
    assert "--lr 0.5" in error
    assert "0.002" in error
    given = {"out": reference.config.out, "resume": True, "epochs": 3, "workers": 3}
    config, state = train.settings_of(given)
    assert config.lr == 2e-3
    assert config.batch == 8
    assert config.workers == 3
    assert len(state["history"]) == 2


def test_a_finished_run_stays_as_it_is_or_is_trained_longer(place, reference, capsys):
    out = place / "longer"
    shutil.copytree(reference.config.out, out)
    assert train.main(["--out", str(out), "--resume"]) == 0
    assert "finished: the best is epoch" in capsys.readouterr().out
    for name in ("best.pt", "last.pt"):
        assert same(ecpl.load_checkpoint(out / name), saved(reference.config, name))
    assert train.main(["--out", str(out), "--resume", "--epochs", "1"]) == 2
    assert "--epochs 4" in capsys.readouterr().err               # more than are done
    assert train.main(["--out", str(out), "--resume", "--epochs", "3"]) == 0
    assert "from epoch 3" in capsys.readouterr().out
    history = ecpl.load_checkpoint(out / "last.pt")["history"]
    assert len(history) == 3
    assert same(history[:2], saved(reference.config)["history"])


def test_the_same_command_goes_on(place):
    """With --resume behind it."""
    words = words_of(settings(place, "again", epochs=1))
    assert train.main(words) == 0
    assert train.main([*words, "--epochs", "2", "--resume"]) == 0


def test_resume_needs_a_run_and_its_best(place, reference, capsys):
    out = place / "no-run"
    shutil.copytree(reference.config.out, out)
    shutil.copy(out / "best.pt", out / "last.pt")            # a SAPL, but no training
    assert train.main(["--out", str(out), "--resume"]) == 2
    assert "last.pt, which holds no training" in capsys.readouterr().err
    (out / "best.pt").unlink()                               # no other may stand for it
    assert train.main(["--out", str(out), "--resume"]) == 2
    assert "found no last.pt and best.pt" in capsys.readouterr().err


def test_too_little_memory_is_one_line(place, monkeypatch, capsys):
    def forward(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(train.Objective, "forward", forward)
    assert train.main(words_of(settings(place, "memory"))) == 2
    line, = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: found too little memory") and "--batch" in line


def test_a_run_is_not_overwritten(reference, capsys):
    assert train.main(words_of(reference.config)) == 2
    assert "add --resume, or choose another --out" in capsys.readouterr().err


# ------------------------------------------------------------------------------ several processes

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="a process that has used CUDA "
                                  "must not fork: set CUDA_VISIBLE_DEVICES= to run this")


def in_two_processes(config):
    """Train as `torchrun --nproc_per_node=2` does, with gloo -> both exit statuses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])

    def work(rank):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                       "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
        sys.exit(train.main(words_of(config)))

    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=work, args=(rank,)) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
        process.kill()
    return [process.exitcode for process in both]


@without_cuda
def test_two_processes_are_one(place, reference):
    """The same global batch on two processes: the same losses, queues and weights."""
    config = settings(place, "two")
    assert in_two_processes(config) == [0, 0]
    one = saved(reference.config)
    two = saved(config)
    for a, b in zip(one["history"], two["history"], strict=True):
        for key in ("loss", "entropy", "hecl", "val_loss", "val_auc"):
            assert abs(a[key] - b[key]) < 1e-5
    assert largest_difference(one["hecl"], two["hecl"]) < 1e-5
    assert largest_difference(one["model"], two["model"]) < 1e-4
    assert one["hecl"]["queues.0.features"].any(dim=-1).all()    # full, so the oldest have gone


@without_cuda
def test_when_one_process_ends_the_other_does(place, monkeypatch):
    config = settings(place, "one-of-two")
    real = train.Objective.forward
    steps = []

    def forward(*arguments):
        steps.append(1)
        if os.environ["RANK"] == "1" and len(steps) == 6:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(train.Objective, "forward", forward)
    assert in_two_processes(config) == [1, 130]
    assert len(saved(config)["history"]) == 1


# ----------------------------------------------------------------------------------- command line

def test_command_line_is_the_dataclass():
    assert train.parse([]) == {}
    words = "--data X --resume --lr 1e-3 --lora-rank 4"
    assert train.parse(words.split()) == {"data": "X", "resume": True, "lr": 1e-3, "lora_rank": 4}


@pytest.mark.parametrize("words", ["--dta X", "--dat X", "--batch many", "--precision fp8",
                                   "--levels 3", "--resume yes"])
def test_unknown_words_are_refused(words, capsys):
    with pytest.raises(SystemExit) as stop:
        train.parse(words.split())
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        train.parse(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, value in vars(Config()).items():
        assert train.flag(name) in text
        if value is not False and value != "":
            assert f"(default {value})" in text


def test_it_says_what_it_does(reference):
    start, *_ = reference.out.splitlines()
    assert start.startswith("36 pictures to train, 12 to validate; ")
    assert start.endswith("from epoch 1")
    *_, end = reference.out.splitlines()
    assert end.startswith("finished: the best is epoch ")
    best = Path(reference.config.out, "best.pt")
    assert end.endswith(f"next: `python infer.py PICTURES --checkpoint {best}`")


def test_problems_of_the_set_are_repeated(place, capsys):
    """Of a labelled set and of photos: what cannot be read is named and left out."""
    folder = place / "damaged"
    shutil.copytree(place / "set", folder)
    whole = (folder / "au" / "3.png").read_bytes()
    (folder / "au" / "3.png").write_bytes(whole[:len(whole) // 2])
    training, held_out = train.read_pictures(settings(place, "-", data=str(folder)))
    assert len(training) + len(held_out) == 47
    assert f"note: bad file: {folder / 'au' / '3.png'}" in capsys.readouterr().err
    train.read_pictures(settings(place, "-", data="", synthesize=str(folder / "au")))
    assert f"note: bad file: {folder / 'au' / '3.png'}" in capsys.readouterr().err


@pytest.mark.parametrize("folder, word", [("au", "manipulated"), ("tp", "genuine")])
def test_a_missing_class_is_named(place, capsys, folder, word):
    root = place / f"only-{folder}"
    shutil.copytree(place / "set" / folder, root / folder)
    assert train.main(words_of(settings(place, "wrong", data=str(root)))) == 2
    note, error = capsys.readouterr().err.strip().splitlines()
    assert note == f"note: one class only: no {word} pictures"
    assert error.startswith(f"error: found no {word} picture to train in {root}")


def test_too_few_pictures_for_a_batch(place):
    with pytest.raises(ValueError, match="found 36 pictures to train, .* --batch 500"):
        train.train(settings(place, "few", batch=500))


def test_size_below_the_patch():
    with pytest.raises(ValueError, match="try --size 32$"):
        train.check_sizes(Config(size=16), SimpleNamespace(cell=32))


@pytest.mark.parametrize("words, message", [
    ("--epochs 0", "--epochs 0, expected at least 1"),
    ("--lr nan", "--lr nan, expected at least 0"),
    ("--val 1", "--val 1.0, expected at most"),
    ("--rho 2", "--rho 2.0, expected at most 1"),
    ("--seed -1", "--seed -1, expected at least 0"),
    ("--batch 9", "--batch 9, expected a multiple of 2"),
    ("--size 50", "--size 50, expected a multiple of the patch, 16 pixels: try --size 48"),
    ("--window 8", "--window 8"),
    ("--context 80", "80 context tokens, expected at most 64: lower --context"),
    ("--zoom 3", "--zoom 3, expected a divisor of the patch size, 16"),
    ("--device tpu", "--device tpu, expected one of auto, .*cpu"),
    ("--clip nothing", "found no CLIP 'nothing', expected tiny, ViT-B/32"),
    ("--clip {0}/set/au/0.png", "0.png: no readable archive of weights"),
    ("--data {0}/set/au/0.png", "found a picture, .*0.png, expected a folder or list"),
    ("--data {0}/nowhere", "found no .*nowhere"),
    ("--data=", "both or none of --data and --synthesize"),
    ("--synthesize {0}/set", "both or none of --data and --synthesize"),
    ("--data= --synthesize {0}/set --count -3", "--count -3, expected at least 2"),
    ("--out {0}/mini.pt", "found a file, .*mini.pt, expected a folder"),
    ("--out {0}/mini.pt/run", "found a file, .*mini.pt, expected a folder"),
    ("--resume", "found no last.pt and best.pt in .*wrong, expected those of a run"),
    ("--count 10", "--count, which --data ignores"),
    ("--lora-share 1", "--lora-share, which --lora-rank 0 ignores"),
    ("--hecl 0 --hecl-tau 0.2", "--hecl-tau, which --hecl 0 ignores"),
    ("--clip tiny --context 4", r"--context, but --clip tiny keeps its own \(\d+\)"),
    ("--clip {0}/reference/best.pt --context 4", r"--context, but --clip .*best.pt keeps its own")])
def test_a_wrong_call_is_one_line_before_any_training(place, reference, tmp_path, capsys, words,
                                                      message):
    out = tmp_path / "wrong"
    base = {"data": place / "set", "out": out, "clip": place / "mini.pt", "workers": 0,
            "size": 64, "batch": 8}
    usual = []
    for name, value in base.items():
        usual += [train.flag(name), str(value)]
    assert train.main([*usual, *words.format(place).split()]) == 2
    said = capsys.readouterr()
    error, = said.err.strip().splitlines()
    assert error.startswith("error: found ") or "0.png: no readable" in error
    assert re.search(message, error)
    assert said.out == ""
    assert not out.exists()


# ----------------------------------------------------------------------------------- nothing hangs

@pytest.mark.parametrize("name, status, words", [
    ("exception", 1, "RuntimeError: unforeseen"),
    ("SIGINT", 130, "interrupted: whole epochs are kept; if there is one, --resume goes on after"),
    ("SIGTERM", -15, "36 pictures to train"),
    ("dead loader", 1, "DataLoader worker")])
def test_every_end_is_over_and_leaves_a_checkpoint(place, ends, name, status, words):
    assert name in ends, "it hangs, or a loader of it lives on"
    found, said = ends[name]
    assert found == status, said
    assert words in said
    assert ("Traceback" in said) == (status == 1)

    config, state = train.settings_of({"out": str(place / name), "resume": True})
    assert len(state["history"]) == 1
    assert ecpl.SAPL.load(Path(config.out, "last.pt"), "cpu").config["clip"] == config.clip


if __name__ == "__main__":
    train_all_disturbed(Path(sys.argv[1]))
