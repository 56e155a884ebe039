"""HECL, hierarchical edge contrastive learning: genuine against manipulated edge patches.

Source: SAPL (arXiv 2601.06222): edge patches of both kinds are extracted and contrasted, with a
dual queue. The paper's abstract gives neither the selection rule nor the loss; both are ours, see
below. Used in training only.

Shapes: B images, N patches, D width of their features, d contrast width, K patches of each kind
(own, clean) taken of an image, A = B * 2K anchors, U of them usable, Q keys, W processes; class 0
genuine, 1 manipulated.
"""
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F


def select(edges, probability, *, share, top):
    """Which patches are contrasted: edges, probability (B, N) -> indices (own, clean), (B, K) each.

    Only edge patches: the `share` of each picture with the strongest soft edges. Of these (ours):
        own    the K that look most manipulated: in a manipulated picture these stand for its
               manipulated edge patches; in a genuine one, they are its hardest genuine ones
        clean  the K that look least manipulated: in a manipulated picture they stand for genuine
               edge patches of the very same scene, at a lower weight; else they go unused
    K is `top`, or half of the edge patches if that is fewer, so that no patch is in both (but for
    one edge patch alone, and for equal probabilities).
    """
    B, N = edges.shape
    count = max(1, round(share * N))  # at least: equally strong ones stay too
    K = max(1, min(top, count // 2))
    weak = edges < edges.topk(count, dim=1).values[:, -1:]                     # (B, N)
    own = probability.masked_fill(weak, -1).topk(K, dim=1).indices             # (B, K)
    clean = (-probability).masked_fill(weak, -2).topk(K, dim=1).indices        # (B, K)
    return own, clean


def join(x):
    """The batches of all W processes: (B, ...) -> (W * B, ...), with gradients for one's own rows.

    All compute the same loss of it, each gives back the part of its own rows, and
    DistributedDataParallel averages: hence the factor W on that part. One process: x itself.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    if x.requires_grad:
        parts[dist.get_rank()] = x.detach() + len(parts) * (x - x.detach())
    return torch.cat(parts)                                                    # (W * B, ...)


class DualQueue(nn.Module):
    """Two first-in-first-out buffers of unit features, one a class; saved with the checkpoint.

    The dual queue is the paper's; a buffer with a moving head is MoCo's (He et al. 2020).
    """

    def __init__(self, length, dim):
        super().__init__()
        self.length = length
        self.register_buffer("features", torch.zeros(2, length, dim))          # (2, length, d)
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))      # of each queue
        self.register_buffer("head", torch.zeros((), dtype=torch.long))        # the next place

    def push(self, genuine, manipulated):
        """Append n features a class, (n, d) each; the oldest make room.

        Equal numbers, so the classes stay balanced whatever the batch was.
        """
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
        classes = torch.arange(2, device=self.head.device).repeat_interleave(n)  # (2 * filled,)
        return self.features[:, :n].flatten(0, 1), classes                     # (2 * filled, d)


def contrast(anchors, classes, weights, keys, key_classes, ignore, tau):
    """Supervised InfoNCE with many positives (ours, after Khosla et al. 2020) -> scalar >= 0.

        loss of an anchor = -log( sum over keys of its class exp(a.k / tau) / sum over all keys )

    anchors (A, d), keys (Q, d) of unit length; classes (A,), key_classes (Q,); ignore (A, Q): pairs
    left out of both sums; weights (A,) >= 0 of the mean over anchors, from which those without a
    positive are left out. If none is left: 0.
    """
    logits = (anchors @ keys.T / tau).masked_fill(ignore, float("-inf"))       # (A, Q)
    same = classes[:, None] == key_classes                                     # (A, Q)
    usable = (same & ~ignore).any(dim=1) & (weights > 0)                       # (A,)
    if not usable.any():
        return anchors.sum() * 0                                               # ()
    logits, same, weights = logits[usable], same[usable], weights[usable]      # (U, Q) twice, (U,)
    positive = logits.masked_fill(~same, float("-inf")).logsumexp(dim=1)       # (U,)
    return (weights * (logits.logsumexp(dim=1) - positive)).sum() / weights.sum()  # ()


class HECL(nn.Module):
    """The loss at several levels ("hierarchical"), each with its own queues.

    SAPL gives it the patch features in CLIP's joint space, as one level of the image tower after
    the other joins them (ours: what is contrasted is what the map is made of. The tower's own
    features were of no use where it is frozen: their loss trained only the heads in here).
    widths: D of each level. dim: d. queue: features kept a class and level; 0 = the batch alone.
    tau: temperature. share, top: see `select`. clean: weight of the `clean` patches of manipulated
    pictures, whose label "genuine" is a guess.
    """

    def __init__(self, widths, *, dim, queue, tau, share, top, clean):
        super().__init__()
        self.tau, self.share, self.top, self.clean = tau, share, top, clean
        self.heads = nn.ModuleList(nn.Linear(width, dim) for width in widths)
        self.queues = nn.ModuleList(DualQueue(queue, dim) for _ in widths) if queue else None

    def forward(self, levels, edges, probability, labels):
        """levels [(B, N, D)], edges, probability (B, N), labels (B,) in {0, 1} -> scalar >= 0.

        The batch is joined over processes first: from there on, B counts the pictures of all.
        """
        levels = [join(x) for x in levels]                                     # [(B, N, D)]
        edges, probability, labels = map(join, (edges, probability, labels))   # (B, N) twice, (B,)
        own, clean = select(edges, probability.detach(), share=self.share, top=self.top)
        B, K = own.shape
        index = torch.cat([own, clean], dim=1)                                 # (B, 2K)
        label = labels[:, None].expand(B, K)                                   # (B, K)
        classes = torch.cat([label, torch.zeros_like(clean)], dim=1).flatten().long()  # (A,)
        ones = torch.ones(B, K, device=edges.device)                           # (B, K)
        weights = torch.cat([ones, self.clean * label], dim=1).flatten()       # (A,)
        picture = torch.arange(B, device=edges.device).repeat_interleave(2 * K)  # (A,)
        # patches of one picture share its content: as positives they would teach scenes, not seams
        ignore = (picture[:, None] == picture) & (classes[:, None] == classes)  # (A, A)
        ignore |= (weights == 0)[None]  # nor are the `clean` patches of genuine pictures keys
        loss = 0
        for i, (x, head) in enumerate(zip(levels, self.heads)):
            patches = x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))  # (B, 2K, D)
            z = F.normalize(head(patches), dim=-1)                             # (B, 2K, d)
            anchors = z.flatten(0, 1)                                          # (A, d)
            keys, key_classes, skip = anchors, classes, ignore
            if self.queues:
                old, old_classes = self.queues[i].keys()                     # (Q - A, d), (Q - A,)
                keys = torch.cat([keys, old])                                  # (Q, d)
                key_classes = torch.cat([classes, old_classes])                # (Q,)
                skip = F.pad(ignore, (0, len(old)))                            # (A, Q)
            loss = loss + contrast(anchors, classes, weights, keys, key_classes, skip, self.tau)
            if self.queues and self.training:
                self.enqueue(self.queues[i], z[:, :K].detach(), labels)
        return loss / len(self.heads)

    @staticmethod
    @torch.no_grad()
    def enqueue(queue, z, labels):
        """Queue the `own` patches z (B, K, d) of as many genuine as manipulated pictures."""
        n = int(min((labels == 0).sum(), (labels == 1).sum()))
        queue.push(*(z[labels == c][:n].flatten(0, 1) for c in (0, 1)))        # 2 x (n * K, d)


def demo():
    """Four pictures of 16 patches: what is selected, what is queued, and that the loss falls."""
    torch.manual_seed(0)
    labels = torch.tensor([0, 1, 0, 1])
    edges, probability = torch.rand(4, 16), torch.rand(4, 16)
    own, clean = select(edges, probability, share=0.5, top=2)
    print("4 pictures (genuine, manipulated, genuine, manipulated) of 16 patches; the 8 strongest\n"
          "edges of each are edge patches, of which 2 that look most and 2 that look least\n"
          "manipulated are taken:")
    for label, a, b in zip(labels.tolist(), own.tolist(), clean.tolist()):
        print(f"    {'manipulated' if label else 'genuine    '}  most {a}  least {b}")
    hecl = HECL([8, 8], dim=4, queue=6, tau=0.1, share=0.5, top=2, clean=0.5)
    x = torch.randn(4, 16, 8, requires_grad=True)
    optimizer = torch.optim.Adam([x], lr=0.05)
    for step in range(60):
        loss = hecl([x, x], edges, probability, labels)
        if step % 20 == 0 or step == 59:
            q = hecl.queues[0]
            print(f"    step {step:2d}  loss {loss.item():.3f}  "
                  f"queue {int(q.filled)} of {q.length} a class, next place {int(q.head)}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print("the loss falls as genuine and manipulated edge patches move apart")


if __name__ == "__main__":
    demo()
