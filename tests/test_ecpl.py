"""ECPL: edges, prompts, map, score, regions: references and properties."""
import pytest
import torch
import torch.nn.functional as F

import clip
import ecpl

SETTINGS = dict(levels=(1, 2), context=4, class_words=ecpl.CLASSES, edge_source="image",
                prompts="enhanced", dense="plain", rho=0.1, zoom=1)


def picture(B=2, side=64):
    torch.manual_seed(1)
    image = torch.rand(B, 3, 1, 1).expand(B, 3, side, side).clone()
    image[..., 16:40, 20:50] = torch.rand(B, 3, 1, 1)
    return (image + 0.02 * torch.randn(B, 3, side, side)).clamp(0, 1)


def test_sobel_equals_the_formula_pixel_by_pixel():
    x = torch.rand(1, 1, 5, 6)
    pad = F.pad(x, (1, 1, 1, 1), mode="replicate")[0, 0]
    for i in range(5):
        for j in range(6):
            a = pad[i:i + 3, j:j + 3]
            gx = (a[0, 0] + 2 * a[1, 0] + a[2, 0] - a[0, 2] - 2 * a[1, 2] - a[2, 2]) / 8
            gy = (a[0, 0] + 2 * a[0, 1] + a[0, 2] - a[2, 0] - 2 * a[2, 1] - a[2, 2]) / 8
            length = (gx ** 2 + gy ** 2).sqrt().item()
            assert ecpl.sobel(x)[0, 0, i, j].item() == pytest.approx(length, abs=1e-6)


def test_soft_edges_ignore_contrast_and_brightness():
    image = picture() * 0.8 + 0.1
    edge = ecpl.soft_edges(image)
    assert edge.min() >= 0 and edge.max() < 1
    assert (ecpl.soft_edges(image * 0.5) - edge).abs().mean() < 0.02          # darker
    assert torch.allclose(ecpl.soft_edges(image + 0.1), edge, atol=1e-4)      # brighter


def test_soft_edges_of_a_constant_picture_are_zero():
    for value in (0.0, 0.3, 1.0):
        edge = ecpl.soft_edges(torch.full((1, 3, 32, 32), value))
        assert torch.isfinite(edge).all() and edge.max() < 1e-3


def test_pooled_edges_point_at_the_outline():
    image = torch.zeros(1, 3, 64, 64)
    image[..., 16:48, 16:48] = 1
    edges = ecpl.pool_edges(ecpl.soft_edges(image), 8, 8).view(8, 8)
    outline = torch.zeros(8, 8, dtype=torch.bool)
    outline[2:6, 2:6] = True
    outline[3:5, 3:5] = False
    assert edges[outline].min() > 0.4
    assert edges[3:5, 3:5].max() < 0.01 and edges[0].max() < 0.01


def test_flat_patches_say_nothing_to_the_prompts(mini):
    model = ecpl.ECPL(mini, **SETTINGS).eval()
    torch.nn.init.normal_(model.learner.attention.out_proj.weight, std=1 / ecpl.WORD)
    features, weight = [torch.randn(1, 16, 64) for _ in range(2)], torch.zeros(1, 16)
    quiet = model.learner(mini, features, weight)
    assert torch.allclose(model.learner(mini, [-3 * x for x in features], weight), quiet, atol=1e-5)
    assert not torch.allclose(model.learner(mini, features, weight + 0.5), quiet, atol=1e-3)


def test_enhanced_features_are_the_features_where_there_are_no_edges(mini):
    model = ecpl.ECPL(mini, **SETTINGS).eval()
    torch.nn.init.normal_(model.learner.attention.out_proj.weight, std=1 / ecpl.WORD)
    levels = [torch.randn(2, 16, 64) for _ in range(2)]
    quiet, loud = (model.text_features(mini, levels, edges, 4, 4)
                   for edges in (torch.zeros(2, 16), torch.rand(2, 16)))
    assert torch.equal(quiet, model.learner(mini, levels))
    assert not torch.allclose(quiet, loud, atol=1e-3)


