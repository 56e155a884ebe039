"""HECL, hierarchical edge contrastive learning: genuine against manipulated edge patches.

After SAPL (arXiv 2601.06222); ecpl.py explains the words in brackets. Genuine and manipulated edge
patches are extracted and contrasted [abstract], with a dual queue [digest]. How patches are chosen,
the loss, the features and the meaning of "hierarchical" are ours: every level of the image tower
has its own head and queues. HECL is used in training only.

Why contrast? A classifier may separate the classes by any cue that works on the training pictures.
Contrast asks for more: patches of one class, taken from many pictures, should resemble each other
and differ from those of the other class. A batch holds too few pictures for that, so queues keep
patches of earlier batches (MoCo, He et al. 2020). tests/README.md says what it brings.

Reading order: which patches -> queues -> loss -> HECL -> a lesson (`python hecl.py`).

Shapes: B images, N patches, D joint width, d contrast width, K patches of a kind per image,
A = B * 2K anchors, Q keys; class 0 genuine, 1 manipulated, -1 unknown.
"""
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.nn.functional import all_gather


def select(edges, logits, truth, *, share, top):
    """Choose the patches to contrast: edges, logits, truth (B, N) -> indices (B, 2K), classes
    (B, 2K) in {0, 1, -1}.

    Edge patches are the `share` of each picture with the strongest soft edges. Of these, the K that
    look most manipulated come first, then the K that look least so. Where the truth is known, it
    ranks them before the map does; a class of -1 stays unknown. K: `top`, or half of them all.
    """
    count = max(1, round(share * edges.shape[1]))
    K = max(1, min(top, count // 2))
    kept = edges.topk(count, dim=1).indices                                    # (B, count)

    # The map orders patches within [-1, 1]; knowledge moves them out of that range.
    suspicion = F.softsign(logits)                                             # (B, N)
    suspicion = suspicion + 2 * ((truth == 1).float() - (truth == 0).float())  # (B, N)
    order = suspicion.gather(1, kept).argsort(dim=1, descending=True)          # (B, count)
    ranked = kept.gather(1, order)                                             # (B, count)
    chosen = torch.cat([ranked[:, :K], ranked[:, -K:]], dim=1)                 # (B, 2K)
    return chosen, truth.gather(1, chosen)                                     # (B, 2K) each


def of_all_processes(x):
    """The batches of all W training processes (B, ..) -> (W * B, ..), with gradients."""
    if not dist.is_initialized():
        return x
    return torch.cat(all_gather(x.contiguous()))                               # (W * B, ..)


class DualQueue(nn.Module):
    """Two first-in-first-out buffers of unit features, one per class [digest]; their form is ours,
    after MoCo."""

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
        filled = self.features[0].any(dim=1)             # (length,), rows of zeros are empty
        features = self.features[:, filled]                                    # (2, filled, d)
        classes = torch.arange(2, device=features.device)                      # (2,)
        classes = classes.repeat_interleave(features.shape[1])                 # (2 * filled,)
        return features.flatten(0, 1), classes                   # (2 * filled, d), (2 * filled,)


def contrast(anchors, classes, keys, key_classes, ignore, tau):
    """Supervised contrastive loss (Khosla et al. 2020, their L_out; its use here is ours) ->
    scalar >= 0.

        loss of an anchor = mean over keys p of its class of -log( exp(a.p / tau) / sum over all
                            keys k of exp(a.k / tau) )

    The mean stays outside the logarithm: inside, one similar key of the class would suffice.
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
    """The contrast at every level, each with its own head and queues.

    levels: how many. width: D. dim: d. queue: features kept per class and level, 0 = the batch
    alone. tau: temperature. share, top: see `select`.
    """

    def __init__(self, *, levels, width, dim, queue, tau, share, top):
        super().__init__()
        self.tau = tau
        self.share = share
        self.top = top
        self.heads = nn.ModuleList([nn.Linear(width, dim) for _ in range(levels)])
        self.queues = nn.ModuleList([DualQueue(queue, dim) for _ in range(levels)])

    def forward(self, depths, edges, logits, labels, truth):
        """depths [(B, N, D)], edges, logits (B, N), labels (B,) in {0, 1}, truth (B, N) in
        {0, 1, -1} -> scalar >= 0."""
        chosen, known = select(edges, logits.detach(), truth, share=self.share, top=self.top)
        K = chosen.shape[1] // 2
        # Where nothing is known, the most suspicious patches get the class of their picture.
        guess = torch.zeros_like(known)                                        # (B, 2K)
        guess[:, :K] = labels[:, None]                                         # (B, K)
        classes = torch.where(known < 0, guess, known)                         # (B, 2K)
        classes = of_all_processes(classes)                                    # (B, 2K)
        known = of_all_processes(known)                                        # (B, 2K)

        # Patches of one picture share its content: as positives they would teach scenes, not seams.
        picture = torch.arange(len(classes), device=classes.device)            # (B,)
        picture = picture.repeat_interleave(2 * K)                             # (A,)
        same_picture = picture[:, None] == picture                             # (A, A)
        flat = classes.flatten()                                               # (A,)
        ignore = same_picture & (flat[:, None] == flat)                        # (A, A)

        losses = []
        for z, head, queue in zip(depths, self.heads, self.queues):
            patches = z.take_along_dim(chosen[..., None], dim=1)               # (B, 2K, D)
            patches = of_all_processes(patches)                                # (B, 2K, D)
            anchors = F.normalize(head(patches).float(), dim=-1)               # (B, 2K, d)
            all_anchors = anchors.flatten(0, 1)                                # (A, d)
            losses.append(self.compare(all_anchors, flat, ignore, queue))

            if self.training:
                hardest = anchors[:, :K].detach()                              # (B, K, d)
                is_guess = known[:, :K] < 0                                    # (B, K)
                genuine = hardest[classes[:, :K] == 0]                         # (n, d)
                manipulated = classes[:, :K] == 1                              # (B, K)
                # what is known comes first: the queue may not have room for guesses
                known_ones = hardest[manipulated & ~is_guess]                  # (.., d)
                guesses = hardest[manipulated & is_guess]                      # (.., d)
                manipulated = torch.cat([known_ones, guesses])                 # (m, d)
                queue.push(genuine, manipulated)
        return torch.stack(losses).mean()                                      # ()

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
    truth = torch.zeros(8, 16, dtype=torch.long)         # a genuine label is known of every patch
    truth[[1, 5]] = -1                                   # labelled manipulated: nobody knows where
    truth[3, :6] = 1                                     # splices: known by construction
    truth[7, :6] = 1
    chosen, known = select(edges, logits, truth, share=0.5, top=2)
    print("8 pictures of 16 patches; the 8 with the strongest edges are edge patches. Chosen: the\n"
          "2 that are or look most manipulated, then the 2 that look least so (class 1, 0, or ?):")
    kinds = ("genuine", "labelled", "genuine", "splice")
    for kind, patches, classes in zip(kinds, chosen.tolist(), known.tolist()):
        shown = [f"{patch:2} ({'01?'[c]})" for patch, c in zip(patches, classes)]
        print(f"    {kind:9}", "  ".join(shown))

    hecl = HECL(levels=1, width=8, dim=4, queue=6, tau=0.1, share=0.5, top=2)
    z = torch.randn(8, 16, 8, requires_grad=True)                              # (B, N, D)
    optimizer = torch.optim.Adam([z], lr=0.05)
    most = chosen[:, :2]                                                       # (B, K)
    classes = labels.repeat_interleave(2)                                      # (B * K,)
    different = classes[:, None] != classes                                    # (B * K, B * K)
    pairs = ~torch.eye(len(classes), dtype=torch.bool)         # no patch with itself
    print("Mean cosine of the first two of each picture, behind the head:")

    for step in range(61):
        loss = hecl([z], edges, logits, labels, truth)
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
