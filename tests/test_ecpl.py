"""ECPL and SAPL: edges, prompts, map, score: references and properties."""
import math

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


def test_soft_edges_equal_the_formula_and_ignore_brightness():
    image = pictures() * 0.8 + 0.1
    edge = ecpl.soft_edges(image)
    luminance = torch.einsum("c,bchw->bhw", torch.tensor([0.299, 0.587, 0.114]), image)
    g = ecpl.sobel(luminance[:, None])
    assert torch.allclose(edge, g / (g + g.mean(dim=(2, 3), keepdim=True) + 1e-3), atol=1e-5)
    assert edge.min() >= 0 and edge.max() < 1
    assert (ecpl.soft_edges(image * 0.5) - edge).abs().mean() < 0.02           # darker
    assert torch.allclose(ecpl.soft_edges(image + 0.1), edge, atol=1e-4)       # brighter


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_soft_edges_of_a_constant_picture_are_zero(value):
    assert ecpl.soft_edges(torch.full((1, 3, 32, 32), value)).max() < 1e-3


def test_pooled_edges_point_at_the_outline():
    image = torch.zeros(1, 3, 64, 64)
    image[..., 16:48, 16:48] = 1
    soft = ecpl.soft_edges(image)
    edges = ecpl.pool_edges(soft, 8, 8).view(8, 8)
    strongest = soft[0, 0, 8:16, 16:24].flatten().topk(16).values
    assert edges[1, 2].item() == pytest.approx(strongest.mean().item())
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


def test_enhanced_features_are_the_features_where_there_are_no_edges():
    torch.manual_seed(0)
    _, module = make_ecpl()
    levels = [torch.randn(2, 16, 64, requires_grad=True), torch.randn(2, 16, 64)]
    edges = torch.rand(2, 16)
    edges[:, :8] = 0
    for x, enhanced in zip(levels, module.enhance(levels, edges, 4, 4)):
        assert torch.equal(enhanced[:, :8], x[:, :8]) and not enhanced.requires_grad
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


def test_too_long_a_prompt_is_one_clear_error():
    tower = mini.mini_clip()
    longest = 77 - (len("manipulated") + 2)
    ecpl.ECPL(tower, levels=1, context=longest)
    with pytest.raises(ValueError, match=f"found {longest + 1} .*at most {longest}.*--context"):
        ecpl.ECPL(tower, levels=1, context=longest + 1)


@torch.no_grad()
def test_the_map_is_the_scaled_difference_of_two_cosines():
    model = moved(mini.mini_sapl())
    image = pictures()
    output = model(image)
    levels, dense = model.clip.encode_patches(clip.normalize(image), (1, 2))
    features = dense + output.depths[0] + output.depths[1]
    cosine = F.cosine_similarity(features[:, :, None], output.text[:, None], dim=-1)   # (B, N, C)
    expected = model.log_scale.exp() * (cosine[..., 1] - cosine[..., 0]) + model.bias
    assert torch.allclose(output.logits.flatten(1), expected, atol=1e-4)

    for z, x, (norm, first, _, last) in zip(output.depths, levels, model.depths.layers):
        hidden = F.gelu(norm(x) @ first.weight.T + first.bias)
        assert torch.allclose(z, hidden @ last.weight.T, atol=1e-5)


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
    # the same text, as prompts do not read the picture yet
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


def test_score_and_its_gradient_equal_the_formula():
    torch.manual_seed(0)
    logits = torch.randn(3, 100, requires_grad=True)
    score = ecpl.pool_score(logits, 0.1)
    score.sum().backward()
    for i, row in enumerate(logits.tolist()):
        tenth = sorted(row)[-10]                             # 0.1 of 100 patches
        weights = 1 / (1 + np.exp(-4 * (np.array(row) - tenth) / np.std(row)))
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
    for factor in (0.01, 100):               # the same patches count, whatever the temperature
        scaled = ecpl.pool_score(factor * logits, 0.1)
        assert torch.allclose(scaled, factor * score, rtol=1e-3)
    assert ecpl.pool_score(torch.tensor([[2.5]]), 0.1).item() == 2.5           # a single patch


def test_a_map_is_smoothed_to_its_border():
    torch.manual_seed(0)
    x = torch.randn(1, 6, 7)
    smooth = ecpl.smooth(x)
    assert smooth.shape == x.shape
    assert torch.allclose(smooth[0, 2, 3], x[0, 1:4, 2:5].mean())
    corner = F.pad(x, (1, 0, 1, 0), mode="replicate")[0, :3, :3]
    assert torch.allclose(smooth[0, 0, 0], corner.mean())
    for size in ((1, 1), (1, 5), (5, 4)):
        flat = torch.full((1, *size), -0.3)
        assert torch.allclose(ecpl.smooth(flat), flat)


def test_the_lesson_runs(tmp_path, capsys):
    ecpl.demo(tmp_path / "method.png")
    assert len(capsys.readouterr().out.splitlines()) > 5
    sheet = Image.open(tmp_path / "method.png")
    assert sheet.width > 4 * sheet.height                                      # panels in a row
