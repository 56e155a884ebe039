"""ECPL and SAPL: edges, prompts, map, score, checkpoints: references and properties."""
import math
import os

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import clip
import ecpl
import mini


def pictures(B=2, side=64):
    """One colour each with a rectangle of another, and noise: (B, 3, side, side) in [0, 1]."""
    torch.manual_seed(1)
    image = torch.rand(B, 3, 1, 1).expand(B, 3, side, side).clone()
    image[..., 16:40, 20:50] = torch.rand(B, 3, 1, 1)
    return (image + 0.02 * torch.randn(B, 3, side, side)).clamp(0, 1)


@torch.no_grad()
def moved(model):
    """The model as if trained a little: what starts at zero is no longer zero."""
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.02 * torch.randn_like(parameter)
    return model


def make_ecpl(reads=True):
    """(CLIP, an ECPL of two levels); `reads`: its prompts follow the picture."""
    tower = mini.mini_clip()
    module = ecpl.ECPL(tower, levels=2, context=4).eval()
    if reads:
        nn.init.normal_(module.attention.out_proj.weight)
    return tower, module


# ----------------------------------------------------------------------------------------- edges

def test_sobel_equals_the_formula_pixel_by_pixel():
    torch.manual_seed(0)
    x = torch.rand(2, 2, 5, 6)
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    found = ecpl.sobel(x)
    kernel = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]]) / 8
    for b, k, i, j in np.ndindex(*x.shape):
        window = padded[b, k, i:i + 3, j:j + 3]
        gx = (kernel * window).sum()
        gy = (kernel.T * window).sum()
        assert found[b, k, i, j].item() == pytest.approx(math.hypot(gx, gy), abs=1e-6)


def test_soft_edges_ignore_contrast_and_brightness():
    image = pictures() * 0.8 + 0.1
    edge = ecpl.soft_edges(image)
    assert edge.min() >= 0 and edge.max() < 1
    assert (ecpl.soft_edges(image * 0.5) - edge).abs().mean() < 0.02           # darker
    assert torch.allclose(ecpl.soft_edges(image + 0.1), edge, atol=1e-4)       # brighter


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_soft_edges_of_a_constant_picture_are_zero(value):
    assert ecpl.soft_edges(torch.full((1, 3, 32, 32), value)).max() < 1e-3


def test_pooled_edges_point_at_the_outline():
    image = torch.zeros(1, 3, 64, 64)
    image[..., 16:48, 16:48] = 1
    edges = ecpl.pool_edges(ecpl.soft_edges(image), 8, 8).view(8, 8)
    outline = torch.zeros(8, 8, dtype=torch.bool)
    outline[2:6, 2:6] = True
    outline[3:5, 3:5] = False
    assert edges[outline].min() > 0.4
    assert edges[3:5, 3:5].max() < 0.01 and edges[0].max() < 0.01


def test_feature_variation_is_large_only_at_the_boundary():
    features = torch.zeros(1, 36, 5)
    features.view(1, 6, 6, 5)[:, :, 3:] = 1
    variation = ecpl.feature_variation(features, 6, 6).view(6, 6, 5)
    assert (variation[:, 2:4] > 0.4).all()
    assert variation[:, :2].max() < 1e-6 and variation[:, 4:].max() < 1e-6


# ------------------------------------------------------------------------------------------ ECPL

def test_enhanced_features_are_the_features_where_there_are_no_edges():
    torch.manual_seed(0)
    _, module = make_ecpl()
    levels = [torch.randn(2, 16, 64), torch.randn(2, 16, 64)]
    edges = torch.rand(2, 16)
    edges[:, :8] = 0
    for x, enhanced in zip(levels, module.enhance(levels, edges, 4, 4)):
        assert torch.equal(enhanced[:, :8], x[:, :8])
        variation = ecpl.feature_variation(x, 4, 4)
        assert torch.allclose(enhanced, x + edges[..., None] * variation)
        assert not torch.allclose(enhanced[:, 8:], x[:, 8:], atol=0.01)


def test_starts_as_the_plain_learned_prompt():
    tower, module = make_ecpl(reads=False)
    plain = module.encode(tower, module.context.flatten(0, 1)[None])           # (1, C, D)
    levels = [torch.randn(3, 16, 64), torch.randn(3, 16, 64)]
    text = module(tower, levels, torch.rand(3, 16), 4, 4)
    assert torch.allclose(text, plain.expand(3, -1, -1), atol=1e-6)


