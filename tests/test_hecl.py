"""HECL: selection, dual queue, contrastive loss: references and properties."""
import math

import pytest
import torch
import torch.nn.functional as F

import hecl


def batch(labels=(0, 1, 0, 1), N=20, seed=0):
    """depths of width 16 that take gradients, edges, logits, labels: what HECL is called with."""
    torch.manual_seed(seed)
    B = len(labels)
    depths = [torch.randn(B, N, 16, requires_grad=True), torch.randn(B, N, 16, requires_grad=True)]
    return depths, torch.rand(B, N), torch.randn(B, N), torch.tensor(labels)


def make(**changes):
    """The same random HECL of two depths, every time."""
    torch.manual_seed(5)
    settings = {"levels": 2, "width": 16, "dim": 6, "queue": 8, "tau": 0.1, "share": 0.4, "top": 3}
    return hecl.HECL(**settings | changes)


# ----------------------------------------------------------------------------------------- which

def test_the_ends_of_the_ranking_of_edge_patches_are_selected():
    _, edges, logits, _ = batch()
    most, least = hecl.select(edges, logits, share=0.4, top=3)
    for b in range(4):
        strong = edges[b].topk(8).indices.tolist()
        ranked = sorted(strong, key=lambda n: logits[b, n].item())
        assert sorted(least[b].tolist()) == sorted(ranked[:3])
        assert sorted(most[b].tolist()) == sorted(ranked[-3:])


@pytest.mark.parametrize("N, share, expected", [(1, 0.4, 1), (4, 0.5, 1), (20, 0.1, 1),
                                                (20, 0.4, 3), (10, 0.4, 2), (20, 1.0, 3)])
def test_how_many_are_selected(N, share, expected):
    _, edges, logits, _ = batch(N=N)
    most, least = hecl.select(edges, logits, share=share, top=3)
    assert most.shape == least.shape == (4, expected)


def test_no_patch_is_selected_as_both_even_in_a_constant_picture():
    most, least = hecl.select(torch.zeros(2, 16), torch.zeros(2, 16), share=0.4, top=4)
    for b in range(2):
        assert not set(most[b].tolist()) & set(least[b].tolist())


# ---------------------------------------------------------------------------------------- queues

def test_a_queue_is_first_in_first_out_and_wraps():
    queue = hecl.DualQueue(5, 1)
    assert len(queue.keys()[0]) == 0

    pushed = []
    for start in range(1, 15, 2):
        values = torch.tensor([[start], [start + 1.0]])
        queue.push(values, 100 + values)
        pushed = (pushed + [start, start + 1])[-5:]
        features, classes = queue.keys()
        assert sorted(features[classes == 0, 0].tolist()) == pushed
        assert sorted(features[classes == 1, 0].tolist()) == [100 + x for x in pushed]

    many = torch.arange(9.0)[:, None]                          # more than it holds: the last ones
    queue.push(many, many)
    assert sorted(queue.keys()[0][:5, 0].tolist()) == [4, 5, 6, 7, 8]


def test_queues_start_empty_fill_equally_and_are_saved():
    inputs = batch(labels=(0, 1, 1, 1))
    model = make(queue=50)
    model(*inputs)
    for queue in model.queues:                                 # 3 patches of one picture a class
        assert len(queue.keys()[0]) == 6
        assert torch.allclose(queue.keys()[0].norm(dim=-1), torch.ones(6))

    other = make(queue=50)
    other.load_state_dict(model.state_dict())
    assert other(*inputs).item() == model(*inputs).item()
    assert make(queue=50)(*inputs).item() != model(*inputs).item()


def test_what_looks_most_manipulated_is_queued():
    depths, edges, logits, labels = batch(labels=(0, 1))
    model = make(queue=50)
    model(depths, edges, logits, labels)
    most, _ = hecl.select(edges, logits, share=0.4, top=3)
    features, classes = model.queues[1].keys()
    for b in (0, 1):
        expected = F.normalize(model.heads[1](depths[1][b, most[b]]), dim=-1)
        assert torch.allclose(features[classes == b], expected, atol=1e-6)


def test_evaluation_leaves_no_trace_and_a_queue_is_not_needed():
    model = make().eval()
    model(*batch())
    assert len(model.queues[0].keys()[0]) == 0
    none = make(queue=0)
    assert none(*batch()) == none(*batch()) == model(*batch())


# ------------------------------------------------------------------------------------------ loss

def test_contrast_equals_the_formula_term_by_term():
    torch.manual_seed(0)
    anchors = F.normalize(torch.randn(4, 4), dim=-1)
    keys = F.normalize(torch.randn(5, 4), dim=-1)
    classes = torch.tensor([0, 1, 1, 1])
    key_classes = torch.tensor([0, 1, 0, 1, 1])
    ignore = torch.zeros(4, 5, dtype=torch.bool)
    ignore[1, 3] = True
    ignore[3, [1, 3, 4]] = True                                # no positive: left out

    terms = []
    for i in range(3):
        used = [j for j in range(5) if not ignore[i, j]]
        values = {j: math.exp(float(anchors[i] @ keys[j]) / 0.1) for j in used}
        own_class = [j for j in used if key_classes[j] == classes[i]]
        each = [-math.log(values[j] / sum(values.values())) for j in own_class]
        terms.append(sum(each) / len(each))
    loss = hecl.contrast(anchors, classes, keys, key_classes, ignore, 0.1)
    assert loss.item() == pytest.approx(sum(terms) / 3, rel=1e-5)


