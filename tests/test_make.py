"""The pretraining of the shipped model's CLIP, weights/make.py."""
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import clip
import infer
import mini
import train
from ecpl import CLASSES
from weights import make, ship, synthesis

SMALL = make.SIZES | {"vision_layers": 2, "vision_width": 64, "transformer_layers": 1}


@pytest.fixture(scope="module")
def photos():
    """Nine photos as make.py keeps them."""
    return [torch.tensor(np.array(mini.photo(100, 90, i))).movedim(2, 0) for i in range(9)]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(make, "SIZES", SMALL)
    monkeypatch.setattr(make, "SIDES", (64,))
    torch.manual_seed(0)


def batch_of(photos, told, pairs=1):
    """The first batch of Regions that tells, or does not tell, what is pasted."""
    rng = np.random.default_rng(0)
    while True:
        batch = make.region_batch(photos, SimpleNamespace(pairs=pairs), 0, rng)
        if bool(batch[-1]) == told:
            return batch


def deit_weights(width=64, hidden=96, side=5):
    """Random weights with the names and shapes of the DeiT repository."""
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 1 + side ** 2, width),
              "patch_embed.proj.weight": (width, 3, 16, 16), "patch_embed.proj.bias": (width,),
              "norm.weight": (width,), "norm.bias": (width,), "head.weight": (10, width)}
    for block in ("blocks.0.", "blocks.1."):
        for name, *shape in (("norm1", width), ("attn.qkv", 3 * width, width), ("norm2", width),
                             ("attn.proj", width, width), ("mlp.fc1", hidden, width),
                             ("mlp.fc2", width, hidden)):
            shapes[f"{block}{name}.weight"] = shape
            shapes[f"{block}{name}.bias"] = shape[:1]
    return {name: 0.2 * torch.randn(shape) for name, shape in shapes.items()}


def plain_deit(weights, image):
    """The tokens of DeiT before and after each of two blocks, as its authors describe it."""
    def layer(function, x, name, *more):
        return function(x, *more, weights[f"{name}.weight"], weights[f"{name}.bias"])

    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    x = (image - mean) / deviation
    x = F.conv2d(x, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=16)
    x = torch.cat([weights["cls_token"].expand(len(x), 1, -1), x.flatten(2).mT], dim=1)
    tokens = [x + weights["pos_embed"]]
    norm = partial(F.layer_norm, eps=1e-6)
    for block in ("blocks.0", "blocks.1"):
        x = tokens[-1]
        y = layer(norm, x, f"{block}.norm1", (64,))
        q, k, v = layer(F.linear, y, f"{block}.attn.qkv").chunk(3, dim=-1)
        y = (q @ k.mT / 8).softmax(dim=-1) @ v                                   # one head of 64
        x = x + layer(F.linear, y, f"{block}.attn.proj")
        y = layer(norm, x, f"{block}.norm2", (64,))
        y = layer(F.linear, y, f"{block}.mlp.fc1")
        y = y * (1 + torch.erf(y / math.sqrt(2))) / 2                            # exact GELU
        tokens.append(x + layer(F.linear, y, f"{block}.mlp.fc2"))
    return tokens


@pytest.mark.parametrize("inside", [False, True])
def test_the_teacher_computes_what_deit_computes(tmp_path, inside):
    weights = deit_weights()
    torch.save({"model": weights} if inside else weights, tmp_path / "deit.pth")
    teacher = make.load_teacher(tmp_path / "deit.pth")
    image = torch.rand(2, 3, 80, 80)
    expected = plain_deit(weights, image)
    for found in (teacher(image), teacher.train()(image)):       # torch has a path of its own
        assert len(found) == 3
        assert all(torch.allclose(*pair, atol=1e-4) for pair in zip(found, expected))
    assert teacher(torch.rand(1, 3, 48, 64))[2].shape == (1, 13, 64)             # other sizes, too
    wide = make.DeiT(deit_weights(width=192))
    assert [block.self_attn.num_heads for block in wide.blocks] == [3, 3]


def test_a_student_that_is_its_teacher_has_no_error():
    student = clip.CLIP(**SMALL).visual
    pixels = torch.randn(2, 3, 32, 32)
    blocks = student.transformer.resblocks
    tokens = [student.embed(pixels).detach()]
    for block in blocks:
        tokens.append(block(tokens[-1]).detach())
    seen = []
    losses = make.Distillation(student, lambda image: seen.append(image.shape) or tokens)
    assert losses(pixels, pixels, torch.tensor(1.0)).max() < 1e-6
    assert seen == [(2, 3, 64, 64)]                              # the teacher, at double size
    tokens[0] = tokens[0] + torch.randn_like(tokens[0])          # now its embedding is wrong
    tokens[1:] = [blocks[0](tokens[0]).detach(), blocks[1](blocks[0](tokens[0])).detach()]
    from_teacher = losses(pixels, pixels, torch.tensor(0.0))
    assert from_teacher[0] > 0.1 and from_teacher[1:].max() < 1e-6
    assert losses(pixels, pixels, torch.tensor(1.0))[1:].min() > 0.1


def test_same_source_is_infonce():
    """By hand: two patches of one source, a third of another."""
    z = torch.tensor([[1.0, 0], [0.6, 0.8], [0, 1.0]])
    logits = torch.tensor([[0.6, 0.0], [0.6, 0.8]]) / 0.1        # of the first, of the second
    expected = F.cross_entropy(logits, torch.tensor([0, 0]))
    assert torch.isclose(make.same_source(z, torch.tensor([0, 0, 1])), expected)