def test_text_features_equal_the_tower_on_the_full_77_tokens():
    tower, module = make_ecpl()
    prompts = torch.randn(3, 8, 64)                                            # (B, C * M, Dt)
    text = module.encode(tower, prompts)
    for c, word in enumerate(ecpl.CLASSES):
        ids = clip.tokenize([word], vocab_size=514)
        words = tower.token_embedding(ids).expand(3, -1, -1)
        own = prompts[:, 4 * c:4 * c + 4]
        sentence = torch.cat([words[:, :1], own, words[:, 1:73]], dim=1)
        assert sentence.shape[1] == 77
        expected = tower.encode_prompts(sentence, int(ids.argmax()) + 4)
        assert torch.allclose(text[:, c], F.normalize(expected, dim=-1), atol=1e-5)


def test_prompts_follow_the_picture_and_its_edges_once_trained():
    tower, module = make_ecpl()
    levels = [torch.randn(2, 16, 64), torch.randn(2, 16, 64)]
    edges = torch.rand(2, 16)
    text = module(tower, levels, edges, 4, 4)
    assert torch.allclose(text.norm(dim=-1), torch.ones(2, 2))
    assert not torch.allclose(text[0], text[1], atol=1e-3)
    without_edges = module(tower, levels, torch.zeros(2, 16), 4, 4)
    assert not torch.allclose(text, without_edges, atol=1e-3)


@torch.no_grad()
def test_prompts_equal_the_formula():
    tower, module = make_ecpl()
    moved(module)
    enhanced = [torch.randn(2, 16, 64), torch.randn(2, 16, 64)]
    G = module.projections[0](enhanced[0])
    G = G + module.projections[1](enhanced[1])
    V = module.context.view(1, 8, 64).expand(2, -1, -1)
    maps = module.attention.in_proj_weight.chunk(3)                  # one head of 64 numbers
    biases = module.attention.in_proj_bias.chunk(3)
    q = F.linear(module.norm_query(V), maps[0], biases[0])
    k = F.linear(G, maps[1], biases[1])
    v = F.linear(G, maps[2], biases[2])
    read = module.attention.out_proj((q @ k.mT / 8).softmax(dim=-1) @ v)
    step = tower.token_embedding.weight.std()
    assert torch.allclose(module.prompts(enhanced), V + step * read, atol=1e-5)


def test_prompts_do_not_depend_on_the_order_of_patches():
    _, module = make_ecpl()
    enhanced = [torch.randn(2, 16, 64), torch.randn(2, 16, 64)]
    order = torch.randperm(16)
    shuffled = [x[:, order] for x in enhanced]
    assert torch.allclose(module.prompts(shuffled), module.prompts(enhanced), atol=1e-5)


def test_too_long_a_prompt_is_one_clear_error():
    tower = mini.mini_clip()
    longest = 77 - (len("manipulated") + 2)
    ecpl.ECPL(tower, levels=1, context=longest)
    with pytest.raises(ValueError, match=f"found {longest + 1} .*at most {longest}.*--context"):
        ecpl.ECPL(tower, levels=1, context=longest + 1)


# ------------------------------------------------------------------------------------------ SAPL

@torch.no_grad()
def test_the_map_is_the_scaled_difference_of_two_cosines():
    model = moved(mini.mini_sapl())
    image = pictures()
    output = model(image)
    levels, features = model.clip.encode_patches(clip.normalize(image), (1, 2))
    features = features + model.depths.share * (output.depths[0] + output.depths[1])
    cosine = F.cosine_similarity(features[:, :, None], output.text[:, None], dim=-1)   # (B, N, C)
    expected = model.log_scale.exp() * (cosine[..., 1] - cosine[..., 0]) + model.bias
    assert torch.allclose(output.logits.flatten(1), expected, atol=1e-4)

    for z, x, (norm, linear) in zip(output.depths, levels, model.depths.projections):
        assert torch.allclose(z, norm(x) @ linear.weight.T, atol=1e-5)


def test_temperature_is_bounded():
    model = mini.mini_sapl()
    features = torch.randn(1, 6, 48)
    text = torch.stack([-features[:, 0], features[:, 0]], dim=1)               # (1, C, D)
    text = F.normalize(text, dim=-1)
    largest = []
    for log_scale in (-50.0, 50.0):
        model.log_scale.data.fill_(log_scale)
        largest.append(model.similarity(features, text).max().item())
    assert largest == pytest.approx([2, 2 * 100], rel=1e-4)


