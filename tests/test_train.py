"""Training: what it learns from what, that nothing is lost, that a wrong call is one clear line."""
import contextlib
import io
import multiprocessing
import os
import re
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import clip
import data
import evaluate
import infer
import mini
import train
from weights import synthesis


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a set of 16 + 16 pictures, and a miniature CLIP of 8-pixel patches."""
    root = tmp_path_factory.mktemp("train")
    mini.draw_set(root / "set", 16)
    torch.save(mini.mini_clip(patch=8).state_dict(), root / "mini.pt")
    return root


@pytest.fixture(scope="module", autouse=True)
def small_windows():
    """Windows of 64 pixels, 8 x 8 patches."""
    with mock.patch("train.WINDOW", 64):
        yield


def words(place, out, **changes):
    """The command line of a run of 2 epochs of 3 steps, into place/out; None leaves a word out."""
    usual = {"data": place / "set", "clip": place / "mini.pt", "out": place / out,
             "lora_rank": 0, "batch": 8, "splices": 4, "epochs": 2, "workers": 0, "val": 0.25,
             "lr": 3e-3, "device": "cpu", "precision": "fp32"}
    return [f"--{name.replace('_', '-')}={value}" for name, value in (usual | changes).items()
            if value is not None]


def settings(place, out="-", **changes):
    return train.make_parser().parse_args(words(place, out, **changes))


def make_run(place, **changes):
    return train.Run(settings(place, **changes), None)


def saved(place, out, name="last.pt"):
    return infer.load_checkpoint(place / out / name)


def same(a, b):
    """Are two checkpoints equal, bit for bit, but for folders and times?"""
    if isinstance(a, dict):
        keys = a.keys() - {"settings", "minutes"}
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in keys)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


@pytest.fixture(scope="module")
def reference(place):
    """An undisturbed run in place/reference: what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert train.main(words(place, "reference")) == 0
    return out.getvalue()


@pytest.mark.parametrize("patch, stem, zoom, rank", [
    (16, (), 2, 8), (32, (), 4, 8), (14, (), 2, 8), (4, (), 1, 8), (16, (4, 4, 4), 2, 0)])
def test_defaults_of_a_start_from_a_clip(place, monkeypatch, patch, stem, zoom, rank):
    monkeypatch.setattr(clip, "load", lambda name: mini.mini_clip(patch, stem))
    config = train.make_model(settings(place, lora_rank=None)).config
    assert (config["zoom"], config["lora_rank"]) == (zoom, rank)
    assert config["window"] == (63 if patch == 14 else 64)
    assert train.make_model(settings(place, lora_rank=3)).config["lora_rank"] == 3


def test_a_sapl_keeps_its_weights_and_its_lora(place, monkeypatch):
    tuned = place / "tuned.pt"
    model = mini.mini_sapl(lora_rank=2)
    model.map_shift.fill_(1)
    for name, parameter in model.named_parameters():
        if ".lora." in name:
            torch.nn.init.normal_(parameter)                 # as after a training
    train.save_checkpoint(tuned, model)
    monkeypatch.setenv("HOME", str(place))
    start = train.make_model(settings(place, clip="~/tuned.pt", lora_rank=None))
    image = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(start(image).logits, model(image).logits)
    assert start.config == model.config
    trained = {name for name, parameter in start.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in start.named_parameters() if not infer.is_backbone(name)}


@pytest.mark.parametrize("rank", [0, 3])
def test_gradients_reach_our_modules_alone(place, rank):
    run = make_run(place, lora_rank=rank)
    before = {key: x.clone() for key, x in run.model.state_dict().items()}
    labels = torch.tensor([0, 1, 1, 0])
    truth = torch.tensor([[0] * 64, [-1] * 64, [1] * 32 + [0] * 32, [0] * 64])
    for _ in range(2):                       # what starts at zero lets gradients through from then
        run.optimizer.zero_grad()
        run.objective(torch.rand(4, 3, 64, 64), labels, truth)[0].backward()
        run.optimizer.step()

    hecl = run.objective.hecl
    for name, parameter in [*run.model.named_parameters(), *hecl.named_parameters()]:
        if infer.is_backbone(name):
            assert parameter.grad is None
            assert torch.equal(parameter, before[name])
        else:
            assert parameter.grad.abs().sum() > 0, name
    _, features = run.model.clip.encode_patches(torch.rand(1, 3, 64, 64))
    assert features.requires_grad == (rank > 0)              # a frozen tower keeps no graph


