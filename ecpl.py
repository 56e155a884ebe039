"""ECPL, edge-aware contextual prompt learning, and SAPL, the network built around it.

After SAPL (arXiv 2601.06222). We have read the paper's abstract and a short third-party digest of
it (from a Chinese-language list of arXiv summaries), nothing more. So each statement about the
method carries its source:
    [abstract]  features vary far more across a manipulated boundary than inside regions;
                edge-enhanced image features become, by attention, learnable text prompts; the mask
                comes from the image-text similarity map after processing
    [digest]    a soft edge map, a dual queue, LoRA
    [ours]      our own choice; this includes every equation and every number

Why prompts at all? CLIP compares a picture with sentences. A hand-written sentence describes what
a picture shows, but a forgery looks like any other picture; what gives it away are traces. CoOp
(Zhou et al. 2022) learns the words of the sentence instead of writing them, and CoCoOp (2022)
shifts these words with each picture. ECPL shifts them with features that are emphasised at edges,
because that is where manipulated regions betray themselves. Comparing every patch with the
sentences, as MaskCLIP does (Zhou et al. 2022), turns the classifier into a map. What ECPL brings
here was measured, and with splices it is nothing that can be told from noise (tests/README.md).

Reading order: edges -> ECPL -> SAPL -> a lesson (`python ecpl.py` shows each step).

Shapes: B images, N = h * w patches, D joint width, Dv image width, Dt text width, L text tokens,
M context tokens, C = 2 classes in the order (genuine, manipulated).
"""
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps

import clip

CLASSES = ("genuine", "manipulated")


# ----------------------------------------------------------------------------------------- edges

def sobel(x):
    """Gradient magnitude per channel, Sobel's kernels / 8: x (B, K, H, W) -> the same shape."""
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")                          # (B, K, H+2, W+2)
    # Sobel's (1, 2, 1) x (-1, 0, 1) is a 2 x 2 mean, then a sum along one axis and a difference
    # along the other
    means = F.avg_pool2d(padded, 2, stride=1)                                  # (B, K, H+1, W+1)
    gx = (means[:, :, :-1] + means[:, :, 1:]).diff(dim=3)                      # (B, K, H, W)
    gy = (means[..., :-1] + means[..., 1:]).diff(dim=2)                        # (B, K, H, W)
    return torch.hypot(gx, gy) / 2                                             # (B, K, H, W)


def soft_edges(image):
    """Soft edge map [digest]: image (B, 3, H, W) in [0, 1] -> (B, 1, H, W) in [0, 1).

    All edges of the picture, not only those of a manipulated region. Ours: g / (g + mean g), where
    g is the gradient of the luminance. Halving the brightness hardly changes it, and a constant
    picture has no edges.
    """
    weights = image.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)         # (1, 3, 1, 1)
    luminance = (image * weights).sum(dim=1, keepdim=True)                     # (B, 1, H, W)
    g = sobel(luminance)                                                       # (B, 1, H, W)
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
    """How much features change between neighbouring patches [abstract], measured by Sobel [ours]:
    (B, N, Dv) -> the same shape."""
    grid = features.transpose(1, 2).unflatten(2, (h, w))                       # (B, Dv, h, w)
    return sobel(grid).flatten(2).transpose(1, 2)                              # (B, N, Dv)


# ------------------------------------------------------------------------ ECPL: from edges to text

def projection(inner, outer):
    """LayerNorm and a linear map: (.., inner) -> (.., outer)."""
    return nn.Sequential(nn.LayerNorm(inner), nn.Linear(inner, outer, bias=False))


