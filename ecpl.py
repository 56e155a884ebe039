"""ECPL, edge-aware contrastive prompt learning: edge-enhanced features become text prompts.

Source: SAPL (arXiv 2601.06222). The paper's observation: features vary far more across a
manipulated boundary than inside regions. Its abstract fixes the idea (edge-enhanced image features,
turned by attention into learnable prompts, compared with the image as a similarity map), no
equation and no number; what we had to choose is marked `ours`.

Shapes: B images, N = h * w patches, D joint width, Dv image width, Dt text width, L text tokens,
M context tokens, C = 2 classes in the order (genuine, manipulated).
"""
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import clip

CLASSES = ("genuine", "manipulated")


# ------------------------------------------------------------------------------- what an edge is

def sobel(x):
    """Gradient magnitude per channel, Sobel's kernel / 8: x (B, K, H, W) -> the same shape.
    Borders are replicated. Sums of shifted copies are faster than a grouped convolution."""
    x = F.pad(x, (1, 1, 1, 1), mode="replicate")                               # (B, K, H+2, W+2)
    rows = x[..., :-2, :] + 2 * x[..., 1:-1, :] + x[..., 2:, :]                # (B, K, H, W+2)
    columns = x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]                      # (B, K, H+2, W)
    gx = (rows[..., :-2] - rows[..., 2:]) / 8                                  # (B, K, H, W)
    gy = (columns[..., :-2, :] - columns[..., 2:, :]) / 8                      # (B, K, H, W)
    return (gx.square() + gy.square() + 1e-16).sqrt()                          # (B, K, H, W)


def soft_edges(image):
    """Soft edge map of the luminance: image (B, 3, H, W) in [0, 1] -> (B, 1, H, W) in [0, 1).

    The paper names a soft edge map; the form is ours: g / (g + mean g). A gradient as large as the
    picture's mean gives one half, and a picture twice as dark has nearly the same edges. A constant
    picture has none: all below 1e-4.
    """
    weights = image.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)         # (1, 3, 1, 1)
    g = sobel((image * weights).sum(dim=1, keepdim=True))                      # (B, 1, H, W)
    mean = g.mean(dim=(2, 3), keepdim=True)                                    # (B, 1, 1, 1)
    # ours: 1e-3, a quarter of an 8-bit step, so that an almost flat picture keeps weak edges
    return g / (g + mean + 1e-3)