def brute_force(depths, edges, logits, labels, heads):
    """The loss of a batch alone, anchor by anchor."""
    most, least = hecl.select(edges, logits, share=0.4, top=3)
    levels = []
    for z, head in zip(depths, heads):
        patches = []                                           # (unit feature, class, picture)
        for b, label in enumerate(labels.tolist()):
            for index, kind in ((most[b], label), (least[b], 0)):
                for feature in F.normalize(head(z[b, index]), dim=-1):
                    patches.append((feature, kind, b))
        terms = []
        for feature, kind, picture in patches:
            pull = []
            total = 0
            for other, other_kind, other_picture in patches:
                if other_kind == kind and other_picture == picture:
                    continue
                value = torch.exp(feature @ other / 0.1)
                total += value
                if other_kind == kind:
                    pull.append(value)
            terms.append(-torch.log(torch.stack(pull) / total).mean())
        levels.append(torch.stack(terms).mean())
    return torch.stack(levels).mean()


def test_the_loss_of_a_batch_equals_brute_force():
    inputs = batch()
    model = make(queue=0)
    assert model(*inputs).item() == pytest.approx(brute_force(*inputs, model.heads).item(), 1e-5)


def test_queued_features_are_keys_of_their_class():
    depths, edges, logits, labels = batch()
    model = make(queue=50).eval()
    alone = model(depths, edges, logits, labels)
    most, _ = hecl.select(edges, logits, share=0.4, top=3)
    for z, head, queue in zip(depths, model.heads, model.queues):
        anchors = F.normalize(head(z.gather(1, most[..., None].expand(-1, -1, 16))), dim=-1)
        queue.push(anchors[0].detach(), anchors[1].detach())
    as_they_are = model(depths, edges, logits, labels)
    for queue in model.queues:
        queue.features.copy_(queue.features.flip(0))           # classes exchanged
    assert as_they_are < model(depths, edges, logits, labels)
    assert as_they_are != alone


def test_pulling_edge_patches_of_a_class_together_lowers_it():
    depths, edges, logits, labels = batch()
    before = make()(depths, edges, logits, labels)
    most, least = hecl.select(edges, logits, share=0.4, top=3)
    moved = [z.detach().clone() for z in depths]
    for z in moved:
        for b in range(4):
            direction = 2.0 if labels[b] == 1 else -2.0
            z[b, most[b]] = 0.5 * z[b, most[b]] + direction
            z[b, least[b]] = 0.5 * z[b, least[b]] - 2.0
    assert make()(moved, edges, logits, labels) < before


def test_gradients_reach_heads_and_only_the_selected_patches():
    depths, edges, logits, labels = batch()
    logits.requires_grad_(True)
    model = make()
    model(depths, edges, logits, labels).backward()
    for parameter in model.parameters():
        assert parameter.grad.abs().sum() > 0
    assert logits.grad is None                                 # choosing is not learned

    selected = torch.cat(hecl.select(edges, logits, share=0.4, top=3), dim=1)
    expected = torch.zeros(4, 20, dtype=torch.bool).scatter(1, selected, True)
    for z in depths:
        assert torch.equal(z.grad.abs().sum(dim=-1) > 0, expected)


def test_each_depth_is_contrasted_by_itself():
    depths, edges, logits, labels = batch()
    both = make(queue=0)
    losses = []
    for i in (0, 1):
        single = make(queue=0, levels=1)
        single.heads[0] = both.heads[i]
        losses.append(single([depths[i]], edges, logits, labels).item())
    assert losses[0] != losses[1]
    assert both(depths, edges, logits, labels).item() == pytest.approx(sum(losses) / 2)


def test_patches_of_the_same_picture_are_no_positives():
    depths, edges, logits, labels = batch(labels=(1,))
    assert make(queue=0)(depths, edges, logits, labels).item() == 0


def test_a_batch_of_one_class_survives_and_uses_the_queue():
    model = make()
    genuine = batch(labels=(0, 0, 0, 0))
    first = model(*genuine)
    first.backward()
    assert first.isfinite()                                    # no negatives
    assert len(model.queues[0].keys()[0]) == 0

    model(*batch())
    filled = len(model.queues[0].keys()[0])
    assert filled > 0
    assert model(*genuine) > first + 0.1                       # now there are some
    assert len(model.queues[0].keys()[0]) == filled


@pytest.mark.parametrize("N", [1, 16])
def test_constant_pictures_give_a_number(N):
    z = torch.zeros(2, N, 16, requires_grad=True)
    flat = torch.zeros(2, N)
    loss = make()([z, z], flat, flat, torch.tensor([0, 1]))
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all()