def test_200_genuine_and_3_manipulated_pictures_start_with_any_seed(place, monkeypatch):
    pictures = [data.Picture(Path(f"{i}.png"), int(i >= 200), scene=str(i)) for i in range(203)]
    monkeypatch.setattr(data, "read_set", lambda *_, **__: (pictures, "folders", []))
    for seed in range(30):
        for part in train.read_pictures(settings(place, seed=seed, val=0.15), None):
            assert {p.label for p in part} == {0, 1}


def test_masks_do_not_matter_and_no_scene_is_in_both_parts(place):
    masked = place / "masked"
    shutil.copytree(place / "set", masked)
    (masked / "mask").mkdir()
    for path in (masked / "tp").iterdir():
        (masked / "mask" / path.name).write_bytes(b"no picture")
    found = train.read_pictures(settings(place, data=masked), None)
    training, held_out = train.read_pictures(settings(place), None)
    for part, expected in zip(found, (training, held_out)):
        moved = [p._replace(path=place / "set" / p.path.relative_to(masked)) for p in part]
        assert moved == expected
    assert (len(training), len(held_out)) == (24, 8)
    assert not {p.scene for p in training} & {p.scene for p in held_out}


def test_an_epoch_has_each_picture_once_and_genuine_ones_to_splice(place):
    labels = np.arange(50) % 3
    plan = train.plan_epoch(labels, settings(place, splices=6), epoch=1)
    labelled, spliced = np.split(plan, [8], axis=1)                      # (6, 8), (6, 6)
    assert len(set(labelled.ravel()) & set(range(50))) == 48
    assert not labels[spliced - 50].any()                    # other windows of genuine pictures
    few = train.plan_epoch(labels[:5], settings(place), epoch=0)
    assert few.shape == (1, 12) and set(few[0, :8]) == set(range(5))     # they fill a batch


def make_batch(labels, splices):
    """Windows (B, 3, 64, 64) of these labels, more to splice, and what train makes of them."""
    labels = torch.tensor([*labels, *[0] * splices])
    windows = [255 * data.to_tensor(mini.photo(64, 64, seed=i)) for i in range(len(labels))]
    windows = torch.stack(windows).byte()
    torch.manual_seed(0)
    return windows, *train.make_batch(windows, labels, splices, 16, np.random.default_rng(0))


@pytest.fixture
def unworn(monkeypatch):
    """Nothing but splices changes a picture."""
    for name in ("older_jpeg", "wear"):
        monkeypatch.setattr(synthesis, name, lambda images, rng: images)


def test_what_is_known_of_each_patch(monkeypatch, unworn):
    def splice(photo, donor, rng):
        region = torch.zeros(4, 64, 64)
        region[:, :16, :30] = 1                              # a patch, and most of the next one
        region[:, 16:18, :9] = 1                             # 7 % of one below
        region[3, :, 8:] = 0                                 # fills no patch
        return synthesis.Splices(donor, region, torch.tensor([True, False, True, True]), [], [])

    monkeypatch.setattr(synthesis, "splice", splice)
    windows, image, labels, truth = make_batch([0, 1], splices=4)
    spliced = [1, 1, 0, 0, -1] + [0] * 11
    assert truth.tolist() == [[0] * 16, [-1] * 16, spliced, [0] * 16, spliced, [0] * 16]
    assert labels.tolist() == [0, 1, 1, 0, 1, 0]
    # donors are other pictures; a splice that is invisible or too small stays as it was
    assert torch.equal(image, windows[[0, 1, 5, 3, 3, 5]] / 255)


def test_patches_known_as_genuine_are_untouched(unworn):
    windows, image, labels, truth = make_batch([0, 1], splices=30)
    changed = (255 * image - windows).abs().amax(dim=1) > 0.01                   # (B, 64, 64)
    share = F.avg_pool2d(changed.float(), 16).flatten(1)                         # (B, N)
    assert share[:2].max() == 0
    assert share[truth == 0].max() <= 0.05
    assert share[truth == 1].mean() > 0.6
    assert torch.equal(labels[2:] == 1, (share[2:] > 0).any(dim=1))