def test_depths_start_small():
    model = mini.mini_sapl()
    image = pictures()
    _, dense = model.clip.encode_patches(clip.normalize(image))
    for z in model(image).depths:
        assert 0 < z.std() < 0.2 * dense.std()


def test_gradients_reach_our_modules_and_nothing_of_clip():
    model = mini.mini_sapl()
    for _ in range(2):          # what starts at zero lets gradients through from step 2
        output = model(pictures())
        F.binary_cross_entropy_with_logits(output.score, torch.tensor([0.0, 1.0])).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
    for name, parameter in model.named_parameters():
        if name.startswith("clip."):
            assert parameter.grad is None, name
        else:
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("rank, trained", [
    (0, "nothing"), (4, "visual.transformer.resblocks.1.attn.lora.")])
def test_what_of_clip_is_tuned(rank, trained):
    model = mini.mini_sapl(lora_rank=rank, lora_share=0.5)             # of 2 blocks the last one
    for name, parameter in model.clip.named_parameters():
        assert parameter.requires_grad == name.startswith(trained), name
    assert (".lora." in "".join(model.state_dict())) == (rank > 0)


@torch.no_grad()
def test_zoom_shows_the_tower_an_enlarged_picture():
    image = pictures()
    plain = mini.mini_sapl()
    zoomed = mini.mini_sapl(zoom=2)
    output = zoomed(image)
    assert zoomed.cell == 8
    assert output.logits.shape == (2, 8, 8) and output.edges.shape == (2, 64)

    # their text is the same, as prompts do not read the picture yet
    large = F.interpolate(image, scale_factor=2, mode="bilinear")
    assert torch.allclose(output.logits, plain(large).logits, atol=1e-4)
    assert torch.equal(output.edges, ecpl.pool_edges(ecpl.soft_edges(image), 8, 8))


@pytest.mark.parametrize("zoom", [0, 3])
def test_zoom_divides_the_patch(zoom):
    with pytest.raises(ValueError, match=f"zoom {zoom}, expected a divisor of .*16"):
        mini.mini_sapl(zoom=zoom)


@torch.no_grad()
def test_batch_of_one_equals_row_of_two():
    model = moved(mini.mini_sapl())
    image = pictures()
    two = model(image)
    one = model(image[:1])
    for name in ("logits", "score", "text", "edges"):
        assert torch.allclose(getattr(two, name)[:1], getattr(one, name), atol=1e-5), name
    for i in (0, 1):
        assert torch.allclose(two.depths[i][:1], one.depths[i], atol=1e-5)


@pytest.mark.parametrize("image", [torch.zeros(1, 3, 64, 64), torch.ones(1, 3, 16, 96),
                                   torch.full((1, 3, 16, 16), 0.4)])
