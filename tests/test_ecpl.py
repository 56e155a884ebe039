"""ECPL and SAPL: edges, prompts, map, score: references and properties."""
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import clip
import ecpl
import mini
from mini import close


def pictures(B=2, side=64):
    """One colour each with a rectangle of another, and noise: (B, 3, side, side) in [0, 1]."""
    torch.manual_seed(1)
    image = torch.rand(B, 3, 1, 1).repeat(1, 1, side, side)
    image[..., 16:40, 20:50] = torch.rand(B, 3, 1, 1)
    image += 0.02 * torch.randn(B, 3, side, side)
    return image.clamp(0, 1)


@torch.no_grad()
def moved(model):
    """The model as if trained a little: what starts at zero is no longer zero."""
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.02 * torch.randn_like(parameter)
    return model


@pytest.fixture
def tower():
    return mini.mini_clip()


@pytest.fixture
def module(tower):
    """An ECPL of two levels whose prompts follow the picture."""
    module = ecpl.ECPL(tower, levels=2, context=4).eval()
    nn.init.normal_(module.attention.out_proj.weight)
    return module


def features(B):
    """Random patch features of two levels, for a grid of 4 x 4."""
    return list(torch.randn(2, B, 16, 64))


def test_sobel_equals_two_convolutions():
    torch.manual_seed(0)
    x = torch.randn(4, 1, 5, 6)
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    smoothing = torch.tensor([1.0, 2.0, 1.0])
    difference = torch.tensor([1.0, 0.0, -1.0])
    kernel = smoothing[:, None] * difference / 8
    gx = F.conv2d(padded, kernel[None, None])
    gy = F.conv2d(padded, kernel.T[None, None])
    found = ecpl.sobel(x.view(2, 2, 5, 6))
    assert close(found.view_as(x), torch.hypot(gx, gy))


def test_soft_edges_equal_the_formula_and_ignore_brightness():
    image = pictures() * 0.8 + 0.1
    edge = ecpl.soft_edges(image)
    weights = torch.tensor([0.299, 0.587, 0.114])
    luminance = torch.einsum("c,bchw->bhw", weights, image)
    g = ecpl.sobel(luminance[:, None])
    typical = g.mean(dim=(2, 3), keepdim=True)
    assert close(edge, g / (g + typical + 1e-3))
    assert edge.max() < 1

    darker = ecpl.soft_edges(image * 0.5)
    assert (darker - edge).abs().mean() < 0.02
    brighter = ecpl.soft_edges(image + 0.1)
    assert close(brighter, edge, 1e-4)
    flat = torch.full((1, 3, 32, 32), 0.3)
    assert ecpl.soft_edges(flat).max() < 1e-3


def test_pooled_edges_point_at_the_outline():
    image = torch.zeros(1, 3, 64, 64)
    image[..., 16:48, 16:48] = 1
    soft = ecpl.soft_edges(image)
    edges = ecpl.pool_edges(soft, 8, 8).view(8, 8)
    patch = soft[0, 0, 8:16, 16:24]
    strongest = patch.flatten().topk(16).values
    assert close(edges[1, 2], strongest.mean())
    assert edges[2, 2:6].min() > 0.4
    assert edges[3:5, 3:5].max() < 0.01
    assert edges[0].max() < 0.01


def test_feature_variation_is_large_only_at_the_boundary():
    x = torch.zeros(1, 6, 6, 5)
    x[:, :, 3:] = 1
    variation = ecpl.feature_variation(x.flatten(1, 2), 6, 6)
    variation = variation.view(6, 6, 5)
    assert variation[:, 2:4].min() > 0.4
    assert variation[:, :2].max() < 1e-6
    assert variation[:, 4:].max() < 1e-6


