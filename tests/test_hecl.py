"""HECL: selection, dual queue, contrastive loss: references and properties."""
import math
import re

import pytest
import torch
import torch.nn.functional as F

import hecl


def batch(labels=(0, 1, 0, 1), N=20):
    """What HECL is called with: depths of width 16 that take gradients, edges, logits, labels,
    truth. What is labelled manipulated is unknown, except for the last picture, a splice."""
    torch.manual_seed(0)
    labels = torch.tensor(labels)
    B = len(labels)
    depths = [torch.randn(B, N, 16, requires_grad=True) for _ in range(2)]
    truth = -labels[:, None].repeat(1, N)
    if labels[-1] == 1:
        truth[-1] = (torch.arange(N) < N // 8).long()
    return depths, torch.rand(B, N), torch.randn(B, N), labels, truth


def make(**changes):
    """The same random HECL of two depths, every time."""
    torch.manual_seed(5)
    usual = {"levels": 2, "width": 16, "dim": 6, "queue": 8, "tau": 0.1, "share": 0.4, "top": 3}
    return hecl.HECL(**usual | changes)


def anchors_of(head, z, chosen):
    """Unit features (2K, d) of the chosen patches of one picture, z (N, D)."""
    return F.normalize(head(z[chosen]), dim=-1)


@pytest.mark.parametrize("share", [0.6, 1.0])
def test_which_edge_patches_are_selected(share):
    """Known as manipulated, then unknown, then known as genuine; each in the order of the map."""
    torch.manual_seed(0)
    edges = torch.rand(5, 20)
    logits = 50 * torch.randn(5, 20)
    truth = torch.randint(-1, 2, (5, 20))
    truth[0] = -1                                              # nothing is known
    chosen, classes = hecl.select(edges, logits, truth, share=share, top=4)
    place = {1: 0, -1: 1, 0: 2}
    for b in range(5):
        strong = edges[b].topk(round(20 * share)).indices.tolist()
        ranked = sorted(strong, key=lambda n: (place[truth[b, n].item()], -logits[b, n].item()))
        assert chosen[b].tolist() == ranked[:4] + ranked[-4:]
        assert torch.equal(classes[b], truth[b, chosen[b]])


@pytest.mark.parametrize("N, share, expected", [(1, 0.4, 1), (4, 0.5, 1), (20, 0.1, 1),
                                                (20, 0.4, 3), (10, 0.4, 2), (20, 1.0, 3)])
def test_how_many_are_selected(N, share, expected):
    _, edges, logits, _, truth = batch(N=N)
    chosen, classes = hecl.select(edges, logits, truth, share=share, top=3)
    assert chosen.shape == classes.shape == (4, 2 * expected)


def test_a_queue_is_first_in_first_out_and_wraps():
    queue = hecl.DualQueue(5, 1)
    assert len(queue.keys()[0]) == 0
    pushed = []
    for start in range(1, 15, 2):
        values = torch.tensor([[start], [start + 1.0]])
        queue.push(values, 100 + values)
        pushed = (pushed + [start, start + 1])[-5:]
        features, classes = queue.keys()
        assert features[classes == 0, 0].tolist() == pushed
        assert features[classes == 1, 0].tolist() == [100 + x for x in pushed]

    many = torch.arange(9.0)[:, None]                          # more than it holds: the last ones
    queue.push(many, many)
    assert queue.keys()[0][:5, 0].tolist() == [4, 5, 6, 7, 8]


def test_queues_start_empty_fill_equally_and_are_saved():
    inputs = batch(labels=(0, 1, 1, 1, 0))
    model = make(queue=50)
    model(*inputs)
    for queue in model.queues:                                 # 3 patches of each genuine picture
        features, classes = queue.keys()
        assert classes.tolist() == [0] * 6 + [1] * 6
        assert torch.allclose(features.norm(dim=-1), torch.ones(12))

    other = make(queue=50)
    other.load_state_dict(model.state_dict())
    assert other(*inputs).item() == model(*inputs).item()
    assert make(queue=50)(*inputs).item() != model(*inputs).item()


@pytest.mark.parametrize("splice", [False, True])
def test_known_patches_are_queued_before_guesses_from_the_most_suspicious_on(splice):
    depths, edges, logits, labels, truth = batch(labels=(0, 1, int(splice)))
    truth[2] = labels[2]                                       # a splice fills the picture
    model = make(queue=50)
    model(depths, edges, logits, labels, truth)
    chosen, _ = hecl.select(edges, logits, truth, share=0.4, top=3)
    features, classes = model.queues[1].keys()
    for b, label in ((0, 0), (2 if splice else 1, 1)):         # of the other there is no room
        expected = anchors_of(model.heads[1], depths[1][b], chosen[b])[:3]
        assert torch.allclose(features[classes == label], expected, atol=1e-6)


def test_evaluation_leaves_no_trace_and_a_queue_is_not_needed():
    model = make().eval()
    model(*batch())
    assert len(model.queues[0].keys()[0]) == 0
    none = make(queue=0)
    assert none(*batch()) == none(*batch()) == model(*batch())


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


def brute_force(model, depths, edges, logits, labels, truth):
    """The loss, anchor by anchor."""
    chosen, known = hecl.select(edges, logits, truth, share=0.4, top=3)
    levels = []
    for z, head, queue in zip(depths, model.heads, model.queues):
        keys = list(zip(*queue.keys(), [None] * 99))           # they have no picture
        patches = []                                           # (unit feature, class, picture)
        for b, label in enumerate(labels.tolist()):
            for i, feature in enumerate(anchors_of(head, z[b], chosen[b])):
                kind = known[b, i].item()
                if kind == -1:                                 # a guess: the most suspicious
                    kind = label if i < 3 else 0
                patches.append((feature, kind, b))
        terms = []
        for feature, kind, picture in patches:
            pull = []
            total = 0
            for other, other_kind, other_picture in patches + keys:
                if other_kind == kind and other_picture == picture:
                    continue
                value = torch.exp(feature @ other / 0.1)
                total += value
                if other_kind == kind:
                    pull.append(value)
            terms.append(-torch.log(torch.stack(pull) / total).mean())
        levels.append(torch.stack(terms).mean())
    return torch.stack(levels).mean()


@pytest.mark.parametrize("queue", [0, 50])
@pytest.mark.parametrize("known", [True, False])
def test_the_loss_equals_brute_force(known, queue):
    *inputs, truth = batch()
    truth = truth if known else torch.full_like(truth, -1)     # then labels decide
    model = make(queue=queue)
    model(*inputs, truth)                                      # fills the queues
    model.eval()
    found = model(*inputs, truth).item()
    assert found == pytest.approx(brute_force(model, *inputs, truth).item(), 1e-5)


def test_gradients_reach_heads_and_only_the_selected_patches():
    depths, edges, logits, labels, truth = batch()
    logits.requires_grad_(True)
    model = make()
    model(depths, edges, logits, labels, truth).backward()
    for parameter in model.parameters():
        assert parameter.grad.abs().sum() > 0
    assert logits.grad is None                                 # choosing is not learned
    chosen, _ = hecl.select(edges, logits, truth, share=0.4, top=3)
    expected = torch.zeros(4, 20, dtype=torch.bool).scatter(1, chosen, True)
    for z in depths:
        assert torch.equal(z.grad.abs().sum(dim=-1) > 0, expected)


def test_patches_of_the_same_picture_are_no_positives():
    assert make(queue=0)(*batch(labels=(1,))).item() == 0


def test_a_batch_of_one_class_survives_and_uses_the_queue():
    model = make()
    genuine = batch(labels=(0, 0, 0, 0))
    first = model(*genuine)
    first.backward()                                           # there are no negatives
    assert first.isfinite() and len(model.queues[0].keys()[0]) == 0
    model(*batch())
    filled = len(model.queues[0].keys()[0])
    assert model(*genuine) > first + 0.1                       # now there are some
    assert len(model.queues[0].keys()[0]) == filled


@pytest.mark.parametrize("N", [1, 16])
def test_constant_pictures_give_a_number(N):
    z = torch.zeros(2, N, 16, requires_grad=True)
    flat = torch.zeros(2, N)
    labels = torch.tensor([0, 1])
    loss = make()([z, z], flat, flat, labels, -labels[:, None].repeat(1, N))
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all()


def test_the_lesson_runs(capsys):
    hecl.demo()
    losses = re.findall(r"loss (\S+)", capsys.readouterr().out)
    assert float(losses[-1]) < float(losses[0])