def test_wear_does_not_depend_on_the_label():
    one = [0, 1, 0, 1, 1, 1]
    other = [1, 0, 0, 0, 1, 0]
    _, image, labels, _ = make_batch(one, splices=4)
    _, other_image, other_labels, _ = make_batch(other, splices=4)
    assert torch.equal(image, other_image)
    assert (labels[:6].tolist(), other_labels[:6].tolist()) == (one, other)


def test_the_losses_equal_their_formulas(place):
    run = make_run(place)
    labels = torch.tensor([0, 1, 1, 0])                      # the third is a splice
    truth = torch.tensor([[0] * 64, [-1] * 64, [1] * 5 + [-1] * 3 + [0] * 56, [0] * 64])
    image = torch.rand(4, 3, 64, 64)
    objective = train.Objective(run.model, 0.5, np.array([0, 0, 0, 1])).eval()
    alone = train.Objective(run.model, 0, np.array([0])).eval()          # a set of genuine photos
    with torch.no_grad():
        total, label_loss, patch_loss, contrast = objective(image, labels, truth)
        total_alone, _, all_patches, _ = alone(image, labels, truth)
        output = run.model(image)
        logits = output.logits.flatten(1)                                        # (B, N)
        expected = objective.hecl(output.depths, output.edges, logits, labels, truth)

    genuine, manipulated, splice, other = output.score
    each = torch.stack([F.softplus(genuine), F.softplus(-manipulated), F.softplus(other)])
    assert torch.allclose(label_loss, each.mean())
    patches = 4 * F.softplus(-logits[2, :5]).sum() + F.softplus(logits[2, 8:]).sum()
    assert torch.allclose(patch_loss, patches / 61)
    patches += F.softplus(logits[[0, 3]]).sum()              # every patch of a genuine photo
    assert torch.allclose(all_patches, patches / (61 + 128))
    assert torch.allclose(contrast, expected)
    assert total_alone == all_patches                        # labels and HECL have the weight 0
    assert torch.allclose(total, label_loss + patch_loss + 0.5 * contrast)


def test_training_finds_noise_in_pictures_never_seen(place):
    mini.draw_set(place / "large", 40)
    assert train.main(words(place, "learned", data=place / "large", epochs=4, lr=3e-3, splices=8,
                            precision="bf16")) == 0
    history = saved(place, "learned")["history"]
    assert history[-1]["val_auc"] > 0.8                      # of 20 pictures; chance: 0.5 +- 0.13
    for name in ("label_loss", "patch_loss"):
        early, late = np.split(np.array([row[name] for row in history]), 2)
        assert late.mean() < 0.95 * early.mean()             # of 2 epochs each: few splices


def test_genuine_photos_alone_train_on_splices_and_the_last_epoch_is_best(place, tmp_path):
    assert train.main(words(place, tmp_path, data=place / "set/au")) == 0
    history = saved(place, tmp_path)["history"]
    assert all(row["patch_loss"] > 0 and "val_auc" not in row for row in history)
    assert train.best_of(history) is history[-1]


def test_validation_is_inference(place, reference):
    """best.pt has the weights of the best epoch, whose val_auc is the image AUC of evaluate.py."""
    state = saved(place, "reference")
    model = infer.load(place / "reference/best.pt", "cpu", "fp32")
    paths = [Path(path) for path in state["held_out"]]
    found = train.validate(model, [data.Picture(path, int("tp" in path.parts)) for path in paths])
    best = train.best_of(state["history"])
    assert found == {key: best[key] for key in found}
    assert f"best.pt is from epoch {best['epoch']}; next: `python infer.py PICTURES" in reference
    assert "24 pictures to train on, 8 held out; 56,530 weights, torch.float32 on cpu" in reference

    pictures = [data.Picture(path, i % 2) for i, path in enumerate(paths)]       # any labels
    found = train.validate(model, pictures)
    summary, _ = evaluate.evaluate(model.eval(), pictures)
    assert found["val_auc"] == pytest.approx(summary["image_auc"], abs=1e-6)