def test_feature_variation_is_large_only_at_the_boundary():
    features = torch.zeros(1, 36, 5)
    features.view(1, 6, 6, 5)[:, :, 3:] = 1
    variation = ecpl.feature_variation(features, 6, 6).view(6, 6, 5)
    assert (variation[:, 2:4] > 0.4).all()
    assert variation[:, :2].max() < 1e-6 and variation[:, 4:].max() < 1e-6


def test_starts_as_the_plain_learned_prompt(mini):
    torch.manual_seed(3)
    model = ecpl.ECPL(mini, **SETTINGS).eval()
    plain = ecpl.ECPL(mini, **SETTINGS | {"prompts": "plain"}).eval()
    plain.learner.context.data.copy_(model.learner.context)
    image = picture()
    assert torch.allclose(model(mini, image).logits, plain(mini, image).logits, atol=1e-5)


def test_zoom_shows_the_tower_an_enlarged_picture(mini):
    plain = SETTINGS | {"prompts": "plain"}
    torch.manual_seed(3)
    model = ecpl.ECPL(mini, **plain).eval()
    torch.manual_seed(3)
    zoomed = ecpl.ECPL(mini, **plain | {"zoom": 2}).eval()
    image = picture()
    out = zoomed(mini, image)
    assert zoomed.cell == 8 and out.logits.shape == (2, 8, 8) and out.edges.shape == (2, 64)
    large = F.interpolate(image, scale_factor=2, mode="bilinear")
    assert torch.allclose(out.logits, model(mini, large).logits, atol=1e-4)
    with pytest.raises(ValueError, match="zoom 3"):
        ecpl.ECPL(mini, **plain | {"zoom": 3})


def test_text_features_equal_the_tower_on_the_full_77_tokens(mini):
    model = ecpl.ECPL(mini, **SETTINGS | {"prompts": "plain"}).eval()
    text = model.learner(mini, None)
    for c, word in enumerate(ecpl.CLASSES):
        ids = clip.tokenize([word], vocab_size=514)
        start, rest = mini.token_embedding(ids)[:, :1], mini.token_embedding(ids)[:, 1:73]
        sentence = torch.cat([start, model.learner.context[c][None], rest], dim=1)
        assert sentence.shape[1] == 77
        reference = mini.encode_prompts(sentence, int(ids.argmax()) + 4)
        assert torch.allclose(F.normalize(reference, dim=-1), text[:, c], atol=1e-5)


@pytest.mark.parametrize("prompts", ["enhanced", "edges", "patches", "plain", "none"])
def test_gradients_reach_ecpl_and_nothing_of_clip(mini, prompts):
    mini.requires_grad_(False)
    model = ecpl.ECPL(mini, **SETTINGS | {"prompts": prompts})
    for step in range(2):           # the zero-initialised maps let gradients through from step 2
        out = model(mini, picture())
        loss = F.binary_cross_entropy_with_logits(out.score_logit, torch.tensor([0.0, 1.0]))
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
    assert all(p.grad is None for p in mini.parameters())
    silent = [name for name, p in model.named_parameters() if not p.grad.abs().sum() > 0]
    assert silent == []


def test_levels_join_stage_by_stage_up_to_the_features_of_the_map(mini):
    model = ecpl.ECPL(mini, **SETTINGS).eval()
    for gate in model.level_gates:
        torch.nn.init.normal_(gate.weight, std=0.1)
    out = model(mini, picture())
    first, last = out.stages
    assert not torch.allclose(first, last, atol=0.1)
    assert torch.equal(model.similarity(last, out.text), out.logits.flatten(1))


def test_prompts_follow_the_picture_once_trained(mini):
    model = ecpl.ECPL(mini, **SETTINGS).eval()
    torch.nn.init.normal_(model.learner.attention.out_proj.weight)
    text = model(mini, picture()).text
    assert not torch.allclose(text[0], text[1], atol=1e-3)