def test_enhanced_features_equal_the_formula_and_do_not_train_the_tower(module):
    levels = features(2)
    levels[0].requires_grad_(True)
    edges = torch.rand(2, 16)
    for x, enhanced in zip(levels, module.enhance(levels, edges, 4, 4)):
        variation = ecpl.feature_variation(x, 4, 4)
        assert close(enhanced, x + edges[..., None] * variation)
        assert not enhanced.requires_grad


@torch.no_grad()
def test_prompts_equal_the_formula(tower, module):
    moved(module)
    enhanced = features(2)
    first, second = module.projections
    G = first(enhanced[0]) + second(enhanced[1])
    V = module.context.view(8, 64).expand(2, -1, -1)
    maps = module.attention.in_proj_weight.chunk(3)                  # one head of 64 numbers
    biases = module.attention.in_proj_bias.chunk(3)
    q = F.linear(module.norm_query(V), maps[0], biases[0])
    k = F.linear(G, maps[1], biases[1])
    v = F.linear(G, maps[2], biases[2])
    weights = (q @ k.mT / 8).softmax(dim=-1)
    read = module.attention.out_proj(weights @ v)
    step = tower.token_embedding.weight.std()
    assert close(module.prompts(enhanced), V + step * read)


def test_text_features_equal_the_tower_on_the_full_77_tokens(tower, module):
    prompts = torch.randn(3, 8, 64)                                            # (B, C * M, Dt)
    text = module.encode(tower, prompts)
    own = prompts.chunk(2, dim=1)
    for c, word in enumerate(ecpl.CLASSES):
        ids = clip.tokenize([word], vocab_size=514)
        words = tower.token_embedding(ids).expand(3, -1, -1)
        start, rest, _ = words.split([1, 72, 4], dim=1)
        sentence = torch.cat([start, own[c], rest], dim=1)
        expected = tower.encode_prompts(sentence, int(ids.argmax()) + 4)
        assert close(text[:, c], F.normalize(expected, dim=-1))


def test_prompts_start_plain_and_follow_the_picture_and_its_edges_once_trained(tower, module):
    levels = features(2)
    edges = torch.rand(2, 16)
    text = module(tower, levels, edges, 4, 4)
    assert close(text.norm(dim=-1), torch.ones(2, 2))
    assert not close(text[0], text[1], 1e-3)
    without_edges = module(tower, levels, torch.zeros(2, 16), 4, 4)
    assert not close(text, without_edges, 1e-3)

    fresh = ecpl.ECPL(tower, levels=2, context=4).eval()
    context = fresh.context.flatten(0, 1)
    plain = fresh.encode(tower, context[None])                                 # (1, C, D)
    text = fresh(tower, levels, edges, 4, 4)
    assert close(text, plain.expand(2, -1, -1))


@torch.no_grad()
def test_the_map_is_the_scaled_difference_of_two_cosines():
    model = moved(mini.mini_sapl())
    image = pictures()
    output = model(image)
    levels, dense = model.clip.encode_patches(clip.normalize(image), (1, 2))
    x = dense + output.depths[0] + output.depths[1]
    genuine = F.cosine_similarity(x, output.text[:, :1], dim=-1)               # (B, N)
    manipulated = F.cosine_similarity(x, output.text[:, 1:], dim=-1)           # (B, N)
    expected = model.log_scale.exp() * (manipulated - genuine) + model.bias
    assert close(output.logits.flatten(1), expected, 1e-4)

    for z, x, layer in zip(output.depths, levels, model.depths.layers):
        norm, first, _, last = layer
        hidden = F.gelu(norm(x) @ first.weight.T + first.bias)
        assert close(z, hidden @ last.weight.T)


def test_temperature_is_bounded():
    model = mini.mini_sapl()
    x = F.normalize(torch.randn(1, 6, 48), dim=-1)
    first = x[:, :1]
    text = torch.cat([-first, first], dim=1)                                   # (1, C, D)
    for log_scale, largest in ((-50.0, 2), (50.0, 2 * 100)):
        model.log_scale.data.fill_(log_scale)
        found = model.similarity(x, text).max().item()
        assert found == pytest.approx(largest, rel=1e-4)


