"""HECL, hierarchical edge contrastive learning: genuine against manipulated edge patches.

After SAPL (arXiv 2601.06222), see ecpl.py for what the words in brackets mean: genuine and
manipulated edge patches are extracted and contrasted [abstract], with a dual queue [digest]. Which
patches, which loss, which features: ours. "Hierarchical" here: every depth of the image tower has
its own features, its own head and its own queues. Used in training only.

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

    Only edge patches: the `share` of each picture with the strongest soft edges. Of these the K
    that look most manipulated (in a manipulated picture they stand for its manipulated edge
    patches, in a genuine one for its hardest genuine ones) and the K that look least so (genuine
    edge patches of the very same scene). K is `top`, or half of the edge patches if that is fewer.
    """
    B, N = edges.shape
    count = max(1, round(share * N))
    K = max(1, min(top, count // 2))
    kept = edges.topk(count, dim=1).indices                                    # (B, count)
    order = logits.gather(1, kept).argsort(dim=1, descending=True)             # (B, count)
    ranked = kept.gather(1, order)                                             # (B, count)
    return ranked[:, :K], ranked[:, -K:]


def of_all_processes(x):
    """The batches of all W training processes: (B, ..) -> (W * B, ..), with gradients.

    Each process computes the same loss of it. One process: x itself.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return x
    return torch.cat(all_gather(x.contiguous()))                               # (W * B, ..)


class DualQueue(nn.Module):
    """Two first-in-first-out buffers of unit features, one a class [digest]; saved with a run.

    Ours, after MoCo (He et al. 2020): contrast needs more pictures than a batch holds.
    """

    def __init__(self, length, dim):
        super().__init__()
        self.length = length
        self.register_buffer("features", torch.zeros(2, length, dim))          # (2, length, d)
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))      # of each queue
        self.register_buffer("head", torch.zeros((), dtype=torch.long))        # the next place

    def push(self, genuine, manipulated):
        """Append n features a class, (n, d) each; the oldest make room. Equal numbers, so that the
        classes stay balanced whatever the batch was."""
        n = min(len(genuine), len(manipulated), self.length)
        if n == 0:
            return
        places = (self.head + torch.arange(n, device=self.head.device)) % self.length  # (n,)
        self.features[0, places] = genuine[-n:].to(self.features.dtype)
        self.features[1, places] = manipulated[-n:].to(self.features.dtype)
        self.head.copy_((self.head + n) % self.length)
        self.filled.copy_((self.filled + n).clamp(max=self.length))

    def keys(self):
        """Features (2 * filled, d) and their classes (2 * filled,)."""
        n = int(self.filled)
        classes = torch.arange(2, device=self.head.device).repeat_interleave(n)  # (2 * filled,)
        return self.features[:, :n].flatten(0, 1), classes                     # (2 * filled, d)


def contrast(anchors, classes, keys, key_classes, ignore, tau):
    """Supervised InfoNCE with many positives [ours, after Khosla et al. 2020] -> scalar >= 0.

        loss of an anchor = -log( sum over keys of its class exp(a.k / tau) / sum over all keys )

    anchors (A, d), keys (Q, d) of unit length; classes (A,), key_classes (Q,); ignore (A, Q): pairs
    left out of both sums. Anchors without a positive are left out; if all are: 0.
    """
    logits = (anchors @ keys.T / tau).masked_fill(ignore, -torch.inf)          # (A, Q)
    same = classes[:, None] == key_classes                                     # (A, Q)
    usable = (same & ~ignore).any(dim=1)                                       # (A,)
    if not usable.any():
        return anchors.sum() * 0                                               # ()
    positive = logits.masked_fill(~same, -torch.inf).logsumexp(dim=1)          # (A,)
    loss = logits.logsumexp(dim=1) - positive                                  # (A,)
    return loss[usable].mean()                                                 # ()


class HECL(nn.Module):
    """The contrast at every depth, each with a head and queues of its own.

    levels: how many depths. width: D. dim: d. queue: features kept a class and depth, 0 = the batch
    alone. tau: temperature. share, top: see `select`.
    """

    def __init__(self, *, levels, width, dim, queue, tau, share, top):
        super().__init__()
        self.tau, self.share, self.top = tau, share, top
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

        genuine = torch.zeros_like(least)                                      # (B, K)
        own_class = labels[:, None].long().expand(B, K)                        # (B, K)
        classes = torch.cat([own_class, genuine], dim=1).flatten()             # (A,)
        picture = torch.arange(B, device=edges.device).repeat_interleave(2 * K)  # (A,)

        # Patches of one picture share its content: as positives they would teach scenes, not seams.
        ignore = picture[:, None] == picture                                   # (A, A)
        ignore = ignore & (classes[:, None] == classes)                        # (A, A)

        total = 0
        for z, head, queue in zip(depths, self.heads, self.queues):
            z = of_all_processes(z)                                            # (B, N, D)
            patches = z.gather(1, index[..., None].expand(-1, -1, z.shape[-1]))  # (B, 2K, D)
            anchors = F.normalize(head(patches).float(), dim=-1)               # (B, 2K, d)
            total = total + self.compare(anchors, classes, ignore, queue)
            if self.training:
                self.enqueue(queue, anchors[:, :K].detach(), labels)           # (B, K, d)
        return total / len(self.heads)

    def compare(self, anchors, classes, ignore, queue):
        """anchors (B, 2K, d) against themselves and a queue -> scalar."""
        anchors = anchors.flatten(0, 1)                                        # (A, d)
        old, old_classes = queue.keys()                                  # (Q - A, d), (Q - A,)
        keys = torch.cat([anchors, old])                                       # (Q, d)
        key_classes = torch.cat([classes, old_classes])                        # (Q,)
        ignore = F.pad(ignore, (0, len(old)))                                  # (A, Q)
        return contrast(anchors, classes, keys, key_classes, ignore, self.tau)

    def enqueue(self, queue, patches, labels):
        """Queue the patches (B, K, d) that look most manipulated, each in its picture's class."""
        genuine = patches[labels == 0].flatten(0, 1)                           # (B0 * K, d)
        manipulated = patches[labels == 1].flatten(0, 1)                       # (B1 * K, d)
        queue.push(genuine, manipulated)


def cosines(z, labels):
    """Mean cosine of patches (A, d) within and between the classes of labels (A,)."""
    z = F.normalize(z, dim=-1)                                                 # (A, d)
    cosine = z @ z.T                                                           # (A, A)
    same = labels[:, None] == labels                                           # (A, A)
    itself = torch.eye(len(z), dtype=torch.bool)                               # (A, A)
    return cosine[same & ~itself].mean().item(), cosine[~same].mean().item()


def demo():
    """Eight pictures of 16 patches: what is selected, and what the loss does to their features."""
    torch.manual_seed(0)
    labels = torch.tensor([0, 1] * 4)
    edges = torch.rand(8, 16)
    logits = torch.randn(8, 16)
    most, least = select(edges, logits, share=0.5, top=2)
    print("8 pictures of 16 patches. Of each, the 8 strongest edges are edge patches; of these the\n"
          "2 that look most manipulated and the 2 that look least so are taken:")
    for label, a, b in list(zip(labels.tolist(), most.tolist(), least.tolist()))[:4]:
        kind = "manipulated" if label else "genuine"
        print(f"    {kind:11}  most {a}  least {b}")

    hecl = HECL(levels=1, width=8, dim=4, queue=6, tau=0.1, share=0.5, top=2)
    z = torch.randn(8, 16, 8, requires_grad=True)                              # (B, N, D)
    optimizer = torch.optim.Adam([z], lr=0.05)
    for step in range(61):
        loss = hecl([z], edges, logits, labels)
        if step % 20 == 0:
            chosen = z.gather(1, most[..., None].expand(-1, -1, 8)).flatten(0, 1)  # (A, D)
            within, between = cosines(hecl.heads[0](chosen), labels.repeat_interleave(2))
            print(f"step {step:2}  loss {loss.item():.3f}   cosines of the most manipulated-looking: "
                  f"{within:+.2f} within a class, {between:+.2f} between the classes")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    queue = hecl.queues[0]
    print(f"each queue keeps the last {queue.length} patches of its class; next place: "
          f"{int(queue.head)}")


if __name__ == "__main__":
    demo()