def test_a_batch_tells_what_is_pasted_or_not(photos):
    for told in (True, False):
        pixels, inside, seen, tokens, caption, _ = batch_of(photos, told)
        n = len(seen) // 2
        assert pixels.shape == (2 * n, 3, 64, 64) and inside.shape == (2 * n, 64)
        assert (inside[:n] == 0).all() and (seen[:n] == 1).all() and inside[n:].max() > 0.9
        name = make.tokens_of(CLASSES[1])[1:12].tolist()         # the letters of "manipulated"
        assert tokens[:-2, 1:12].tolist().count(name) == (n if told else 0)
        texts = {tuple(row) for row in tokens[:-2].tolist()}
        assert len(texts) == len(set(caption.tolist()))
        assert torch.equal(tokens[-1:], clip.tokenize(CLASSES[1], 77, 514))
    assert (make.tokens_of("blurred, " * 20) == 513).sum() == 1  # truncated, but it has an end


def test_both_of_a_pair_are_worn_alike(photos, monkeypatch):
    """A generator that changes nothing makes two equal pictures, but for noise."""
    region = torch.zeros(40, 64, 64)
    monkeypatch.setattr(synthesis, "paste", lambda photo, donor, kinds, *rest: synthesis.Splices(
        photo, region, region[:, 0, 0], kinds, []))
    photo, image = batch_of(photos, False, pairs=10)[0].chunk(2)
    assert (photo == image).flatten(1).all(dim=1).float().mean() > 0.6


def test_the_losses_of_regions_fall_and_leave_out_what_they_should(photos, tmp_path):
    training = make.Training(SimpleNamespace(seed=0, out=str(tmp_path)), "cpu")
    regions = training.regions
    batch = batch_of(photos, told=True)
    first = training.step(make.losses_of(regions, batch, {}), 1e-3)
    assert abs(first[2] - math.log(2)) < 0.6                     # nothing learned yet
    for _ in range(14):
        last = training.step(make.losses_of(regions, batch, {}), 1e-3)
    assert last.sum() < 0.7 * first.sum()                        # a batch learned by heart

    untold = regions(*batch_of(photos, told=False))
    assert untold[:2].min() > 0 and untold[2:].abs().max() == 0
    pixels, inside, seen, *rest = batch_of(photos, told=True)
    assert regions(pixels, inside, torch.zeros_like(seen), *rest)[3] == 0


def test_pretraining_goes_on_and_leaves_a_clip(photos, tmp_path, monkeypatch, capsys):
    """Both stages with a random teacher; started again, only what is left."""
    for i in range(4):
        mini.photo(150, 130 if i else 50, seed=i).save(tmp_path / f"{i}.png")    # one is too small
    torch.save(deit_weights(), tmp_path / "teacher.pth")
    steps = []
    step = make.Training.step
    monkeypatch.setattr(make.Training, "step", lambda self, losses, lr: steps.append(
        (len(losses), lr)) or step(self, losses, lr))
    out = tmp_path / "out"
    words = (f"--photos {tmp_path} --out {out} --teacher {tmp_path}/teacher.pth --pairs 1 "
             "--device cpu --distil-steps 8").split()
    assert make.main([*words, "--steps", "3"]) == 0 and "3 photos on" in capsys.readouterr().out
    assert [count for count, _ in steps] == [3] * 8 + [4] * 3    # embedding and blocks, regions
    assert steps[0][1] == pytest.approx(2e-3 / 100)              # warm-up
    first = torch.load(out / "tower.pt", weights_only=True)

    assert make.main([*words, "--steps", "5"]) == 0 and len(steps) == 13
    second = torch.load(out / "tower.pt", weights_only=True)
    key = "visual.transformer.resblocks.0.attn.in_proj_weight"
    assert 0 < (second[key] - first[key]).norm() < 0.1 * first[key].norm()       # it went on
    assert clip.load(out / "tower.pt").visual.patch_size == 8

    monkeypatch.setattr(make.Regions, "forward",
                        lambda self, *batch: self.bias.expand(4) * math.nan)
    with pytest.raises(SystemExit, match="not finite"):
        make.main([*words, "--steps", "7"])
    assert torch.equal(torch.load(out / "tower.pt", weights_only=True)[key], second[key])


@pytest.mark.parametrize("words, message", [
    (["--photos", "none"], "found none, "),
    (["--photos", "."], "found no photo of 64 pixels or more in ., expected hundreds"),
    (["--photos", ".", "--teacher", "a.png"], "found no weights in a.png"),
    (["--photos", ".", "--teacher", "resnet.pth"], "found other weights in resnet.pth")])
def test_a_wrong_call_is_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    mini.photo(40, 40).save("a.png")
    torch.save({"model": {"fc.weight": torch.zeros(2)}}, "resnet.pth")
    assert make.main([*words, "--device", "cpu", "--out", "out"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}") and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_shipping_rounds_and_calibrates(tmp_path, capsys):
    model = mini.mini_sapl()
    train.save_checkpoint(tmp_path / "best.pt", model)
    for seed in range(3):
        mini.photo(80, 70, seed).save(tmp_path / f"{seed}.png")
    out = tmp_path / "shipped.pt"
    ship.main(f"--checkpoint {tmp_path}/best.pt --photos {tmp_path} --out {out}".split())
    assert "calibrated on 3 photos" in capsys.readouterr().out
    found = infer.load(out, "cpu", "fp32")
    assert found.config["clip"] == "tiny"
    assert out.stat().st_size < 0.6 * (tmp_path / "best.pt").stat().st_size
    picture = mini.photo(80, 70)
    own, _ = infer.logits_of(model, picture)
    assert (infer.logits_of(found, picture)[0] - own).abs().max() < 0.1
