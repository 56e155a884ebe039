"""HECL, hierarchical edge contrastive learning: genuine against manipulated edge patches.

Source: SAPL (arXiv 2601.06222): edge patches of both kinds are extracted and contrasted, with a dual
queue. The paper's abstract gives neither the selection rule nor the loss; both are ours, see below.
Used in training only. Shapes: B images, N patches, Dv image width, K patches taken of each image,
d contrast width; class 0 genuine, 1 manipulated.
"""
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F


def select(edges, probability, labels, *, share, top):
    """Which patches are contrasted. edges, probability (B, N), labels (B,) in {0, 1}.

    Only edge patches: the `share` of each picture with the strongest soft edges. Of these (ours):
        own    (B, K) the K that look most manipulated: in a manipulated picture these are its
               manipulated edge patches; in a genuine one, its hardest genuine edge patches
        clean  (B, K) the K that look least manipulated: of a manipulated picture they serve as
               genuine edge patches of the very same scene, at a lower weight
    A picture without enough edges repeats patches rather than fail. Returns (own, clean) indices.
    """
    B, N = edges.shape
    count = max(1, round(share * N))
    K = min(top, count)
    weak = edges < edges.topk(count, dim=1).values[:, -1:]                            # (B, N)
    own = probability.masked_fill(weak, -1).topk(K, dim=1).indices                    # (B, K)
    clean = (-probability).masked_fill(weak, -2).topk(K, dim=1).indices               # (B, K)
    return own, clean