def pool_edges(edge, h, w):
    """Edge strength per patch, the mean of its strongest quarter (ours): (B, 1, H, W) -> (B, N)."""
    B, _, H, W = edge.shape
    cells = F.unfold(edge, (H // h, W // w), stride=(H // h, W // w))          # (B, area, N)
    return cells.topk(max(1, cells.shape[1] // 4), dim=1).values.mean(dim=1)   # (B, N)


def feature_variation(features, h, w):
    """Sobel magnitude of features over the patch grid: (B, N, Dv) -> (B, N, Dv).

    This is the paper's measure of boundaries: large where neighbouring patches disagree.
    """
    B, N, Dv = features.shape
    grid = features.transpose(1, 2).reshape(B, Dv, h, w)                       # (B, Dv, h, w)
    return sobel(grid).flatten(2).transpose(1, 2)                              # (B, N, Dv)


# ---------------------------------------------------------------------- edges -> prompts -> text

WORD = 0.02                              # standard deviation of CLIP's word embeddings


class PromptLearner(nn.Module):
    """Context tokens of both classes, shifted by what attention reads from the edge features.

        G = sum over levels of W_l LayerNorm(F_l + e * dF_l)          edge-enhanced features
        P = V + 0.02 * o(Attention(queries LayerNorm(V), keys and values G))
        prompt of class c = [start] P_c words_c [end]

    V: the context tokens. F_l: patch features at level l, dF_l: their variation, e: soft edges
    (ours: in the ablation, prompts that read edges alone were no better than prompts that read no
    picture). 0.02: the spread of CLIP's word embeddings (ours: o then moves prompts in steps of
    their own size). o starts at zero, so training starts from P = V. Without `attend` it stays
    there: the plain learned prompt. What else may stand for F_l + e * dF_l: see ECPL.
    """

    def __init__(self, clip_model, *, levels, context, class_words, attend):
        super().__init__()
        Dv, Dt = clip_model.visual.proj.shape[0], clip_model.token_embedding.embedding_dim
        tokens = clip.tokenize(list(class_words), clip_model.context_length,
                               clip_model.token_embedding.num_embeddings)      # (C, 77)
        length = int(tokens.argmax(dim=-1).max()) + 1  # of the longest class, with both ends
        if length + context > clip_model.context_length:
            raise ValueError(f"{context} context tokens and the words {class_words} need "
                             f"{length + context} tokens, the text tower takes "
                             f"{clip_model.context_length}: shorten them")
        self.register_buffer("tokens", tokens[:, :length], persistent=False)   # (C, words + 2)
        self.context = nn.Parameter(WORD * torch.randn(len(class_words), context, Dt))  # (C, M, Dt)
        self.attend = attend
        if attend:
            self.norms = nn.ModuleList(nn.LayerNorm(Dv) for _ in range(levels))
            self.projections = nn.ModuleList(nn.Linear(Dv, Dt, bias=False) for _ in range(levels))
            self.attention = nn.MultiheadAttention(Dt, max(1, Dt // 64), batch_first=True)
            self.norm_query = nn.LayerNorm(Dt)
            nn.init.zeros_(self.attention.out_proj.weight)
            nn.init.zeros_(self.attention.out_proj.bias)

    def forward(self, clip_model, features, weight=None):
        """Text features (B or 1, C, D) of unit length; 1 without `attend`, which reads no picture.

        features: [(B, N, Dv)], one per level. weight: (B, N) of the patches, None = all alike.
        """
        C, M, Dt = self.context.shape
        prompts = self.context[None]                                           # (1, C, M, Dt)
        if self.attend:
            G = sum(project(norm(x)) for project, norm, x
                    in zip(self.projections, self.norms, features))            # (B, N, Dt)
            if weight is not None:  # after the norm, which would undo it
                G = weight[..., None] * G                                      # (B, N, Dt)
            V = self.context.flatten(0, 1).expand(len(G), -1, -1)              # (B, C * M, Dt)
            read, _ = self.attention(self.norm_query(V), G, G, need_weights=False)  # (B, C * M, Dt)
            prompts = (V + WORD * read).view(len(G), C, M, Dt)                 # (B, C, M, Dt)
        B = len(prompts)
        words = clip_model.token_embedding(self.tokens)                        # (C, words + 2, Dt)
        words = words.expand(B, -1, -1, -1)                                 # (B, C, words + 2, Dt)
        sentence = torch.cat([words[:, :, :1], prompts, words[:, :, 1:]], dim=2)  # (B, C, L, Dt)
        end = (self.tokens.argmax(dim=-1) + M).repeat(B)                       # (B * C,)
        text = clip_model.encode_prompts(sentence.flatten(0, 1), end)          # (B * C, D)
        return F.normalize(text.view(B, C, -1), dim=-1)                        # (B, C, D)


# ---------------------------------------------------------------------- similarity -> map, score

def pool_score(logits, rho):
    """Smooth top-k pooling: patch logits (B, N) -> image logit (B,).

    Ours: a mean weighted by how far each patch lies above the k-th largest, so the gradient also
    reaches the patches just below; the weights themselves carry none. rho: k as a share of N.
    """
    k = max(1, round(rho * logits.shape[1]))
    edge = logits.detach().topk(k, dim=1).values[:, -1:]                       # (B, 1)
    weight = torch.sigmoid(4 * (logits.detach() - edge))                       # (B, N)
    return (weight * logits).sum(dim=1) / weight.sum(dim=1)                    # (B,)


class Output(NamedTuple):
    """What SAPL answers for a batch; `stages`, `edges` feed HECL in training."""
    logits: torch.Tensor         # (B, h, w) of "manipulated" against "genuine"
    probability: torch.Tensor    # (B, h, w) in [0, 1]
    score_logit: torch.Tensor    # (B,) of the whole picture
    text: torch.Tensor           # (B or 1, C, D) unit length
    stages: list                 # [(B, N, D)] patch features as each level joins, the last = map's
    edges: torch.Tensor          # (B, N) soft edges in [0, 1)


class ECPL(nn.Module):
    """From a picture to the map: patch features, edges, prompts, similarity.

    levels: blocks of the image tower, counted from 1. context: M. class_words: one phrase a class.
    edge_source: "image" or "features", where the soft edges come from.
    prompts: what attention reads: "enhanced" patch features plus their variation along soft edges
    (ECPL); "edges" that variation alone, e * LayerNorm(dF) (the shipped model); "patches" patch
    features alone (the control of the ablation). "plain": it reads nothing, learned context alone;
    "none": two learned class vectors, no text at all.
    dense: see clip.encode_patches. rho: see pool_score. zoom: the tower sees pictures enlarged so
    many times (ours: what betrays a manipulation is finer than a patch of CLIP's).
    """

    SETTINGS = ("levels", "context", "class_words", "edge_source", "prompts", "dense", "rho",
                "zoom")

    def __init__(self, clip_model, *, levels, context, class_words, edge_source, prompts, dense,
                 rho, zoom):
        super().__init__()
        assert edge_source in ("image", "features"), edge_source
        assert prompts in ("enhanced", "edges", "patches", "plain", "none"), prompts
        self.levels, self.edge_source, self.prompts = tuple(levels), edge_source, prompts
        self.dense, self.rho, self.zoom = dense, rho, zoom
        self.cell = clip_model.visual.patch_size // zoom     # a patch in pixels of the picture
        if zoom < 1 or self.cell * zoom != clip_model.visual.patch_size:
            raise ValueError(f"found zoom {zoom}, expected a divisor of the patch size, "
                             f"{clip_model.visual.patch_size}")
        Dv, D = clip_model.visual.proj.shape
        if prompts == "none":
            vectors = torch.randn(1, len(CLASSES), D) * D ** -0.5              # (1, C, D)
            self.class_vectors = nn.Parameter(vectors)
        else:
            self.learner = PromptLearner(clip_model, levels=len(self.levels), context=context,
                                         class_words=class_words, attend=prompts != "plain")
        # ours: the levels' patch features join the last ones through gates that start at zero,
        # because what betrays a manipulation (noise, blur, seams) fades with depth
        self.level_norms = nn.ModuleList(nn.LayerNorm(Dv) for _ in self.levels)
        self.level_gates = nn.ModuleList(nn.Linear(Dv, D, bias=False) for _ in self.levels)
        for gate in self.level_gates:
            nn.init.zeros_(gate.weight)
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())  # bounded in `similarity`
        self.bias = nn.Parameter(torch.zeros(()))

    def soft_edges(self, image, levels, h, w):
        """Soft edges per patch (B, N) in [0, 1), from the picture or from its last level."""
        if self.edge_source == "image":
            return pool_edges(soft_edges(image), h, w)                         # (B, N)
        g = feature_variation(levels[-1], h, w).mean(dim=-1)                   # (B, N)
        return (g / (g + g.mean(dim=1, keepdim=True) + 1e-6)).detach()

    def text_features(self, clip_model, levels, edges, h, w):
        """Unit text features of both classes: (B, C, D), or (1, C, D) if no picture is read."""
        if self.prompts == "none":
            return F.normalize(self.class_vectors, dim=-1)                     # (1, C, D)
        if self.prompts in ("patches", "plain"):
            return self.learner(clip_model, levels)                            # (B or 1, C, D)
        variation = [feature_variation(x, h, w) for x in levels]               # [(B, N, Dv)]
        if self.prompts == "edges":
            return self.learner(clip_model, variation, edges)                  # (B, C, D)
        e = edges[..., None]                                                   # (B, N, 1)
        enhanced = [x + e * dx for x, dx in zip(levels, variation)]            # [(B, N, Dv)]
        return self.learner(clip_model, enhanced)                              # (B, C, D)

    def similarity(self, features, text):
        """Patch logits: features (B, N, D), text (B or 1, C, D) of unit length -> (B, N)."""
        features = F.normalize(features, dim=-1)
        difference = text[:, 1] - text[:, 0]                                   # (B or 1, D)
        scale = self.log_scale.clamp(0, 4.6).exp()  # ours: 1 .. 99.5, just under CLIP's bound
        return scale * (features * difference[:, None]).sum(dim=-1) + self.bias  # (B, N)

    def forward(self, clip_model, image, memo=None):
        """image (B, 3, H, W) in [0, 1], sides multiples of `cell` -> Output. memo: a dict kept for
        pictures that come again, see clip.encode_patches."""
        pixels = clip.normalize(image)                                         # (B, 3, H, W)
        if self.zoom > 1:
            pixels = F.interpolate(pixels, scale_factor=self.zoom, mode="bilinear")  # (B, 3, ..)
        h, w = clip_model.visual.grid(pixels)
        # levels [(B, N, Dv)], features (B, N, D)
        levels, features = clip_model.encode_patches(pixels, self.levels, self.dense, memo)
        edges = self.soft_edges(image, levels, h, w)                           # (B, N)
        text = self.text_features(clip_model, levels, edges, h, w)             # (B or 1, C, D)
        stages = []                                                            # [(B, N, D)]
        for x, norm, gate in zip(levels, self.level_norms, self.level_gates):
            features = features + gate(norm(x))                                # (B, N, D)
            stages.append(features)
        logits = self.similarity(features, text)                               # (B, N)
        grid = logits.view(-1, h, w)                                           # (B, h, w)
        return Output(grid, grid.sigmoid(), pool_score(logits, self.rho), text, stages, edges)


# --------------------------------------------------------------------------------- map -> region

def spread(x, height, width):
    """The largest value in a window of odd sides around each cell: (B, 1, h, w) -> the same."""
    return F.max_pool2d(x, (height, width), stride=1, padding=(height // 2, width // 2))


def smooth(x, radius):
    """Mean over a square of 2 * radius + 1 cells: (B, h, w) -> the same; radius 0: x itself."""
    x = F.pad(x[:, None], (radius,) * 4, mode="replicate")                     # (B, 1, h+2r, w+2r)
    return F.avg_pool2d(x, 2 * radius + 1, stride=1)[:, 0]                     # (B, h, w)


def regions(probability, reach=1, radius=0):
    """Close gaps in a responding boundary, fill what it encloses: (B, h, w) in [0, 1] -> the same.

    The paper derives the mask by processing the similarity map; the form is ours: a grey closing
    with a square of 2 * reach + 1 patches, then a grey fill, in which every cell rises to the
    lowest value that a way from it to the border must cross. Both lower no value and leave a flat
    map as it is. Last comes `smooth`.
    """
    x, size = probability[:, None], 2 * reach + 1                              # (B, 1, h, w)
    closed = torch.maximum(-spread(-spread(x, size, size), size, size), x)
    level = torch.full_like(x, float("inf"))  # water, let out over the border of the map
    level[..., 0, :], level[..., -1, :] = closed[..., 0, :], closed[..., -1, :]
    level[..., :, 0], level[..., :, -1] = closed[..., :, 0], closed[..., :, -1]
    while True:
        lower = torch.minimum(-spread(-level, 3, 1), -spread(-level, 1, 3))  # 4 neighbours
        lower = torch.minimum(level, torch.maximum(lower, closed))
        if torch.equal(lower, level):
            break
        level = lower
    return smooth(level[:, 0], radius)                                         # (B, h, w)


def demo():
    """A square pasted into a smooth picture: every step of ECPL with its shape and its numbers."""
    torch.manual_seed(0)
    image = torch.linspace(0.2, 0.6, 128).expand(1, 3, 128, 128).clone()
    image[..., 40:88, 40:88] = 0.8 - image[..., 40:88, 40:88] / 2 + 0.03 * torch.randn(48, 48)
    model = clip.CLIP(embed_dim=64, image_resolution=128, vision_layers=3, vision_width=64,
                      vision_patch_size=16, context_length=77, vocab_size=514, transformer_width=64,
                      transformer_layers=2).eval()
    ecpl = ECPL(model, levels=(1, 2, 3), context=4, class_words=CLASSES, edge_source="image",
                prompts="enhanced", dense="plain", rho=0.1, zoom=1)
    edge = soft_edges(image)
    print(f"image            {tuple(image.shape)}   "
          "a smooth ramp with a noisy square pasted at 40..88")
    print(f"soft edge map    {tuple(edge.shape)}   {edge.min():.2f} .. {edge.max():.2f}")
    print("pooled to the 8 x 8 patches, in percent; the outline of the square stands out:")
    for row in pool_edges(edge, 8, 8).view(8, 8):
        print("   ", " ".join(f"{100 * value:3.0f}" for value in row))
    with torch.no_grad():
        out = ecpl(model, image)
    print(f"stages           {len(out.stages)} x {tuple(out.stages[0].shape)}   "
          "patch features as three depths join")
    print(f"text features    {tuple(out.text.shape)}   "
          "one per class, of this picture's own prompts")
    print(f"map              {tuple(out.probability.shape)}   "
          f"{out.probability.min():.2f} .. {out.probability.max():.2f}; random weights say nothing")
    print(f"score            {out.score_logit.sigmoid().item():.2f}   "
          "smooth top-k of the map's logits")
    ring = torch.zeros(1, 8, 8)
    ring[0, 2:6, 2:6] = 0.9
    ring[0, 3:5, 3:5] = ring[0, 2, 4] = 0.1
    before, after = ((x > 0.5).sum().item() for x in (ring, regions(ring)))
    print(f"regions()        a broken ring of {before} patches becomes a region of {after}")


if __name__ == "__main__":
    demo()