class ECPL(nn.Module):
    """Edge-enhanced image features become, by attention, prompts for the text tower [abstract].

        G   = sum over levels of W_l LayerNorm(F_l + e * dF_l)        edge-enhanced features [ours]
        P   = V + s * o(Attention(queries LayerNorm(V), keys and values G))                  [ours]
        t_c = unit(TextTower([start] P_c words_c [end]))

    F_l: patch features at level l; dF_l: their variation; e: soft edges per patch. V: M learned
    context tokens a class, as in CoOp. s: the standard deviation of the tower's word embeddings, so
    that o moves prompts in steps of a natural size. o starts at zero: training starts from P = V.

    levels: how many levels. context: M; raises ValueError if the text tower is too short for it.
    """

    def __init__(self, clip_model, *, levels, context):
        super().__init__()
        Dv = clip_model.visual.proj.shape[0]
        vocab_size, Dt = clip_model.token_embedding.weight.shape
        tokens = clip.tokenize(list(CLASSES), clip_model.context_length, vocab_size)    # (C, 77)
        length = int(tokens.argmax(dim=-1).max()) + 1    # of the longer class, with start and end
        if length + context > clip_model.context_length:
            raise ValueError(f"found {context} context tokens, expected at most "
                             f"{clip_model.context_length - length}: lower --context")
        self.register_buffer("tokens", tokens[:, :length], persistent=False)   # (C, words + 2)

        self.spread = clip_model.token_embedding.weight.detach().std().item()
        self.context = nn.Parameter(self.spread * torch.randn(len(CLASSES), context, Dt))
        self.projections = nn.ModuleList([projection(Dv, Dt) for _ in range(levels)])
        self.norm_query = nn.LayerNorm(Dt)
        self.attention = nn.MultiheadAttention(Dt, max(1, Dt // 64), batch_first=True)
        nn.init.zeros_(self.attention.out_proj.weight)

    def enhance(self, levels, edges, h, w):
        """Edge-enhanced features of each level: [(B, N, Dv)], edges (B, N) -> [(B, N, Dv)]."""
        e = edges[..., None].to(levels[0].dtype)                               # (B, N, 1)
        enhanced = []
        for x in levels:
            x = x.detach()                       # ours: prompts read the tower, do not train it
            enhanced.append(x + e * feature_variation(x, h, w))                # (B, N, Dv)
        return enhanced

    def prompts(self, enhanced):
        """[(B, N, Dv)] -> context tokens of both classes (B, C * M, Dt)."""
        G = sum(project(x) for project, x in zip(self.projections, enhanced))  # (B, N, Dt)
        V = self.context.flatten(0, 1).expand(len(G), -1, -1)                  # (B, C * M, Dt)
        Q = self.norm_query(V)                                                 # (B, C * M, Dt)
        read, _ = self.attention(Q, G, G, need_weights=False)                  # (B, C * M, Dt)
        return V + self.spread * read                    # CoCoOp's shift, read from the edges

    def encode(self, clip_model, prompts):
        """Context tokens (B, C * M, Dt) -> unit text features (B, C, D)."""
        C, M, Dt = self.context.shape
        B = len(prompts)
        prompts = prompts.view(B, C, M, Dt)                                    # (B, C, M, Dt)
        words = clip_model.token_embedding(self.tokens)                        # (C, words + 2, Dt)
        words = words.expand(B, -1, -1, -1)                                    # (B, C, .., Dt)
        start = words[:, :, :1]                                                # (B, C, 1, Dt)
        rest = words[:, :, 1:]                                                 # (B, C, .., Dt)
        sentence = torch.cat([start, prompts, rest], dim=2)                    # (B, C, L, Dt)

        end = self.tokens.argmax(dim=-1) + M                                   # (C,)
        end = end.repeat(B)                                                    # (B * C,)
        text = clip_model.encode_prompts(sentence.flatten(0, 1), end)          # (B * C, D)
        return F.normalize(text.view(B, C, -1), dim=-1)                        # (B, C, D)

    def forward(self, clip_model, levels, edges, h, w):
        """levels [(B, N, Dv)], edges (B, N) -> text features (B, C, D) of unit length."""
        enhanced = self.enhance(levels, edges, h, w)                           # [(B, N, Dv)]
        return self.encode(clip_model, self.prompts(enhanced))                 # (B, C, D)


# -------------------------------------------------------------------- SAPL: from pictures to a map

class Depths(nn.Module):
    """What each level adds to the features of the map: z_l = W_l gelu(U_l LayerNorm(F_l)) [ours].

    Traces (noise, blur, seams) fade with depth, so shallow levels join the last one. HECL
    contrasts each z_l separately. W starts small: the map starts as CLIP's own. The hidden layer,
    as wide as z_l, finds more than a linear map does (tests/README.md).
    """

    def __init__(self, Dv, D, levels):
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(levels):
            last = nn.Linear(D, D, bias=False)
            nn.init.normal_(last.weight, std=0.1 * D ** -0.5)
            self.layers.append(nn.Sequential(nn.LayerNorm(Dv), nn.Linear(Dv, D), nn.GELU(), last))

    def forward(self, levels):
        """[(B, N, Dv)] -> [(B, N, D)]."""
        return [layer(x) for layer, x in zip(self.layers, levels)]             # [(B, N, D)]


def pool_score(logits, rho):
    """Smooth top-k pooling: patch logits (B, N) -> image logit (B,) [ours].

    A mean weighted by how far each patch lies above the k-th largest, in units of the logits' own
    standard deviation, so the gradient also reaches the patches just below it. The weights carry
    no gradient. rho: k as a fraction of N.
    """
    k = max(1, round(rho * logits.shape[1]))
    fixed = logits.detach()                                                    # (B, N)
    kth_largest = fixed.topk(k, dim=1).values[:, -1:]                          # (B, 1)
    deviation = fixed.std(dim=1, correction=0, keepdim=True)                   # (B, 1)
    distance = (fixed - kth_largest) / (deviation + 1e-6)                      # (B, N)
    weight = torch.sigmoid(4 * distance)                                       # (B, N)
    return (weight * logits).sum(dim=1) / weight.sum(dim=1)                    # (B,)


def smooth(logits):
    """The mean over 3 x 3 patches: maps (B, h, w) -> the same shape.

    The mask comes from the similarity map after processing [abstract]; this processing is ours.
    """
    padded = F.pad(logits[:, None], (1, 1, 1, 1), mode="replicate")            # (B, 1, h+2, w+2)
    return F.avg_pool2d(padded, 3, stride=1)[:, 0]                             # (B, h, w)


class Output(NamedTuple):
    """What SAPL answers for a batch; `depths` and `edges` feed HECL in training."""
    logits: torch.Tensor         # (B, h, w) of "manipulated" against "genuine", one per patch
    score: torch.Tensor          # (B,) logit of the whole picture
    text: torch.Tensor           # (B, C, D) unit length
    depths: list                 # [(B, N, D)] what each level adds to the features of the map
    edges: torch.Tensor          # (B, N) soft edges in [0, 1)


class SAPL(nn.Module):
    """CLIP, edges, prompts, similarity: from pictures to a map of what is manipulated.

    config, a plain dict: `clip` (a name), `levels` (blocks of the image tower, from 1), `context`
    (M), `rho` (see pool_score), `zoom` (pictures are enlarged for the tower, because traces are
    finer than CLIP's patches [ours]), `lora_rank` (LoRA [digest]; 0: CLIP stays frozen),
    `lora_share` (fraction of the blocks with LoRA, the last ones); and for inference `max_side` and
    `window`, pixels.
    """

    def __init__(self, clip_model, config):
        super().__init__()
        self.config = dict(config)
        self.dtype = torch.float32                           # of matrix products, see `autocast`
        self.clip = clip_model.requires_grad_(False)
        Dv, D = clip_model.visual.proj.shape
        patch = clip_model.visual.patch_size
        zoom = config["zoom"]
        if zoom < 1 or patch % zoom:
            raise ValueError(f"found --zoom {zoom}, expected a divisor of the patch size, {patch}")
        self.cell = patch // zoom                            # a patch in pixels of the picture

        levels = len(config["levels"])
        self.ecpl = ECPL(clip_model, levels=levels, context=config["context"])
        self.depths = Depths(Dv, D, levels)
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())
        self.bias = nn.Parameter(torch.zeros(()))
        # subtracted from the logits, so that decisions are made at 0.5; set by train.calibrate
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
        features = F.normalize(features.float(), dim=-1)                       # (B, N, D)
        difference = text[:, 1:] - text[:, :1]                                 # (B or 1, 1, D)
        cosines = (features * difference).sum(dim=-1)                          # (B, N)
        scale = self.log_scale.clamp(0, np.log(100)).exp()           # bounded as in CLIP
        return scale * cosines + self.bias

    def read(self, image):
        """image (B, 3, H, W) in [0, 1] -> levels [(B, N, Dv)], dense features (B, N, D) and edges
        (B, N) of its patches. Without LoRA nothing here is trained."""
        pixels = clip.normalize(image)                                         # (B, 3, H, W)
        if self.config["zoom"] > 1:
            zoom = self.config["zoom"]
            pixels = F.interpolate(pixels, scale_factor=zoom, mode="bilinear")  # (B, 3, z H, z W)
        levels, dense = self.clip.encode_patches(pixels, self.config["levels"])
        h, w = self.clip.visual.grid(pixels)
        return levels, dense, pool_edges(soft_edges(image), h, w)

    def answer(self, levels, dense, edges, h, w):
        """What `read` gives for an (h, w) grid of patches -> Output."""
        # edges -> prompts -> text
        text = self.ecpl(self.clip, levels, edges, h, w)                       # (B, C, D)
        # similarity -> map -> score
        depths = self.depths(levels)                                           # [(B, N, D)]
        logits = self.similarity(dense + sum(depths), text.float())            # (B, N)
        score = pool_score(logits, self.config["rho"])                         # (B,)
        return Output(logits.view(-1, h, w), score, text, depths, edges)       # logits (B, h, w)

    def forward(self, image):
        """image (B, 3, H, W) in [0, 1], sides multiples of `cell` -> Output."""
        _, _, H, W = image.shape
        return self.answer(*self.read(image), H // self.cell, W // self.cell)


def demo(out="out/method.png"):
    """Show every step on tests/forged.png, in numbers and as one row of pictures."""
    picture = Image.open(Path(__file__).with_name("tests") / "forged.png")
    picture = picture.crop((100, 0, 356, 256))                                 # a window of it
    image = torch.from_numpy(np.array(picture)) / 255                          # (H, W, 3)
    image = image.permute(2, 0, 1)[None]                                       # (1, 3, H, W)
    state = torch.load(clip.TINY, weights_only=True)
    model = SAPL(clip.build(state["clip"]), state["config"]).eval()
    model.load_state_dict(state["model"], strict=False)                        # CLIP is in it
    with torch.no_grad():
        output = model(image)
        levels, _ = model.clip.encode_patches(clip.normalize(image), model.config["levels"])
    h, w = output.logits.shape[-2:]
    edge = soft_edges(image)                                                   # (1, 1, H, W)
    variation = feature_variation(levels[-1], h, w).mean(dim=-1)               # (1, N)
    variation = variation.view(1, h, w) / variation.max()                      # (1, h, w)
    relative = output.logits - output.logits.mean()                            # (1, h, w)
    answer = smooth(relative) - model.map_shift                                # (1, h, w)

    print(f"image {tuple(image.shape)}, soft edges {tuple(edge.shape)} up to {edge.max():.2f}")
    print(f"{len(levels)} levels {tuple(levels[-1].shape)}; the quarter of the patches where the "
          "last level varies most:")
    coarse = F.max_pool2d(variation, 2)[0]                                     # (h / 2, w / 2)
    outline = coarse > coarse.quantile(0.75)                                   # (h / 2, w / 2)
    for row in outline:
        print("   ", "".join("##" if strong else " ." for strong in row))
    print(f"text features {tuple(output.text.shape)}, one per class, from this picture's prompts")
    print(f"map {tuple(answer.shape)}, {(answer > 0).float().mean():.0%} of it above 0.5")

    panels = [picture]
    for grey in (edge[0, 0], variation[0], answer[0].sigmoid(), answer[0] > 0):
        grey = (255 * grey).byte().numpy()
        panels.append(Image.fromarray(grey).resize(picture.size))
    framed = [ImageOps.expand(panel.convert("RGB"), 4, "white") for panel in panels]
    Path(out).parent.mkdir(exist_ok=True)
    Image.fromarray(np.hstack(framed)).save(out)                               # (H, 5 W, 3)
    print(f"picture, soft edges, feature variation, map, mask: {out}")


if __name__ == "__main__":
    demo()