def join(x):
    """The batches of all W processes: (B, ...) -> (W * B, ...), with gradients for one's own rows.

    All compute the same loss of it, each gives back the part of its own rows, and
    DistributedDataParallel averages: hence the factor W on that part.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    if x.requires_grad:
        parts[dist.get_rank()] = x.detach() + len(parts) * (x - x.detach())
    return torch.cat(parts)                                                           # (W * B, ...)


class DualQueue(nn.Module):
    """Two first-in-first-out buffers of unit features, one a class; saved with the checkpoint."""

    def __init__(self, length, dim):
        super().__init__()
        self.length = length
        self.register_buffer("features", torch.zeros(2, length, dim))                 # (2, length, d)
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))             # of each queue
        self.register_buffer("head", torch.zeros((), dtype=torch.long))               # the next place

    def push(self, genuine, manipulated):
        """Append n features a class, (n, d) each; the oldest make room. Equal numbers, so the
        classes stay balanced whatever the batch was."""
        assert genuine.shape == manipulated.shape, (genuine.shape, manipulated.shape)
        n = min(len(genuine), self.length)
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
        return (self.features[:, :n].flatten(0, 1),                                   # (2 * filled, d)
                torch.arange(2, device=self.head.device).repeat_interleave(n))


def contrast(anchors, classes, weights, keys, key_classes, ignore, tau):
    """Supervised InfoNCE with many positives (ours, after Khosla et al. 2020, MoCo's queue).

        loss of an anchor = -log( sum over keys of its class exp(a.k / tau) / sum over all keys )

    anchors (A, d), keys (Q, d) unit length; classes (A,), key_classes (Q,); weights (A,) >= 0;
    ignore (A, Q) pairs that count as neither. Anchors without a positive are left out. Scalar.
    """
    logits = (anchors @ keys.T / tau).masked_fill(ignore, float("-inf"))              # (A, Q)
    same = classes[:, None] == key_classes                                            # (A, Q)
    usable = (same & ~ignore).any(dim=1) & (weights > 0)                              # (A,)
    if not usable.any():
        return anchors.sum() * 0
    logits, same, weights = logits[usable], same[usable], weights[usable]
    positive = logits.masked_fill(~same, float("-inf")).logsumexp(dim=1)              # (A,)
    return (weights * (logits.logsumexp(dim=1) - positive)).sum() / weights.sum()


class HECL(nn.Module):
    """The loss at several levels of the image tower ("hierarchical"), each with its own queues.

    widths: Dv of each level. dim: d. queue: features kept a class and level; 0 = the batch alone.
    tau: temperature. share, top: see `select`. clean: weight of the genuine patches of
    manipulated pictures, whose label is a guess.
    """

    def __init__(self, widths, *, dim, queue, tau, share, top, clean):
        super().__init__()
        self.tau, self.share, self.top, self.clean = tau, share, top, clean
        self.heads = nn.ModuleList(nn.Linear(width, dim) for width in widths)
        self.queues = nn.ModuleList(DualQueue(queue, dim) for _ in widths) if queue else None

    def forward(self, levels, edges, probability, labels):
        """levels [(B, N, Dv)], edges, probability (B, N), labels (B,) in {0, 1} -> scalar loss >= 0."""
        levels, (edges, probability, labels) = map(join, levels), map(join, (edges, probability, labels))
        B = len(labels)                                                               # of all processes
        own, clean = select(edges, probability.detach(), labels, share=self.share, top=self.top)
        K = own.shape[1]
        index = torch.cat([own, clean], dim=1)                                        # (B, 2K)
        classes = torch.cat([labels[:, None].expand(B, K), torch.zeros_like(clean)], dim=1).flatten().long()
        weights = torch.cat([torch.ones(B, K, device=edges.device),
                             self.clean * labels[:, None].expand(B, K)], dim=1).flatten()  # (B * 2K,)
        picture = torch.arange(B, device=edges.device).repeat_interleave(2 * K)       # (B * 2K,)
        # patches of one picture share its content: as positives they would teach scenes, not seams
        ignore = (picture[:, None] == picture) & (classes[:, None] == classes)        # (B * 2K, B * 2K)
        ignore |= (weights == 0)[None]
        loss = 0
        for i, (x, head) in enumerate(zip(levels, self.heads)):
            patches = x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))       # (B, 2K, Dv)
            z = F.normalize(head(patches), dim=-1)                                    # (B, 2K, d)
            anchors = z.flatten(0, 1)                                                 # (B * 2K, d)
            keys, key_classes, skip = anchors, classes, ignore
            if self.queues:
                old, old_classes = self.queues[i].keys()
                keys, key_classes = torch.cat([keys, old]), torch.cat([classes, old_classes])
                skip = F.pad(ignore, (0, len(old)))                                   # (B * 2K, B * 2K + Q)
            loss = loss + contrast(anchors, classes, weights, keys, key_classes, skip, self.tau)
            if self.queues and self.training:
                self.enqueue(self.queues[i], z[:, :K].detach(), labels)
        return loss / len(self.heads)

    @staticmethod
    @torch.no_grad()
    def enqueue(queue, z, labels):
        """The `own` patches z (B, K, d), as many genuine as manipulated pictures."""
        n = int(min((labels == 0).sum(), (labels == 1).sum()))
        queue.push(*(z[labels == c][:n].flatten(0, 1) for c in (0, 1)))               # 2 x (n * K, d)


def demo():
    """Four pictures of 16 patches: what is selected, what is queued, and that the loss separates."""
    torch.manual_seed(0)
    labels = torch.tensor([0, 1, 0, 1])
    edges, probability = torch.rand(4, 16), torch.rand(4, 16)
    own, clean = select(edges, probability, labels, share=0.5, top=2)
    print("4 pictures (genuine, manipulated, genuine, manipulated) of 16 patches; the 8 strongest edges of")
    print("each are edge patches, of which 2 that look most and 2 that look least manipulated are taken:")
    for label, a, b in zip(labels.tolist(), own.tolist(), clean.tolist()):
        print(f"    {'manipulated' if label else 'genuine    '}  most {a}  least {b}")
    hecl = HECL([8, 8], dim=4, queue=6, tau=0.1, share=0.5, top=2, clean=0.5)
    x = torch.randn(4, 16, 8, requires_grad=True)
    optimizer = torch.optim.Adam([x], lr=0.05)
    for step in range(60):
        loss = hecl([x, x], edges, probability, labels)
        if step % 20 == 0 or step == 59:
            q = hecl.queues[0]
            print(f"    step {step:2d}  loss {loss.item():.3f}  queue {int(q.filled)} of {q.length} a class, "
                  f"next place {int(q.head)}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print("the loss falls as genuine and manipulated edge patches move apart")


if __name__ == "__main__":
    demo()
