"""HECL, hierarchical edge contrastive learning: genuine against manipulated edge patches.

Genuine and manipulated edge patches are extracted and contrasted [abstract], with a dual queue
[digest]; ecpl.py explains the words in brackets. How patches are chosen, the loss, and a head and
queues for each level of the image tower ("hierarchical") are ours. HECL serves training only.

Why contrast? A classifier may rely on any cue that separates the training pictures. Contrast asks
for more: patches of one class must be alike across pictures and differ from the other class.
A batch holds few pictures, so queues keep patches of earlier ones (MoCo, He et al. 2020). In the
ablation (tests/README.md) HECL adds 0.006 ± 0.005 to F1; with splices, no gain.

Shapes: B images, N patches, D joint width, d contrast width, K patches of a kind per image,
A = B * 2K anchors, Q keys; class 0 genuine, 1 manipulated, -1 unknown.
"""
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.nn.functional import all_gather


def select(edges, logits, truth, *, share, top):
    """Choose patches to contrast: edges, logits, truth (B, N) -> indices, classes (B, 2K).

    Edge patches are the `share` with the strongest edges. Of these, the K most suspicious come
    first, then the K least; a known class outranks any logit. K: `top`, at most half of them.
    """
    count = max(1, round(share * edges.shape[1]))
    K = max(1, min(top, count // 2))
    kept = edges.topk(count, dim=1).indices                                    # (B, count)

    known = torch.where(truth < 0, 0, 2 * truth - 1)     # 1 manipulated, -1 genuine, 0 unknown
    suspicion = F.softsign(logits) + 2 * known           # softsign lies in (-1, 1)
    order = suspicion.gather(1, kept).argsort(dim=1, descending=True)          # (B, count)
    ranked = kept.gather(1, order)                                             # (B, count)
    most = ranked[:, :K]                                                       # (B, K)
    least = ranked[:, -K:]                                                     # (B, K)
    chosen = torch.cat([most, least], dim=1)                                   # (B, 2K)
    return chosen, truth.gather(1, chosen)                                     # (B, 2K) each


def of_all_processes(x):
    """The batches of all W training processes, with gradients: (B, ..) -> (W * B, ..)."""
    if not dist.is_initialized():
        return x
    return torch.cat(all_gather(x.contiguous()))                               # (W * B, ..)


class DualQueue(nn.Module):
    """A queue for each class [digest]: its latest suspicious patches, as unit features [ours]."""

    def __init__(self, length, dim):
        super().__init__()
        self.register_buffer("features", torch.zeros(2, length, dim))          # oldest first

    def push(self, features, classes, known):
        """Append features (B, K, d), equally many of each class; classes and known: (B, K)."""
        genuine = features[classes == 0]                                       # (.., d)
        sure = features[(classes == 1) & known]                                # (.., d)
        guessed = features[(classes == 1) & ~known]                            # (.., d)
        manipulated = torch.cat([sure, guessed])         # (.., d), the known ones take priority
        n = min(len(genuine), len(manipulated))
        newest = torch.stack([genuine[:n], manipulated[:n]])                   # (2, n, d)
        longer = torch.cat([self.features, newest], dim=1)                     # (2, length + n, d)
        self.features.copy_(longer[:, n:])                                     # (2, length, d)

    def keys(self):
        """Features (2 * filled, d) and their classes (2 * filled,)."""
        filled = self.features[0].any(dim=1)             # (length,); empty rows are zeros
        features = self.features[:, filled]                                    # (2, filled, d)
        classes = torch.arange(2, device=features.device)                      # (2,)
        classes = classes.repeat_interleave(features.shape[1])                 # (2 * filled,)
        return features.flatten(0, 1), classes                   # (2 * filled, d), (2 * filled,)


def contrast(anchors, classes, keys, key_classes, ignore, tau):
    """Supervised contrastive loss (Khosla et al. 2020, L_out; its use here is ours) -> scalar >= 0.

        loss of anchor a = mean over p of -log( exp(a.p / tau) / sum over k of exp(a.k / tau) )

    p: keys of its class; k: all keys. The mean stays outside the logarithm: inside, one similar p
    would suffice. anchors (A, d), keys (Q, d): unit length; classes (A,), key_classes (Q,); ignore
    (A, Q): pairs that do not count. Anchors without a p are left out; if all are, the loss is 0.
    """
    same = (classes[:, None] == key_classes) & ~ignore                         # (A, Q)
    usable = same.any(dim=1)                                                   # (A,)
    if not usable.any():
        return anchors.sum() * 0         # (), a zero from which `backward` can start

    logits = anchors @ keys.T / tau                                            # (A, Q)
    count = same.sum(dim=1).clamp(min=1)                                       # (A,)
    own_class = (logits * same).sum(dim=1) / count                             # (A,)
    all_keys = logits.masked_fill(ignore, -torch.inf).logsumexp(dim=1)         # (A,)
    return (all_keys - own_class)[usable].mean()                               # ()


class HECL(nn.Module):
    """Contrast at every level: `levels` heads from `width` (D) to `dim` (d), each with queues of
    `queue` features a class (0: none). tau: temperature; share, top: see `select`."""

    def __init__(self, *, levels, width, dim, queue, tau, share, top):
        super().__init__()
        self.tau = tau
        self.share = share
        self.top = top
        self.heads = nn.ModuleList(nn.Linear(width, dim) for _ in range(levels))
        self.queues = nn.ModuleList(DualQueue(queue, dim) for _ in range(levels))

    def forward(self, depths, edges, logits, labels, truth):
        """depths [(B, N, D)], edges, logits, truth (B, N), labels (B,) -> scalar >= 0."""
        chosen, truth = select(edges, logits, truth, share=self.share, top=self.top)
        K = chosen.shape[1] // 2
        # Unknown: the K most suspicious get the picture's label, the K least count as genuine.
        guess = torch.zeros_like(truth)                                        # (B, 2K)
        guess[:, :K] = labels[:, None]
        classes = torch.where(truth < 0, guess, truth)                         # (B, 2K)
        classes = of_all_processes(classes)              # (B, 2K), now of all processes
        known = of_all_processes(truth) >= 0                                   # (B, 2K)

        losses = []
        for z, head, queue in zip(depths, self.heads, self.queues):
            patches = z.take_along_dim(chosen[..., None], dim=1)               # (B, 2K, D)
            patches = of_all_processes(patches)                                # (B, 2K, D)
            anchors = F.normalize(head(patches).float(), dim=-1)               # (B, 2K, d)
            losses.append(self.compare(anchors, classes, queue))
            if self.training:
                suspicious = anchors[:, :K].detach()     # (B, K, d); if genuine: hard negatives
                queue.push(suspicious, classes[:, :K], known[:, :K])
        return torch.stack(losses).mean()                                      # ()

    def compare(self, anchors, classes, queue):
        """anchors (B, 2K, d), classes (B, 2K) against themselves and a queue -> scalar."""
        # Patches of one picture share its content: as positives they would teach scenes, not seams.
        picture = torch.arange(len(classes), device=classes.device)            # (B,)
        group = (2 * picture[:, None] + classes).flatten()                     # (A,)
        ignore = group[:, None] == group                                       # (A, A)

        queued, queued_classes = queue.keys()                            # (Q - A, d), (Q - A,)
        ignore = F.pad(ignore, (0, len(queued)))                               # (A, Q)
        anchors = anchors.flatten(0, 1)                                        # (A, d)
        classes = classes.flatten()                                            # (A,)
        keys = torch.cat([anchors, queued])                                    # (Q, d)
        key_classes = torch.cat([classes, queued_classes])                     # (Q,)
        return contrast(anchors, classes, keys, key_classes, ignore, self.tau)


def demo():
    """Eight pictures of 16 patches: which are chosen, and how the loss separates the classes."""
    torch.manual_seed(0)
    labels = torch.arange(8) % 2
    edges, logits = torch.rand(2, 8, 16)                                       # (8, 16) each
    truth = -labels[:, None].repeat(1, 16)               # (8, 16), unknown where the label is 1
    truth[3] = (torch.arange(16) < 6).long()             # a splice, in which all is known
    chosen, known = select(edges, logits, truth, share=0.5, top=2)             # (8, 4) each
    print("chosen edge patches, the 2 most suspicious first, and their classes (-1: unknown)")
    for b, name in enumerate(("genuine", "manipulated", "genuine", "splice")):
        print(f"    {name:12} {chosen[b].tolist()} {known[b].tolist()}")

    hecl = HECL(levels=1, width=8, dim=4, queue=6, tau=0.3, share=0.5, top=2)
    z = torch.randn(8, 16, 8, requires_grad=True)                              # (B, N, D)
    optimizer = torch.optim.Adam([z, *hecl.parameters()], lr=0.05)
    for step in range(61):
        loss = hecl([z], edges, logits, labels, truth)
        if step % 20 == 0:
            genuine, manipulated = hecl.queues[0].features.mean(dim=1)         # (d,) each
            cosine = F.cosine_similarity(genuine, manipulated, dim=0)          # ()
            print(f"step {step:2}  loss {loss:.2f}  cosine of the classes {cosine:+.2f}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    demo()