def test_best_pt_is_of_the_best_epoch_by_held_out_labels(place, tmp_path):
    assert train.auc(np.array([0, 2, 1, 2]), np.array([0, 0, 1, 1])) == 0.625    # a tie counts half
    run = train.Run(settings(place, tmp_path), None)
    for epoch, auc in enumerate((0.7, 0.8, 0.79, 0.75)):     # 0.79 is as good as 0.8, and later
        run.model.bias.data.fill_(epoch)
        run.end_epoch({"epoch": epoch, "val_auc": auc})
    assert saved(place, tmp_path)["model"]["bias"] == 3
    assert saved(place, tmp_path, "best.pt")["model"]["bias"] == 2


def test_few_of_the_genuine_lie_above_one_half(tmp_path):
    """At most 6.5 % of the pixels and 10 % of the pictures that calibrate."""
    model = mini.mini_sapl()
    pictures = [data.Picture(tmp_path / f"{i}.png", 0) for i in range(20)]
    for i, picture in enumerate(pictures):
        mini.photo(60 + i, 50, seed=i).save(picture.path)
    assert train.validate(model, pictures) == {}             # there is nothing to tell apart
    results = [infer.localize(model, picture.path) for picture in pictures]
    assert 0.05 < np.mean([result.area for result in results]) <= 0.065
    assert [result.decision for result in results].count("manipulated") in (1, 2)


def test_learning_rate_and_optimizer(place):
    found = [train.learning_rate(done) for done in (0.01, 0.5, 1)]
    assert found == pytest.approx([0.2, 0.55, 0.1])          # warm-up, cosine, a tenth at the end
    run = make_run(place)
    [group] = run.optimizer.param_groups
    trained = {id(p) for p in run.objective.parameters() if p.requires_grad}
    assert {id(p) for p in group["params"]} == trained


class Killed(BaseException):
    """Stands for kill -9: nothing of ours catches it."""


def not_a_number(owner, *_):
    getattr(owner, "model", owner).bias.data.fill_(torch.nan)


def half_written(content, file):
    file.write(b"half")
    raise Killed


OPEN = (data, "open_image")                  # 32 times to read the set, then in the training
STEP = (train.Objective, "forward")          # an epoch has three
VALIDATE = (train, "validate")
WRITE = (torch, "save")


@pytest.mark.parametrize("where, call, action, epochs", [
    (STEP, 4, mini.failing(ValueError("bug")), 1), (STEP, 5, mini.failing(NameError("bug")), 1),
    (WRITE, 3, half_written, 1), ((Path, "replace"), 3, mini.failing(Killed), 1)])
def test_killed_and_resumed(place, reference, tmp_path, monkeypatch, where, call, action, epochs):
    """After a bug, or at any moment of a save: the rest is the same run, bit for bit."""
    with monkeypatch.context() as patch:
        mini.disturb(patch, where, call, action)
        with pytest.raises((Killed, ValueError, NameError)):             # with its traceback
            train.main(words(place, tmp_path))
    assert len(saved(place, tmp_path)["history"]) == epochs
    assert train.main(["--out", str(tmp_path), "--resume"]) == 0
    for name in ("last.pt", "best.pt"):
        assert same(saved(place, tmp_path, name), saved(place, "reference", name))


@pytest.mark.parametrize("where, call, action, message, epochs", [
    (STEP, 5, mini.failing(torch.OutOfMemoryError), "error: found too little .*--batch", 1),
    (STEP, 5, not_a_number, "error: found loss nan in epoch 2, .*lower --lr", 1),
    (VALIDATE, 1, not_a_number, "error: found NaN or infinity", 0),
    (OPEN, 65, mini.failing(data.BadInput("a.png: gone")), "error: a.png: gone", 0),
    (WRITE, 3, mini.failing(OSError(28, "full")), "error: .*full", 1)])
def test_ends(place, tmp_path, monkeypatch, capsys, where, call, action, message, epochs):
    """Each is one line, and keeps the finished epochs."""
    mini.disturb(monkeypatch, where, call, action)
    assert train.main(words(place, tmp_path)) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert re.match(message, line)
    assert not epochs or len(saved(place, tmp_path)["history"]) == epochs


