"""ECPL, edge-aware contextual prompt learning, and SAPL, the network around it (arXiv 2601.06222).

We have read the paper's abstract and a short third-party digest (in a Chinese-language list of
arXiv summaries), nothing more. So each statement about the method names its source:
    [abstract]  features vary far more across a manipulated boundary than inside regions;
                edge-enhanced image features become, by attention, learnable text prompts; the mask
                comes from the image-text similarity map after processing
    [digest]    a soft edge map, a dual queue, LoRA
    [ours]      our own choice: every equation and every number

Why prompts? CLIP compares pictures with sentences, but a forgery shows what any picture may show,
and we know no words for its traces. CoOp (Zhou et al. 2022) learns the words, CoCoOp (2022) shifts
them with each picture, and ECPL takes that shift from edge-enhanced features, because manipulated
regions show at their edges. To get a map, each patch is compared with the sentences, after MaskCLIP
(Zhou et al. 2022). In the ablation (tests/README.md) the shift gains some F1, only with splices.

`python tests/method.py` draws the steps for a picture.
Shapes: B images, N = h * w patches, D joint width, Dv image width, Dt text width, L text tokens,
M context tokens, C = 2 classes in the order (genuine, manipulated).
"""
import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import clip

CLASSES = ("genuine", "manipulated")


def sobel(x):
    """Gradient magnitude per channel, Sobel's kernels / 8: x (B, K, H, W) -> the same shape."""
    x = F.pad(x, (1, 1, 1, 1), mode="replicate")                               # (B, K, H+2, W+2)
    rows = x[:, :, :-2] + 2 * x[:, :, 1:-1] + x[:, :, 2:]                      # (B, K, H, W+2)
    gx = (rows[..., 2:] - rows[..., :-2]) / 8                                  # (B, K, H, W)
    columns = x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]                      # (B, K, H+2, W)
    gy = (columns[:, :, 2:] - columns[:, :, :-2]) / 8                          # (B, K, H, W)
    return torch.hypot(gx, gy)               # its gradient is NaN at 0: nothing trains through it


def soft_edges(image):
    """Soft map of all edges [digest]: image (B, 3, H, W) in [0, 1] -> (B, 1, H, W) in [0, 1).

    Ours: g / (g + mean g) with g the gradient of the luminance; exposure hardly matters.
    """
    red, green, blue = image.split(1, dim=1)                                   # (B, 1, H, W) each
    g = sobel(0.299 * red + 0.587 * green + 0.114 * blue)                      # (B, 1, H, W)
    typical = g.mean(dim=(2, 3), keepdim=True)                                 # (B, 1, 1, 1)
    # ours: 1e-3, a quarter of an 8-bit step, keeps the edges of an almost flat picture weak
    return g / (g + typical + 1e-3)