@torch.no_grad()
def test_constant_and_odd_shaped_pictures_give_numbers(image):
    output = moved(mini.mini_sapl())(image)
    assert output.logits.shape == (1, image.shape[2] // 16, image.shape[3] // 16)
    assert output.logits.isfinite().all() and output.score.isfinite().all()


@torch.no_grad()
def test_bfloat16_is_close_to_float32():
    model = moved(mini.mini_sapl())
    image = pictures()
    full = model(image)
    model.dtype = torch.bfloat16
    with model.autocast():
        half = model(image)
    assert half.depths[0].dtype == torch.bfloat16                              # it was used
    assert half.logits.dtype == half.score.dtype == torch.float32              # what is answered
    assert not torch.equal(half.logits, full.logits)
    assert (half.logits - full.logits).abs().max() < 0.1 * full.logits.std()
    assert torch.allclose(half.score, full.score, atol=0.1)


# ----------------------------------------------------------------------------------------- score

def test_score_and_its_gradient_equal_the_formula():
    torch.manual_seed(0)
    logits = torch.randn(3, 100, requires_grad=True)
    score = ecpl.pool_score(logits, 0.1)
    score.sum().backward()
    for i, row in enumerate(logits.tolist()):
        tenth = sorted(row)[-10]
        weights = np.array([1 / (1 + math.exp(-4 * (x - tenth))) for x in row])
        weights /= weights.sum()
        assert score[i].item() == pytest.approx(weights @ row, abs=1e-4)
        assert logits.grad[i].tolist() == pytest.approx(weights, abs=1e-5)   # which are fixed


def test_score_is_a_smooth_top_k():
    torch.manual_seed(0)
    logits = torch.randn(3, 100)
    score = ecpl.pool_score(logits, 0.1)
    assert (score <= logits.max(dim=1).values).all()
    assert (score > logits.topk(30, dim=1).values.mean(dim=1)).all()
    shuffled = logits[:, torch.randperm(100)]
    assert torch.allclose(ecpl.pool_score(shuffled, 0.1), score, atol=1e-5)
    assert torch.allclose(ecpl.pool_score(logits + 3, 0.1), score + 3, atol=1e-5)
    assert ecpl.pool_score(torch.tensor([[2.5]]), 0.1).item() == 2.5           # a single patch


# --------------------------------------------------------------------------------------- the map

def test_a_map_is_smoothed_to_its_border():
    torch.manual_seed(0)
    x = torch.randn(1, 6, 7)
    smooth = ecpl.smooth(x)
    assert smooth.shape == x.shape
    assert torch.allclose(smooth[0, 2, 3], x[0, 1:4, 2:5].mean())
    corner = F.pad(x, (1, 0, 1, 0), mode="replicate")[0, :3, :3]
    assert torch.allclose(smooth[0, 0, 0], corner.mean())


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 4)])
def test_a_flat_map_stays_flat(size):
    flat = torch.full((1, *size), -0.3)
    assert torch.allclose(ecpl.smooth(flat), flat)


# ----------------------------------------------------------------------------------- checkpoints

@pytest.mark.parametrize("rank", [0, 4])
@torch.no_grad()
def test_a_checkpoint_gives_the_same_model(tmp_path, rank):
    image = pictures()
    model = moved(mini.mini_sapl(lora_rank=rank))
    model.map_shift.fill_(0.7)
    model.score_shift.fill_(-1.3)
    expected = model(image).logits
    ecpl.save_checkpoint(tmp_path / "a.pt", model, epoch=3)
    assert ecpl.load_checkpoint(tmp_path / "a.pt")["epoch"] == 3

    again = ecpl.SAPL.load(tmp_path / "a.pt", "cpu", "fp32")
    assert again.config == model.config and not again.training
    assert again.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(again(image).logits, expected)
    assert again.map_shift == model.map_shift and again.score_shift == model.score_shift


@pytest.mark.parametrize("rank", [0, 4])
@torch.no_grad()
def test_an_official_clip_is_stored_by_name(tmp_path, monkeypatch, rank):
    tower = mini.mini_clip()
    torch.save(tower.state_dict(), tmp_path / "ViT-B-16.pt")
    sha256 = clip.sha256_of(tmp_path / "ViT-B-16.pt")
    monkeypatch.setenv("CLIP_CACHE", str(tmp_path))
    monkeypatch.setattr(clip, "OFFICIAL", {"ViT-B/16": sha256})
    model = ecpl.SAPL(clip.load("ViT-B/16"), mini.CONFIG | {"clip": "ViT-B/16", "lora_rank": rank})
    path = tmp_path / "sapl.pt"
    ecpl.save_checkpoint(path, model.eval())

    stored = ecpl.load_checkpoint(path)
    assert stored["clip"] == {"name": "ViT-B/16", "sha256": sha256}
    assert not [key for key in stored["model"] if ecpl.is_backbone(key)]

    expected = model(pictures()).logits
    assert torch.allclose(ecpl.SAPL.load(path, "cpu", "fp32")(pictures()).logits, expected)


def test_an_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.pt"
    model = mini.mini_sapl()
    ecpl.save_checkpoint(path, model, epoch=1)

    def full_disk(file):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match="cannot write .*m.pt .*No space.*--resume") as error:
            ecpl.save_checkpoint(path, model, epoch=2)
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["m.pt"]
    assert ecpl.load_checkpoint(path)["epoch"] == 1

    ecpl.save_checkpoint(path, model, epoch=3)
    assert ecpl.load_checkpoint(path)["epoch"] == 3
    assert ecpl.load_checkpoint(tmp_path / "m.pt.previous")["epoch"] == 1


