"""HECL: selection, dual queue, contrastive loss: references and properties."""
import re

import pytest
import torch
import torch.nn.functional as F

import hecl
from mini import close


def batch(labels=(0, 1, 0, 1), N=20):
    """What HECL is called with: depths of width 16 that take gradients, edges, logits, labels,
    truth. What is labelled manipulated is unknown, except for the last picture, a splice."""
    torch.manual_seed(0)
    labels = torch.tensor(labels)
    B = len(labels)
    depths = [torch.randn(B, N, 16, requires_grad=True) for _ in range(2)]
    edges = torch.rand(B, N)
    logits = torch.randn(B, N)
    truth = -labels[:, None].repeat(1, N)
    if labels[-1] == 1:
        truth[-1] = 0
        truth[-1, :N // 8] = 1
    return depths, edges, logits, labels, truth


def make(queue=8):
    """The same random HECL of two depths, every time."""
    torch.manual_seed(5)
    return hecl.HECL(levels=2, width=16, dim=6, queue=queue,
                     tau=0.1, share=0.4, top=3)


def chosen_by(inputs):
    """What `make()` selects."""
    _, edges, logits, _, truth = inputs
    return hecl.select(edges, logits, truth, share=0.4, top=3)


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
        ranked = sorted(strong, key=lambda n: -logits[b, n])
        ranked = sorted(ranked, key=lambda n: place[truth[b, n].item()])
        assert chosen[b].tolist() == ranked[:4] + ranked[-4:]
        assert torch.equal(classes[b], truth[b, chosen[b]])


@pytest.mark.parametrize("N, share, expected", [
    (1, 0.4, 1), (20, 0.1, 1), (10, 0.4, 2), (20, 1.0, 3)])
def test_how_many_are_selected(N, share, expected):
    _, edges, logits, _, truth = batch(N=N)
    chosen, classes = hecl.select(edges, logits, truth, share=share, top=3)
    assert chosen.shape == classes.shape == (4, 2 * expected)


def test_a_queue_is_first_in_first_out_equally_many_and_known_ones_first():
    queue = hecl.DualQueue(4, 1)
    held = queue.features[..., 0]
    x = torch.arange(1.0, 7.0).view(2, 3, 1)
    classes = torch.tensor([[0, 1, 1], [1, 0, 0]])
    known = torch.tensor([[True, False, True], [False, True, True]])
    queue.push(x[:1], classes[:1], known[:1])
    assert held.tolist() == [[0, 0, 0, 1], [0, 0, 0, 3]]
    features, filled = queue.keys()
    assert features.tolist() == [[1], [3]]
    assert filled.tolist() == [0, 1]

    queue.push(x, classes, known)
    assert held.tolist() == [[1, 1, 5, 6], [3, 3, 2, 4]]
    for_each = torch.tensor([[0], [0], [1], [1]]).expand(4, 3)
    queue.push(torch.cat([x, x]), for_each, for_each >= 0)     # more than it holds: the last ones
    assert held.tolist() == [[3, 4, 5, 6], [3, 4, 5, 6]]


def test_queues_take_known_patches_before_guesses_and_are_saved():
    inputs = batch(labels=(0, 1, 1))
    depths, _, _, _, truth = inputs
    truth[2] = 1                                               # a splice that fills its picture
    model = make(queue=50)
    model(*inputs)
    chosen, _ = chosen_by(inputs)
    features, classes = model.queues[1].keys()
    for b, label in ((0, 0), (2, 1)):                          # for picture 1 there is no room
        expected = anchors_of(model.heads[1], depths[1][b], chosen[b])
        assert close(features[classes == label], expected[:3])

    other = make(queue=50)
    other.load_state_dict(model.state_dict())
    found = model(*inputs)
    assert torch.equal(other(*inputs), found)
    assert not torch.equal(make(queue=50)(*inputs), found)


def test_evaluation_leaves_no_trace_and_a_queue_is_not_needed():
    model = make().eval()
    loss = model(*batch())
    assert not model.queues[0].features.any()
    none = make(queue=0)
    assert none(*batch()) == none(*batch()) == loss


def brute_force(model, *inputs):
    """The loss, anchor by anchor."""
    depths, _, _, labels, _ = inputs
    chosen, known = chosen_by(inputs)
    levels = []
    for z, head, queue in zip(depths, model.heads, model.queues):
        features, classes = queue.keys()
        keys = [(x, c, None) for x, c in zip(features, classes)]       # they have no picture
        patches = []                                           # (unit feature, class, picture)
        for b, label in enumerate(labels):
            anchors = anchors_of(head, z[b], chosen[b])
            for i, kind in enumerate(known[b]):
                if kind == -1:                                 # a guess: the most suspicious
                    kind = label if i < 3 else 0
                patches.append((anchors[i], kind, b))
        losses = []
        for x, kind, picture in patches:
            pull = []
            total = 0
            for key, key_kind, key_picture in patches + keys:
                if key_kind == kind and key_picture == picture:
                    continue
                value = torch.exp(x @ key / 0.1)
                total += value
                if key_kind == kind:
                    pull.append(value)
            if pull:                                           # else left out
                loss = -torch.log(torch.stack(pull) / total)
                losses.append(loss.mean())
        levels.append(torch.stack(losses).mean())
    return torch.stack(levels).mean()


@pytest.mark.parametrize("queue", [0, 50])
@pytest.mark.parametrize("labels", [(0, 1, 0, 1), (0, 0, 1)])    # 1 alone has no positive
@pytest.mark.parametrize("known", [True, False])
def test_the_loss_equals_brute_force(known, labels, queue):
    *inputs, truth = batch(labels)
    if not known:
        truth.fill_(-1)                                        # then labels decide
    model = make(queue)
    model(*inputs, truth)                                      # fills the queues
    model.eval()
    found = model(*inputs, truth)
    assert close(found, brute_force(model, *inputs, truth))


def test_gradients_reach_heads_and_only_the_selected_patches():
    inputs = batch()
    depths, _, logits, _, _ = inputs
    logits.requires_grad_(True)
    model = make()
    model(*inputs).backward()
    for parameter in model.parameters():
        assert parameter.grad.any()
    assert logits.grad is None                                 # choosing is not learned
    chosen, _ = chosen_by(inputs)
    expected = torch.zeros(4, 20, dtype=torch.bool)
    expected.scatter_(1, chosen, True)
    for z in depths:
        assert torch.equal(z.grad.any(dim=-1), expected)


def test_patches_of_the_same_picture_are_no_positives():
    model = make(queue=0)
    assert model(*batch(labels=(1,))) == 0


def test_a_batch_of_one_class_survives_and_uses_the_queue():
    model = make()
    genuine = batch(labels=(0, 0, 0, 0))
    first = model(*genuine)
    first.backward()                                           # there are no negatives
    assert first.isfinite()
    assert not model.queues[0].features.any()
    model(*batch())
    assert model(*genuine) > first + 0.1                       # now there are some


@pytest.mark.parametrize("N", [1, 16])
def test_constant_pictures_give_a_number(N):
    depths = [torch.zeros(2, N, 16, requires_grad=True)] * 2
    flat = torch.zeros(2, N)
    truth = torch.tensor([[0], [-1]]).expand(2, N)
    loss = make()(depths, flat, flat, torch.tensor([0, 1]), truth)
    loss.backward()
    assert loss.isfinite()
    assert depths[0].grad.isfinite().all()


def test_the_lesson_separates_the_classes(capsys):
    hecl.demo()
    cosines = re.findall(r"classes (\S+)", capsys.readouterr().out)
    assert float(cosines[-1]) < -0.8