def test_a_finished_run_stays_as_it_is_or_goes_on(place, reference, monkeypatch):
    monkeypatch.chdir(place)                                 # a run that moved to runs/sapl
    shutil.copytree("reference", "runs/sapl")
    assert train.main(["--resume"]) == 0                     # finished: nothing changes
    for name in ("best.pt", "last.pt"):
        assert same(saved(place, "runs/sapl", name), saved(place, "reference", name))
    assert train.main(["--resume", "--epochs", "4"]) == 0    # given, although it is the default
    history = saved(place, "runs/sapl")["history"]
    assert len(history) == 4 and same(history[:2], saved(place, "reference")["history"])


def test_a_resumed_run_holds_out_the_same_pictures_of_a_changed_folder(place, capsys):
    folder = place / "changing"
    shutil.copytree(place / "set", folder)
    assert train.main(words(place, "changed", data=folder, epochs=1, splices=0)) == 0
    removed, damaged, *held_out = saved(place, "changed")["held_out"]
    os.remove(removed)
    Path(damaged).write_bytes(b"no picture")
    for i in range(9):
        shutil.copy(folder / "au/0.png", folder / f"au/new {i}.png")
    mini.photo(64, 64).save(folder / f"tp/{Path(held_out[0]).stem}.bmp")     # the same scene
    capsys.readouterr()
    assert train.main(["--out", str(place / "changed"), "--resume", "--epochs", "2"]) == 0
    said = capsys.readouterr()
    assert f"note: bad file: {damaged}" in said.err
    assert "note: 2 held-out pictures are gone" in said.err
    assert said.out.startswith("33 pictures to train on, 6 held out")
    state = saved(place, "changed")
    assert state["held_out"] == held_out
    assert [row["patch_loss"] for row in state["history"]] == [0, 0]     # image labels alone


@pytest.mark.skipif(torch.cuda.is_available(), reason="a process that has used CUDA must not fork: "
                    "set CUDA_VISIBLE_DEVICES= to run this")
def test_two_processes_agree(place):
    """As torchrun starts them, with gloo: the same weights, queues and history in both."""
    port = str(20000 + os.getpid() % 20000)

    def work(rank):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                       "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
        run = train.Run(settings(place, "two"), None)
        train.train(run)
        state = {"objective": run.objective.state_dict(), "history": run.history}
        torch.save(state, place / f"rank {rank}.pt")

    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=work, args=(rank,)) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
        process.kill()
    assert [process.exitcode for process in both] == [0, 0]
    one, two = (torch.load(place / f"rank {rank}.pt", weights_only=True) for rank in range(2))
    assert same(one, two)
    assert one["objective"]["hecl.queues.0.features"].any()


@pytest.mark.parametrize("wrong, message", [
    ("--epochs 0", "--epochs 0, expected at least 1"),
    ("--lr nan", "--lr nan, expected at least 0"),
    ("--lora-rank -1", "--lora-rank -1, expected at least 0"),
    ("--splices 1", "--splices 1, expected .* no or several splices each"),
    ("--clip nothing", "found no CLIP 'nothing', expected tiny, ViT-B/32"),
    ("--clip tiny --lora-rank 2", r"--lora-rank 2, but --clip tiny keeps its own \(0\)"),
    ("--data=", "found no --data"),
    ("--data {0}/only", "found no genuine picture to train on"),
    ("--data {0}/set/au --splices 0", "found no manipulated picture to train on"),
    ("--out {0}/mini.pt/run", ".*Not a directory"),
    ("--out {0}/reference", "found a run in .* add --resume, or choose another --out"),
    ("--out {0}/reference --resume --lr 2e-3", "lr 0.002, but .* has 0.003"),     # the default
    ("--out {0}/best --resume", "found a best.pt in .*last.pt, expected last.pt"),
    ("--resume", "found no .*wrong/last.pt, expected a checkpoint of train.py")])
def test_a_wrong_call_is_one_line_before_any_training(place, reference, capsys, wrong, message):
    shutil.copytree(place / "set/tp", place / "only/tp", dirs_exist_ok=True)
    (place / "best").mkdir(exist_ok=True)
    shutil.copy(place / "reference/best.pt", place / "best/last.pt")
    assert train.main([*words(place, "wrong"), *wrong.format(place).split()]) == 2
    said = capsys.readouterr()
    error, = [line for line in said.err.splitlines() if not line.startswith("note: ")]
    assert re.match(f"error: .*{message}", error)
    assert said.out == ""
    assert not (place / "wrong").exists()