def pool_edges(edge, h, w):
    """Edge strength per patch, the mean of its strongest quarter [ours]: (B, 1, H, W) -> (B, N)."""
    H, W = edge.shape[-2:]
    cell = (H // h, W // w)
    cells = F.unfold(edge, cell, stride=cell)                                  # (B, area, N)
    quarter = max(1, cells.shape[1] // 4)
    return cells.topk(quarter, dim=1).values.mean(dim=1)                       # (B, N)


def feature_variation(features, h, w):
    """How much features change between patches [abstract], by Sobel [ours]: (B, N, Dv) -> same."""
    grid = features.transpose(1, 2).unflatten(2, (h, w))                       # (B, Dv, h, w)
    return sobel(grid).flatten(2).transpose(1, 2)                              # (B, N, Dv)


class ECPL(nn.Module):
    """Edge-enhanced image features become, by attention, prompts for the text tower [abstract].

        G   = sum over levels of W_l LayerNorm(F_l + e * dF_l)        edge-enhanced features [ours]
        P   = V + s * o(Attention(queries LayerNorm(V), keys and values G))                  [ours]
        t_c = unit(TextTower([start] P_c words_c [end]))

    F_l: patch features at level l; dF_l: their variation; e: soft edges per patch; V: `context`
    learned tokens per class, as in CoOp; s: std of the token embeddings; o: linear, zero at first.
    """

    def __init__(self, clip_model, *, levels, context):
        super().__init__()
        Dv = clip_model.visual.proj.shape[0]
        vocab_size, Dt = clip_model.token_embedding.weight.shape
        tokens = clip.tokenize(CLASSES, vocab_size=vocab_size)                 # (C, 77)
        length = int(tokens.argmax(dim=-1).max()) + 1    # of the longer class, with start and end
        self.register_buffer("tokens", tokens[:, :length], persistent=False)   # (C, words + 2)

        self.spread = clip_model.token_embedding.weight.std().item()
        V = self.spread * torch.randn(len(CLASSES), context, Dt)               # (C, M, Dt)
        self.context = nn.Parameter(V)
        self.projections = nn.ModuleList()
        for _ in range(levels):
            W = nn.Linear(Dv, Dt, bias=False)
            self.projections.append(nn.Sequential(nn.LayerNorm(Dv), W))
        self.norm_query = nn.LayerNorm(Dt)
        self.attention = nn.MultiheadAttention(Dt, max(1, Dt // 64), batch_first=True)
        nn.init.zeros_(self.attention.out_proj.weight)

    def enhance(self, levels, edges, h, w):
        """Emphasise what varies at edges: [(B, N, Dv)], edges (B, N) -> [(B, N, Dv)]."""
        e = edges[..., None].to(levels[0].dtype)                               # (B, N, 1)
        levels = [x.detach() for x in levels]    # ours: prompts read the tower, do not train it
        return [x + e * feature_variation(x, h, w) for x in levels]            # [(B, N, Dv)]

    def prompts(self, enhanced):
        """[(B, N, Dv)] -> context tokens of both classes (B, C * M, Dt)."""
        G = sum(project(x) for project, x in zip(self.projections, enhanced))  # (B, N, Dt)
        V = self.context.flatten(0, 1).expand(len(G), -1, -1)                  # (B, C * M, Dt)
        Q = self.norm_query(V)
        read, _ = self.attention(Q, G, G, need_weights=False)                  # (B, C * M, Dt)
        return V + self.spread * read            # CoCoOp's shift, from edge-enhanced features

    def encode(self, clip_model, prompts):
        """Context tokens (B, C * M, Dt) -> unit text features (B, C, D)."""
        C, M, Dt = self.context.shape
        B = len(prompts)
        prompts = prompts.view(B, C, M, Dt)                                    # (B, C, M, Dt)
        words = clip_model.token_embedding(self.tokens)                        # (C, words + 2, Dt)
        words = words.expand(B, -1, -1, -1)                                    # (B, C, .., Dt)
        start, rest = words.tensor_split([1], dim=2)           # (B, C, 1, Dt), (B, C, .., Dt)
        sentence = torch.cat([start, prompts, rest], dim=2)                    # (B, C, L, Dt)
        end = self.tokens.argmax(dim=-1) + M                                   # (C,)
        end = end.repeat(B)                                                    # (B * C,)
        text = clip_model.encode_prompts(sentence.flatten(0, 1), end)          # (B * C, D)
        return F.normalize(text.view(B, C, -1), dim=-1)                        # (B, C, D)

    def forward(self, clip_model, levels, edges, h, w):
        """levels [(B, N, Dv)], edges (B, N) -> text features (B, C, D) of unit length."""
        enhanced = self.enhance(levels, edges, h, w)                           # [(B, N, Dv)]
        prompts = self.prompts(enhanced)                                       # (B, C * M, Dt)
        return self.encode(clip_model, prompts)                                # (B, C, D)


class Depths(nn.Module):
    """What each level adds to the features of the map [ours]: z_l = W_l gelu(U_l LayerNorm(F_l)).
    Traces (noise, blur, seams) fade with depth, so shallow levels contribute. W starts small."""

    def __init__(self, Dv, D, levels):
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(levels):
            W = nn.Linear(D, D, bias=False)
            nn.init.normal_(W.weight, std=0.1 * D ** -0.5)
            U = nn.Linear(Dv, D)
            layer = nn.Sequential(nn.LayerNorm(Dv), U, nn.GELU(), W)
            self.layers.append(layer)

    def forward(self, levels):
        """[(B, N, Dv)] -> [(B, N, D)]."""
        return [layer(x) for layer, x in zip(self.layers, levels)]             # [(B, N, D)]


def pool_score(logits, rho):
    """Smooth top-k pooling [ours], k = rho * N: patch logits (B, N) -> image logit (B,). A weighted
    mean: a logit z standard deviations above the k-th largest weighs sigmoid(4 z), so those just
    below it get gradient, too. The weights themselves carry no gradient."""
    k = max(1, round(rho * logits.shape[1]))
    fixed = logits.detach()
    kth_largest = fixed.topk(k, dim=1).values[:, -1:]                          # (B, 1)
    deviation = fixed.std(dim=1, correction=0, keepdim=True)                   # (B, 1)
    distance = (fixed - kth_largest) / (deviation + 1e-6)                      # (B, N)
    weight = torch.sigmoid(4 * distance)
    return (weight * logits).sum(dim=1) / weight.sum(dim=1)                    # (B,)


def smooth(logits):
    """Process the map [abstract] by averaging over 3 x 3 patches [ours]: (B, h, w) -> the same."""
    padded = F.pad(logits, (1, 1, 1, 1), mode="replicate")                     # (B, h+2, w+2)
    return F.avg_pool2d(padded, 3, stride=1)                                   # (B, h, w)


class Output(NamedTuple):
    """What SAPL answers for a batch; `logits`, `depths` and `edges` feed HECL."""
    logits: torch.Tensor         # (B, h, w) of "manipulated" against "genuine", one per patch
    score: torch.Tensor          # (B,) logit of the whole picture
    text: torch.Tensor           # (B, C, D) unit length
    depths: list                 # [(B, N, D)] what each level adds to the features of the map
    edges: torch.Tensor          # (B, N) soft edges in [0, 1)


class SAPL(nn.Module):
    """CLIP, edges, prompts, similarity: from pictures to a map of what is manipulated.

    config, a dict: `clip` (a name), `levels` (blocks of the image tower, from 1), `context` (tokens
    per class), `rho` (see pool_score), `zoom` (enlarges pictures, as traces are finer than CLIP's
    patches [ours]; a divisor of the patch size), `lora_rank` (LoRA [digest]; 0: none), `lora_share`
    (fraction of blocks, the last ones, that get it); used elsewhere: `max_side`, `window` (pixels).
    """

    def __init__(self, clip_model, config):
        super().__init__()
        self.config = dict(config)
        self.dtype = torch.float32                           # of matrix products, see `autocast`
        self.clip = clip_model.requires_grad_(False)
        self.cell = clip_model.visual.patch_size // config["zoom"]       # a patch in picture pixels

        Dv, D = clip_model.visual.proj.shape
        levels = len(config["levels"])
        self.ecpl = ECPL(clip_model, levels=levels, context=config["context"])
        self.depths = Depths(Dv, D, levels)
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())
        self.bias = nn.Parameter(torch.zeros(()))
        # train.validate sets them; infer.localize subtracts them, so that 0.5 becomes the threshold
        self.register_buffer("map_shift", torch.zeros(()))
        self.register_buffer("score_shift", torch.zeros(()))

        rank = config["lora_rank"]
        if rank > 0:
            blocks = clip_model.visual.transformer.resblocks
            count = max(1, round(config["lora_share"] * len(blocks)))
            clip.add_lora(blocks[-count:], rank, alpha=2 * rank)

    def autocast(self):
        """The context in which matrix products use `self.dtype`."""
        enabled = self.dtype != torch.float32
        return torch.autocast(self.bias.device.type, self.dtype, enabled)

    def similarity(self, features, text):
        """Patch logits: features (B, N, D), text (B or 1, C, D) of unit length -> (B, N)."""
        features = F.normalize(features.float(), dim=-1)
        difference = text[:, 1:] - text[:, :1]                                 # (B or 1, 1, D)
        cosines = (features * difference).sum(dim=-1)                          # (B, N)
        scale = self.log_scale.clamp(0, math.log(100)).exp()                   # CLIP: at most 100
        return scale * cosines + self.bias

    def read(self, image):
        """image (B, 3, H, W) in [0, 1] -> levels [(B, N, Dv)], dense features (B, N, D) and edges
        (B, N) of its patches. Only LoRA trains here."""
        pixels = clip.normalize(image)
        zoom = self.config["zoom"]
        if zoom > 1:
            pixels = F.interpolate(pixels, scale_factor=zoom, mode="bilinear")  # (B, 3, z H, z W)
        levels, dense = self.clip.encode_patches(pixels, self.config["levels"])
        h, w = self.clip.visual.grid(pixels)
        return levels, dense, pool_edges(soft_edges(image), h, w)              # .., .., (B, N)

    def forward(self, image):
        """image (B, 3, H, W) in [0, 1], sides multiples of `cell` -> Output."""
        h = image.shape[2] // self.cell
        w = image.shape[3] // self.cell
        levels, dense, edges = self.read(image)          # [(B, N, Dv)], (B, N, D), (B, N)
        text = self.ecpl(self.clip, levels, edges, h, w)                       # (B, C, D)
        depths = self.depths(levels)                                           # [(B, N, D)]
        logits = self.similarity(dense + sum(depths), text.float())            # (B, N)
        score = pool_score(logits, self.config["rho"])                         # (B,)
        logits = logits.view(-1, h, w)                                         # (B, h, w)
        return Output(logits, score, text, depths, edges)