@pytest.mark.parametrize("rank, tuned", [(0, "nothing"), (4, "clip.visual.transformer.resblocks.1")])
def test_gradients_reach_our_modules_and_of_clip_only_the_last_lora(rank, tuned):
    model = mini.mini_sapl(lora_rank=rank, lora_share=0.5)             # of 2 blocks the last one
    for _ in range(2):          # what starts at zero lets gradients through from step 2
        score = model(pictures()).score
        F.binary_cross_entropy_with_logits(score, torch.tensor([0.0, 1.0])).backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.data -= 0.1 * parameter.grad
    for name, parameter in model.named_parameters():
        if name.startswith("clip.") and not name.startswith(f"{tuned}.attn.lora"):
            assert parameter.grad is None, name
        else:
            assert parameter.grad.any(), name


@torch.no_grad()
def test_zoom_shows_the_tower_an_enlarged_picture():
    image = pictures()
    output = mini.mini_sapl(zoom=2)(image)
    soft = ecpl.soft_edges(image)
    assert torch.equal(output.edges, ecpl.pool_edges(soft, 8, 8))
    # the same text, as prompts do not read the picture yet
    large = F.interpolate(image, scale_factor=2, mode="bilinear")
    plain = mini.mini_sapl()(large)
    assert close(output.logits, plain.logits, 1e-4)


@torch.no_grad()
def test_batch_of_one_equals_row_of_two():
    model = moved(mini.mini_sapl())
    two = model(pictures())
    one = model(pictures()[:1])
    for name in ("logits", "score", "text", "edges"):
        row = getattr(two, name)[:1]
        assert close(getattr(one, name), row), name
    for z, row in zip(one.depths, two.depths):
        assert close(z, row[:1])


@pytest.mark.parametrize("h, w", [(4, 4), (1, 6), (1, 1)])
@torch.no_grad()
def test_constant_and_odd_shaped_pictures_give_numbers(h, w):
    image = torch.zeros(1, 3, 16 * h, 16 * w)
    output = moved(mini.mini_sapl())(image)
    assert output.logits.shape == (1, h, w)
    assert output.logits.isfinite().all()
    assert output.score.isfinite().all()


@torch.no_grad()
def test_bfloat16_is_close_to_float32():
    model = moved(mini.mini_sapl())
    full = model(pictures())
    model.dtype = torch.bfloat16
    with model.autocast():
        half = model(pictures())
    assert half.depths[0].dtype == torch.bfloat16                              # it was used
    assert half.logits.dtype == half.score.dtype == torch.float32              # what is answered
    error = (half.logits - full.logits).abs().max()
    assert 0 < error < 0.1 * full.logits.std()
    assert close(half.score, full.score, 0.1)


@pytest.mark.parametrize("scale", [0.01, 1, 100])
def test_score_and_its_gradient_equal_the_formula(scale):
    torch.manual_seed(0)
    logits = scale * torch.randn(3, 100)
    logits.requires_grad_(True)
    score = ecpl.pool_score(logits, 0.1)
    score.sum().backward()
    for i, row in enumerate(logits.detach().numpy()):
        tenth = np.sort(row)[-10]                            # 0.1 of 100 patches
        distance = (row - tenth) / row.std()
        weights = 1 / (1 + np.exp(-4 * distance))
        weights /= weights.sum()
        assert score[i].item() == pytest.approx(weights @ row, rel=1e-3)
        assert logits.grad[i].numpy() == pytest.approx(weights, abs=1e-5)    # which are fixed


def test_a_map_is_smoothed_to_its_border():
    for h, w in ((6, 7), (1, 5)):
        x = torch.randn(2, 1, h, w)
        padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
        windows = F.unfold(padded, 3)                                          # (2, 9, N)
        found = ecpl.smooth(x[:, 0])
        assert close(found.flatten(1), windows.mean(dim=1))
