"""HECL, hierarchical edge contrastive learning: genuine against manipulated edge patches.

After SAPL (arXiv 2601.06222), see ecpl.py for the words in brackets: genuine and manipulated edge
patches are extracted and contrasted [abstract], with a dual queue [digest]. Which patches, loss and
features: ours. "Hierarchical" here: every depth of the image tower has its own features, head and
queues. Used in training only. What it brought so far (tests/README.md): nothing measurable.

Reading order: which patches -> queues -> loss -> HECL. `python hecl.py` shows what it does.

Shapes: B images, N patches, D joint width, d contrast width, K patches of a kind taken of an image,
A = B * 2K anchors, Q keys; class 0 genuine, 1 manipulated.
"""
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.nn.functional import all_gather


def select(edges, logits, *, share, top):
    """Which patches are contrasted: edges, logits (B, N) -> indices (most, least), (B, K) each.

    Edge patches are the `share` of each picture with the strongest soft edges. Of these the K that
    look most manipulated (a picture's manipulated edge patches, or the hardest genuine ones) and
    the K that look least so (genuine ones of the very same scene). K: `top`, or half of them all.
    """
    count = max(1, round(share * edges.shape[1]))
    K = max(1, min(top, count // 2))
    kept = edges.topk(count, dim=1).indices                                    # (B, count)
    order = logits.gather(1, kept).argsort(dim=1, descending=True)             # (B, count)
    ranked = kept.gather(1, order)                                             # (B, count)
    most = ranked[:, :K]                                                       # (B, K)
    least = ranked[:, -K:]                                                     # (B, K)
    return most, least


def of_all_processes(x):
    """The batches of all W training processes (B, ..) -> (W * B, ..), with gradients."""
    if not dist.is_initialized():
        return x
    return torch.cat(all_gather(x.contiguous()))                               # (W * B, ..)


class DualQueue(nn.Module):
    """Two first-in-first-out buffers of unit features, one a class [digest], because contrast
    needs more pictures than a batch holds; the form is ours, after MoCo (He et al. 2020)."""

    def __init__(self, length, dim):
        super().__init__()
        self.register_buffer("features", torch.zeros(2, length, dim))          # oldest first

    def push(self, genuine, manipulated):
        """Append features (n, d) of each class, equally many of both; the oldest make room."""
        n = min(len(genuine), len(manipulated))
        newest = torch.stack([genuine[:n], manipulated[:n]])                   # (2, n, d)
        longer = torch.cat([self.features, newest], dim=1)                     # (2, length + n, d)
        self.features.copy_(longer[:, n:])                                     # (2, length, d)

    def keys(self):
        """Features (2 * filled, d) and their classes (2 * filled,)."""
        filled = self.features[0].any(dim=1)             # (length,), zeros are empty places
        features = self.features[:, filled]                                    # (2, filled, d)
        classes = torch.arange(2, device=features.device)                      # (2,)
        classes = classes.repeat_interleave(features.shape[1])                 # (2 * filled,)
        return features.flatten(0, 1), classes                   # (2 * filled, d), (2 * filled,)


def contrast(anchors, classes, keys, key_classes, ignore, tau):
    """Supervised contrast (Khosla et al. 2020, their L_out; used here: ours) -> scalar >= 0.

        loss of an anchor = mean over keys p of its class of -log( exp(a.p / tau) / sum over all
                            keys k of exp(a.k / tau) )

    The mean is outside the logarithm: inside, one near key of the class would be enough.
    anchors (A, d), keys (Q, d) of unit length; classes (A,), key_classes (Q,); ignore (A, Q): pairs
    that do not count. Anchors without a key of their class are left out; if all are: 0.
    """
    same = (classes[:, None] == key_classes) & ~ignore                         # (A, Q)
    usable = same.any(dim=1)                                                   # (A,)
    if not usable.any():
        return anchors.sum() * 0         # (), a zero from which `backward` can start

    logits = anchors @ keys.T / tau                                            # (A, Q)
    count = same.sum(dim=1).clamp(min=1)                                       # (A,)
    own_class = (logits * same).sum(dim=1) / count                             # (A,)
    all_keys = logits.masked_fill(ignore, -torch.inf).logsumexp(dim=1)         # (A,)
    loss = all_keys - own_class                                                # (A,)
    return loss[usable].mean()                                                 # ()


class HECL(nn.Module):
    """The contrast at every depth, each with a head and queues of its own.

    levels: how many depths. width: D. dim: d. queue: features kept a class and depth, 0 = the batch
    alone. tau: temperature. share, top: see `select`.
    """

    def __init__(self, *, levels, width, dim, queue, tau, share, top):
        super().__init__()
        self.tau = tau
        self.share = share
        self.top = top
        self.heads = nn.ModuleList([nn.Linear(width, dim) for _ in range(levels)])
        self.queues = nn.ModuleList([DualQueue(queue, dim) for _ in range(levels)])

    def forward(self, depths, edges, logits, labels):
        """depths [(B, N, D)], edges, logits (B, N), labels (B,) in {0, 1} -> scalar >= 0."""
        edges = of_all_processes(edges)                                        # (B, N)
        logits = of_all_processes(logits.detach())                             # (B, N)
        labels = of_all_processes(labels)                                      # (B,)
        most, least = select(edges, logits, share=self.share, top=self.top)
        B, K = most.shape
        index = torch.cat([most, least], dim=1)                                # (B, 2K)

        # The patches that look most manipulated have the class of their picture.
        classes = torch.zeros_like(index)                                      # (B, 2K)
        classes[:, :K] = labels[:, None]                                       # (B, K)
        classes = classes.flatten()                                            # (A,)
        # Patches of one picture share its content: as positives they would teach scenes, not seams.
        picture = torch.arange(B, device=index.device)                         # (B,)
        picture = picture.repeat_interleave(2 * K)                             # (A,)
        same_picture = picture[:, None] == picture                             # (A, A)
        same_class = classes[:, None] == classes                               # (A, A)
        ignore = same_picture & same_class                                     # (A, A)

        is_manipulated = labels == 1                                           # (B,)
        losses = []
        for z, head, queue in zip(depths, self.heads, self.queues):
            z = of_all_processes(z)                                            # (B, N, D)
            patches = z.take_along_dim(index[..., None], dim=1)                # (B, 2K, D)
            anchors = F.normalize(head(patches).float(), dim=-1)               # (B, 2K, d)
            all_anchors = anchors.flatten(0, 1)                                # (A, d)
            losses.append(self.compare(all_anchors, classes, ignore, queue))
            if self.training:
                newest = anchors[:, :K].detach()                               # (B, K, d)
                genuine = newest[~is_manipulated].flatten(0, 1)                # (n, d)
                manipulated = newest[is_manipulated].flatten(0, 1)             # (m, d)
                queue.push(genuine, manipulated)
        return torch.stack(losses).mean()

    def compare(self, anchors, classes, ignore, queue):
        """anchors (A, d) against themselves and a queue -> scalar."""
        queued, queued_classes = queue.keys()                            # (Q - A, d), (Q - A,)
        keys = torch.cat([anchors, queued])                                    # (Q, d)
        key_classes = torch.cat([classes, queued_classes])                     # (Q,)
        ignore = F.pad(ignore, (0, len(queued)))                               # (A, Q)
        return contrast(anchors, classes, keys, key_classes, ignore, self.tau)


def demo():
    """Eight pictures of 16 patches: what is selected, and what the loss does to their features."""
    torch.manual_seed(0)
    labels = torch.arange(8) % 2
    edges = torch.rand(8, 16)
    logits = torch.randn(8, 16)
    most, least = select(edges, logits, share=0.5, top=2)
    print("8 pictures of 16 patches. Of each, the 8 with the strongest edges are edge patches; of\n"
          "these the 2 that look most manipulated and the 2 that look least so are contrasted:")
    for label, top, bottom in zip(labels[:4], most.tolist(), least.tolist()):
        print(f"    label {label}   most {top}   least {bottom}")

    hecl = HECL(levels=1, width=8, dim=4, queue=6, tau=0.1, share=0.5, top=2)
    z = torch.randn(8, 16, 8, requires_grad=True)                              # (B, N, D)
    optimizer = torch.optim.Adam([z], lr=0.05)
    classes = labels.repeat_interleave(2)                                      # (B * K,)
    different = classes[:, None] != classes                                    # (B * K, B * K)
    pairs = ~torch.eye(len(classes), dtype=torch.bool)                         # none with itself
    print("Mean cosine of those that look most manipulated, behind the head:")

    for step in range(61):
        loss = hecl([z], edges, logits, labels)
        if step % 20 == 0:
            patches = z.take_along_dim(most[..., None], dim=1)                 # (B, K, D)
            anchors = F.normalize(hecl.heads[0](patches), dim=-1)              # (B, K, d)
            anchors = anchors.flatten(0, 1)                                    # (B * K, d)
            cosine = anchors @ anchors.T                                       # (B * K, B * K)
            within = cosine[pairs & ~different].mean()
            between = cosine[different].mean()
            print(f"    step {step:2}   loss {loss:.3f}   within a class {within:+.2f}   "
                  f"between the classes {between:+.2f}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    demo()
