"""HECL: selection, dual queue, contrastive loss: references and properties."""
import math

import torch
import torch.nn.functional as F

import hecl


def batch(labels=(0, 1, 0, 1), N=20, Dv=16, seed=0):
    torch.manual_seed(seed)
    B = len(labels)
    return ([torch.randn(B, N, Dv, requires_grad=True) for _ in range(2)], torch.rand(B, N),
            torch.rand(B, N), torch.tensor(labels))


def make(queue=8, **changes):
    torch.manual_seed(5)
    settings = dict(dim=6, queue=queue, tau=0.1, share=0.4, top=3, clean=0.5)
    return hecl.HECL([16, 16], **settings | changes)


def test_only_edge_patches_are_selected_highest_first():
    _, edges, probability, labels = batch()
    own, clean = hecl.select(edges, probability, share=0.4, top=3)
    for b in range(4):
        strong = edges[b].topk(8).indices.tolist()
        ranked = sorted(strong, key=lambda n: -probability[b, n].item())
        assert own[b].tolist() == ranked[:3] and clean[b].tolist() == ranked[::-1][:3]


def test_loss_equals_the_formula_term_by_term():
    anchors = F.normalize(torch.randn(3, 4), dim=-1)
    keys = F.normalize(torch.randn(5, 4), dim=-1)
    classes, key_classes = torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0, 1, 1])
    weights, ignore = torch.tensor([1.0, 0.5, 1.0]), torch.zeros(3, 5, dtype=torch.bool)
    ignore[1, 3] = True
    total = 0
    for i in range(3):
        e = [math.exp(float(anchors[i] @ keys[j]) / 0.1) * (not ignore[i, j]) for j in range(5)]
        same = sum(x for j, x in enumerate(e) if key_classes[j] == classes[i])
        total -= weights[i].item() * math.log(same / sum(e))
    loss = hecl.contrast(anchors, classes, weights, keys, key_classes, ignore, 0.1)
    assert math.isclose(loss.item(), total / 2.5, rel_tol=1e-5)


def test_pulling_same_class_edge_patches_together_lowers_it():
    levels, edges, probability, labels = batch()
    model = make()
    before = model(levels, edges, probability, labels).item()
    own, clean = hecl.select(edges, probability, share=0.4, top=3)
    moved = []
    for x in levels:
        x = x.detach().clone()
        for b in range(4):
            x[b, clean[b]] = 0.5 * x[b, clean[b]] - 2
            x[b, own[b]] = 0.5 * x[b, own[b]] + (2.0 if labels[b] else -2.0)
        moved.append(x)
    assert make()(moved, edges, probability, labels).item() < before


def test_gradients_reach_heads_and_only_edge_patches():
    levels, edges, probability, labels = batch()
    model = make()
    model(levels, edges, probability, labels).backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())
    own, clean = hecl.select(edges, probability, share=0.4, top=3)
    for x in levels:
        touched = x.grad.abs().sum(dim=-1) > 0
        allowed = torch.zeros_like(touched).scatter(1, torch.cat([own, clean], dim=1), True)
        assert (touched & ~allowed).sum() == 0 and touched.any()


def test_queue_is_first_in_first_out_and_wraps():
    queue = hecl.DualQueue(5, 1)
    assert len(queue.keys()[0]) == 0
    everything = [[], []]
    for start in range(0, 14, 2):
        values = torch.arange(start, start + 2.0)[:, None]
        queue.push(values, 100 + values)
        for c in (0, 1):
            everything[c] = (everything[c] + (100 * c + values[:, 0]).tolist())[-5:]
        features, classes = queue.keys()
        for c in (0, 1):
            assert sorted(features[classes == c, 0].tolist()) == everything[c]
    queue.push(torch.arange(9.0)[:, None], torch.arange(9.0)[:, None])        # more than it holds
    assert sorted(queue.keys()[0][:5, 0].tolist()) == [4, 5, 6, 7, 8]


def test_queues_start_empty_fill_equally_and_are_saved():
    levels, edges, probability, labels = batch(labels=(0, 1, 1, 1))
    model = make(queue=50)
    model(levels, edges, probability, labels)
    assert int(model.queues[0].filled) == 3                       # one picture of each class
    other = make(queue=50)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.queues[1].features, model.queues[1].features)
    losses = [x(levels, edges, probability, labels).item() for x in (other, model)]
    assert losses[0] == losses[1]


def test_a_batch_of_one_class_survives_and_uses_the_queue():
    model = make()
    genuine = batch(labels=(0, 0, 0, 0))
    first = model(*genuine)
    first.backward()
    assert torch.isfinite(first) and int(model.queues[0].filled) == 0
    model(*batch())
    filled = int(model.queues[0].filled)
    assert filled > 0
    later = model(*genuine)
    assert torch.isfinite(later) and later > first.item()         # now there are negatives
    assert int(model.queues[0].filled) == filled


def test_batch_alone_and_evaluation_leave_no_trace():
    model = make(queue=0)
    assert model.queues is None and torch.isfinite(model(*batch()))
    model = make().eval()
    model(*batch())
    assert int(model.queues[0].filled) == 0


def test_patches_of_the_same_picture_are_no_positives():
    levels, edges, probability, labels = batch(labels=(0, 1))
    loss = make(queue=0, clean=0.0)(levels, edges, probability, labels)
    assert loss.item() == 0       # one picture a class: without its own patches none is left


def test_constant_picture_and_single_patch():
    x = [torch.zeros(2, 1, 16, requires_grad=True)] * 2
    assert torch.isfinite(make()(x, torch.zeros(2, 1), torch.zeros(2, 1), torch.tensor([0, 1])))