@pytest.mark.parametrize("source", ["image", "features"])
def test_batch_of_one_equals_row_of_two(mini, source):
    model = ecpl.ECPL(mini, **SETTINGS | {"edge_source": source}).eval()
    image = picture()
    two, one = model(mini, image), model(mini, image[:1])
    for name in ("logits", "probability", "score_logit", "edges"):
        assert torch.allclose(getattr(two, name)[:1], getattr(one, name), atol=1e-5), name


def test_constant_and_odd_shaped_pictures_give_numbers(mini):
    model = ecpl.ECPL(mini, **SETTINGS).eval()
    for image in (torch.zeros(1, 3, 64, 64), torch.ones(1, 3, 16, 96), torch.rand(1, 3, 16, 16)):
        out = model(mini, image)
        assert torch.isfinite(out.logits).all() and torch.isfinite(out.score_logit).all()


def test_score_is_between_the_mean_of_the_top_and_the_maximum():
    logits = torch.randn(3, 100)
    score = ecpl.pool_score(logits, 0.1)
    assert (score <= logits.max(dim=1).values).all()
    assert (score > logits.topk(30, dim=1).values.mean(dim=1)).all()
    assert torch.allclose(ecpl.pool_score(torch.full((1, 9), 2.5), 0.1), torch.tensor([2.5]))
    flat = logits.flatten(1)[:, torch.randperm(100)]
    assert torch.allclose(ecpl.pool_score(flat, 0.1), score, atol=1e-5)  # the order is no matter


def test_temperature_is_bounded(mini):
    model = ecpl.ECPL(mini, **SETTINGS)
    features, text = torch.randn(1, 6, 48), F.normalize(torch.randn(1, 2, 48), dim=-1)
    for log_scale in (-50.0, 50.0):
        model.log_scale.data.fill_(log_scale)
        assert model.similarity(features, text).abs().max() <= 2 * 100


def brute_force_fill(values):
    """Minimax path to the border by repeated relaxation over single cells."""
    h, w = values.shape
    level = [[values[i, j].item() if i in (0, h - 1) or j in (0, w - 1) else float("inf")
              for j in range(w)] for i in range(h)]
    for _ in range(h * w):
        for i in range(1, h - 1):
            for j in range(1, w - 1):
                way = min(level[i - 1][j], level[i + 1][j], level[i][j - 1], level[i][j + 1])
                level[i][j] = min(level[i][j], max(values[i, j].item(), way))
    return torch.tensor(level)


def test_regions_fill_equals_brute_force():
    torch.manual_seed(0)
    x = torch.rand(2, 7, 9)
    for i in range(2):
        assert torch.allclose(ecpl.regions(x, reach=0)[i], brute_force_fill(x[i]))


def test_regions_close_a_broken_ring_and_keep_the_rest():
    x = torch.full((1, 12, 12), 0.1)
    x[0, 2:9, 2:9] = 0.9
    x[0, 3:8, 3:8] = 0.2
    x[0, 2, 5] = 0.1                                                     # the gap
    out = ecpl.regions(x)
    assert (out[0, 2:9, 2:9] == 0.9).all() and (out >= x).all()
    assert (out[0, 10:] == 0.1).all() and (out[0, :, 10:] == 0.1).all()
    flat = torch.full((1, 5, 4), 0.3)
    assert torch.equal(ecpl.regions(flat), flat)
    assert ecpl.regions(torch.rand(1, 1, 1)).shape == (1, 1, 1)


def test_regions_are_smoothed_last_and_keep_the_mean_of_a_flat_map():
    flat = torch.full((1, 5, 4), 0.3)
    assert torch.allclose(ecpl.regions(flat, radius=2), flat)
    x = torch.rand(1, 6, 7)
    closed = ecpl.regions(x)
    assert torch.allclose(ecpl.regions(x, radius=1)[0, 2, 3], closed[0, 1:4, 2:5].mean())


def test_too_long_a_prompt_is_one_clear_error(mini):
    with pytest.raises(ValueError, match="shorten"):
        ecpl.ECPL(mini, **SETTINGS | {"context": 70})