def test_the_shipped_model_is_the_default():
    model = ecpl.SAPL.load(device="cpu")
    assert model.config == ecpl.load_checkpoint(clip.TINY)["config"]
    assert not model.training


BROKEN = {
    "text": lambda state: "hello",
    "foreign": lambda state: {"weights": torch.zeros(2)},
    "list": lambda state: [1, 2],
    "old": lambda state: state | {"format": 1},
    "empty": lambda state: {"format": ecpl.FORMAT},
    "config": lambda state: state | {"config": {}},
    "ours": lambda state: state | {"model": dict(list(state["model"].items())[1:])},
    "backbone": lambda state: state | {"clip": dict(list(state["clip"].items())[1:])},
}


@pytest.mark.parametrize("what", BROKEN)
def test_wrong_checkpoints_are_named_in_one_line(tmp_path, what):
    path = tmp_path / f"{what}.pt"
    ecpl.save_checkpoint(tmp_path / "good.pt", mini.mini_sapl())
    torch.save(BROKEN[what](ecpl.load_checkpoint(tmp_path / "good.pt")), path)
    with pytest.raises(ValueError, match=f"{what}.pt") as error:
        ecpl.SAPL.load(path, "cpu")
    assert "\n" not in str(error.value)


def test_an_older_format_is_refused(tmp_path):
    torch.save({"format": 1, "config": {}, "clip": {}, "model": {}}, tmp_path / "old.pt")
    with pytest.raises(ValueError, match="format 1, expected format 4.*train it again"):
        ecpl.SAPL.load(tmp_path / "old.pt", "cpu")


def test_damaged_and_missing_files_are_named_in_one_line(tmp_path):
    good = tmp_path / "good.pt"
    ecpl.save_checkpoint(good, mini.mini_sapl())
    (tmp_path / "cut.pt").write_bytes(good.read_bytes()[:5000])
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").touch()
    (tmp_path / "folder.pt").mkdir()
    for name in ("cut", "text", "empty", "folder", "missing"):
        with pytest.raises((ValueError, OSError), match=f"{name}.pt") as error:
            ecpl.SAPL.load(tmp_path / f"{name}.pt", "cpu")
        assert "\n" not in str(error.value)


# --------------------------------------------------------------------------- devices and formats

def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    cpu = torch.device("cpu")
    assert ecpl.pick_device("cpu") == ecpl.pick_device("auto") == ecpl.pick_device(cpu) == cpu
    for name in ("gpu", "cuda", "cuda:1", "mps"):
        with pytest.raises(ValueError, match=f"found --device {name}.*, expected one of auto, cpu"):
            ecpl.pick_device(name)

    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert ecpl.pick_device("auto") == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert ecpl.pick_device("auto") == ecpl.pick_device("cuda") == torch.device("cuda:0")
    assert ecpl.pick_device(torch.device("cuda")) == torch.device("cuda:0")
    assert ecpl.pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="found --device cuda:2, expected one of auto, cuda:0"):
        ecpl.pick_device("cuda:2")


def test_precision(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    ecpl.save_checkpoint(tmp_path / "m.pt", mini.mini_sapl())
    for precision, dtype in (("auto", torch.bfloat16), ("bf16", torch.bfloat16),
                             ("fp32", torch.float32)):
        model = ecpl.SAPL.load(tmp_path / "m.pt", "cpu", precision)
        assert model.dtype == dtype
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        with model.autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


@pytest.mark.parametrize("amx, avx512, expected", [
    (False, False, torch.float32), (True, False, torch.bfloat16), (False, True, torch.bfloat16)])
def test_auto_precision_on_a_cpu(monkeypatch, amx, avx512, expected):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    assert ecpl.pick_dtype("auto", torch.device("cpu")) == expected


@pytest.mark.parametrize("capability, expected", [
    ((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((10, 0), torch.bfloat16)])
def test_auto_precision_on_a_gpu(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert ecpl.pick_dtype("auto", torch.device("cuda", 1)) == expected
    assert ecpl.pick_dtype("auto", torch.device("mps")) == torch.float32


# ---------------------------------------------------------------------------------------- lesson

def test_the_lesson_runs(tmp_path, capsys):
    ecpl.demo(tmp_path / "method.png")
    assert len(capsys.readouterr().out.splitlines()) > 5
    sheet = Image.open(tmp_path / "method.png")
    assert sheet.width > 4 * sheet.height                                      # panels in a row
