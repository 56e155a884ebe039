"""ECPL, edge-aware contextual prompt learning, and SAPL, the network that it is the heart of.

After SAPL (arXiv 2601.06222). Nobody here has read more of the paper than its abstract and a
third party's digest, so every statement about the method carries its source in brackets:
    [abstract]  the paper's own abstract: features vary far more across a manipulated boundary than
                inside regions; edge-enhanced image features become, by attention, learnable text
                prompts; the mask comes from the image-text similarity map after processing
    [digest]    a digest of the paper: a soft edge map, a dual queue, LoRA
    [ours]      our choice, every equation and number among them

Reading order: edges -> ECPL -> SAPL -> files. `python ecpl.py` shows each step.

Shapes: B images, N = h * w patches, D joint width, Dv image width, Dt text width, L text tokens,
M context tokens, C = 2 classes in the order (genuine, manipulated).
"""
import io
import math
import os
import shutil
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
    """Gradient magnitude per channel, Sobel's kernel / 8: x (B, K, H, W) -> the same shape."""
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")                          # (B, K, H+2, W+2)
    # sums of two, twice, weigh by 1, 2, 1; a sum and a difference weigh by -1, 0, 1
    pairs = clip.sums(padded)                                                  # (B, K, H+1, W+1)
    gx = (pairs[:, :, :-1] + pairs[:, :, 1:]).diff(dim=3)                      # (B, K, H, W)
    gy = (pairs[..., :-1] + pairs[..., 1:]).diff(dim=2)                        # (B, K, H, W)
    return torch.hypot(gx, gy) / 8                                             # (B, K, H, W)


def soft_edges(image):
    """Soft edge map [digest]: image (B, 3, H, W) in [0, 1] -> (B, 1, H, W) in [0, 1).

    Ours: g / (g + mean g) of the luminance's gradient g. A picture twice as dark has nearly the
    same edges, a constant one has none.
    """
    weights = image.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)         # (1, 3, 1, 1)
    luminance = (image * weights).sum(dim=1, keepdim=True)                     # (B, 1, H, W)
    g = sobel(luminance)                                                       # (B, 1, H, W)
    typical = g.mean(dim=(2, 3), keepdim=True)                                 # (B, 1, 1, 1)
    # ours: 1e-3, a quarter of an 8-bit step, so that an almost flat picture keeps weak edges
    return g / (g + typical + 1e-3)


def pool_edges(edge, h, w):
    """Edge strength per patch, the mean of its strongest quarter [ours]: (B, 1, H, W) -> (B, N)."""
    H, W = edge.shape[-2:]
    cell = (H // h, W // w)
    cells = F.unfold(edge, cell, stride=cell)                                  # (B, area, N)
    quarter = max(1, cells.shape[1] // 4)
    return cells.topk(quarter, dim=1).values.mean(dim=1)                       # (B, N)


def feature_variation(features, h, w):
    """How features differ between neighbours [abstract], by Sobel [ours]: (B, N, Dv) -> same."""
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

    F_l: patch features at level l, dF_l: their variation, e: soft edges per patch. V: M learned
    context tokens a class. s: the spread of the tower's word embeddings, so that o moves prompts in
    steps of their own size; o starts at zero, so training starts from P = V [ours].

    What it brings (tests/README.md), best F1 on synthetic pictures: with a CLIP whose pretraining
    named genuine and manipulated parts +0.006, with one that heard only the kind of manipulation
    +0.021, with one that knew sources and histories alone -0.005 (with LoRA +0.002). Edges add
    nothing. With the shipped model's CLIP +0.009, and 0.023 of the image AUC.

    levels: how many. context: M; ValueError if the text tower is too short for it.
    """

    def __init__(self, clip_model, *, levels, context):
        super().__init__()
        Dv = clip_model.visual.proj.shape[0]
        vocab_size, Dt = clip_model.token_embedding.weight.shape
        tokens = clip.tokenize(list(CLASSES), clip_model.context_length, vocab_size)    # (C, 77)
        length = int(tokens.argmax(dim=-1).max()) + 1    # of the longest class, with both ends
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
        return V + self.spread * read

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
    """What each level adds to the features of the map: z_l = W_l LayerNorm(F_l) [ours].

    Traces (noise, blur, seams) fade with depth, so shallower levels join the last one. HECL
    contrasts each z_l by itself. W starts small: the map starts as CLIP's. Their sum enters it at a
    tenth (`share`): learning faster, they fit the training's manipulations and miss others.
    """

    share = 0.1

    def __init__(self, Dv, D, levels):
        super().__init__()
        self.projections = nn.ModuleList([projection(Dv, D) for _ in range(levels)])
        for project in self.projections:
            nn.init.normal_(project[1].weight, std=0.1 * Dv ** -0.5)

    def forward(self, levels):
        """[(B, N, Dv)] -> [(B, N, D)]."""
        return [project(x) for project, x in zip(self.projections, levels)]    # [(B, N, D)]


def pool_score(logits, rho):
    """Smooth top-k pooling: patch logits (B, N) -> image logit (B,) [ours].

    A mean weighted by how far each patch lies above the k-th largest, so the gradient also reaches
    the patches just below; the weights themselves carry none. rho: k as a share of N.
    """
    k = max(1, round(rho * logits.shape[1]))
    fixed = logits.detach()                                                    # (B, N)
    kth_largest = fixed.topk(k, dim=1).values[:, -1:]                          # (B, 1)
    weight = torch.sigmoid(4 * (fixed - kth_largest))                          # (B, N)
    return (weight * logits).sum(dim=1) / weight.sum(dim=1)                    # (B,)


class Output(NamedTuple):
    """What SAPL answers for a batch; `depths` and `edges` feed HECL in training."""
    logits: torch.Tensor         # (B, h, w) of "manipulated" against "genuine", one a patch
    score: torch.Tensor          # (B,) logit of the whole picture
    text: torch.Tensor           # (B, C, D) unit length
    depths: list                 # [(B, N, D)] what each level adds to the features of the map
    edges: torch.Tensor          # (B, N) soft edges in [0, 1)


class SAPL(nn.Module):
    """CLIP, edges, prompts, similarity: pictures to a map of what is manipulated.

    config, a plain dict: `clip` (a name), `levels` (blocks of the image tower, from 1), `context`
    (M), `rho` (see pool_score), `zoom` (pictures are enlarged, as traces are finer than CLIP's
    patches [ours]), `lora_rank` (LoRA [digest]; 0, our default: CLIP stays as it is), `lora_share`
    (of the last blocks); for inference `max_side`, `window`, pixels.
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
        # train.calibrate: taken from the logits, so that decisions are made at a probability of 0.5
        self.register_buffer("map_shift", torch.zeros(()))
        self.register_buffer("score_shift", torch.zeros(()))

        rank = config["lora_rank"]
        if rank > 0:
            blocks = clip_model.visual.transformer.resblocks
            count = max(1, round(config["lora_share"] * len(blocks)))
            clip.add_lora(blocks[-count:], rank, alpha=2 * rank)

    def autocast(self):
        """The context in which matrices are multiplied as numbers of `self.dtype`."""
        enabled = self.dtype != torch.float32
        return torch.autocast(self.bias.device.type, self.dtype, enabled)

    def similarity(self, features, text):
        """Patch logits: features (B, N, D), text (B or 1, C, D) of unit length -> (B, N)."""
        features = F.normalize(features.float(), dim=-1)                       # (B, N, D)
        difference = text[:, 1:] - text[:, :1]                                 # (B or 1, 1, D)
        cosines = (features * difference).sum(dim=-1)                          # (B, N)
        scale = self.log_scale.clamp(0, math.log(100)).exp()           # as CLIP bounds it
        return scale * cosines + self.bias

    def forward(self, image):
        """image (B, 3, H, W) in [0, 1], sides multiples of `cell` -> Output."""
        pixels = clip.normalize(image)                                         # (B, 3, H, W)
        if self.config["zoom"] > 1:
            zoom = self.config["zoom"]
            pixels = F.interpolate(pixels, scale_factor=zoom, mode="bilinear")  # (B, 3, z H, z W)
        h, w = self.clip.visual.grid(pixels)

        # towers: levels [(B, N, Dv)], dense (B, N, D)
        levels, dense = self.clip.encode_patches(pixels, self.config["levels"])
        # edges -> prompts -> text
        edges = pool_edges(soft_edges(image), h, w)                            # (B, N)
        text = self.ecpl(self.clip, levels, edges, h, w)                       # (B, C, D)
        # similarity -> map -> score
        depths = self.depths(levels)                                           # [(B, N, D)]
        features = dense + self.depths.share * sum(depths)                     # (B, N, D)
        logits = self.similarity(features, text.float())                       # (B, N)
        score = pool_score(logits, self.config["rho"])                         # (B,)
        map = logits.view(-1, h, w)                                            # (B, h, w)
        return Output(map, score, text, depths, edges)

    @classmethod
    def load(cls, path=None, device="auto", precision="auto"):
        """The model of a checkpoint (None: the shipped one), in eval mode.

        precision: "auto" (bf16 where the hardware multiplies it), "bf16" or "fp32". Raises OSError
        or ValueError of one line.
        """
        path = path or clip.TINY
        device = pick_device(device)
        state = load_checkpoint(path)
        try:
            stored = state["clip"]
            tower = clip.load(stored["name"]) if "name" in stored else clip.build(stored)
            tower.name = state["config"]["clip"]
            tower.sha256 = stored.get("sha256", "")
            model = cls(tower, state["config"])
            # CLIP's weights are in it already, all others must be in the file
            backbone = {key: x for key, x in model.state_dict().items() if is_backbone(key)}
            model.load_state_dict(backbone | state["model"])
        except (RuntimeError, LookupError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"found {path}, which does not fit this version ({reason}), expected "
                             "a checkpoint of its train.py: train it again") from error
        model.dtype = pick_dtype(precision, device)
        return model.to(device).eval()


def smooth(logits):
    """The mean over 3 x 3 patches: map (B, h, w) -> the same.

    The mask comes from the similarity map after processing [abstract]; the form is ours. Masks are
    about as good without it, and no better with more (weights/README.md).
    """
    padded = F.pad(logits[:, None], (1, 1, 1, 1), mode="replicate")            # (B, 1, h+2, w+2)
    return F.avg_pool2d(padded, 3, stride=1)[:, 0]                             # (B, h, w)


# ----------------------------------------------------------------------------------------- files

FORMAT = 4


def is_backbone(key):
    """Whether a key of SAPL's state dict is a weight of CLIP itself, not of ECPL or LoRA."""
    return key.startswith("clip.") and ".lora." not in key


def save_checkpoint(path, model, **state):
    """Write SAPL and `state` (tensors and plain types) so that no interruption breaks the file.

    The file before is kept as `<path>.previous`; an official CLIP is stored by name and hash.
    """
    own = {}
    backbone = {}
    for key, value in model.state_dict().items():
        if is_backbone(key):
            backbone[key.removeprefix("clip.")] = value.cpu()                  # OpenAI's names
        else:
            own[key] = value.cpu()
    if model.clip.name in clip.OFFICIAL:
        backbone = {"name": model.clip.name, "sha256": model.clip.sha256}

    content = {"format": FORMAT, "config": model.config, "clip": backbone, "model": own, **state}
    buffer = io.BytesIO()
    torch.save(content, buffer)

    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copyfile(path, path.with_name(path.name + ".previous"))
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(f"cannot write {path} ({error.strerror}), what was there is kept: make room, "
                      "go on with --resume") from error


def load_checkpoint(path):
    """The dict of a file of `save_checkpoint`, on the CPU; ValueError of one line."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = state["format"]
    except Exception as error:                           # damage has many faces
        raise ValueError(f"found {path}, which is no checkpoint of SAPL ({type(error).__name__}), "
                         "expected a file that train.py wrote: name its best.pt, or put back its "
                         "copy ending in .previous") from error
    if found != FORMAT:
        raise ValueError(f"found {path} in format {found}, expected format {FORMAT}: it is of "
                         "another version, train it again")
    return state


def pick_device(name):
    """"auto", "cpu", "cuda", "cuda:1", "mps", or a torch.device -> torch.device; ValueError if it
    is not there."""
    there = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        there.append("mps")
    there.append("cpu")
    full_names = {"auto": there[0], "cuda": "cuda:0"}
    name = full_names.get(str(name), str(name))
    if name not in there:
        raise ValueError(f"found --device {name}, expected one of auto, {', '.join(there)}")
    return torch.device(name)


def pick_dtype(precision, device):
    """"auto", "bf16" or "fp32" -> the torch.dtype of matrix products on a torch.device. auto: bf16
    where the hardware multiplies it (AMX or AVX512-BF16; NVIDIA from Ampere on)."""
    native = False
    if device.type == "cpu":
        native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    short = native if precision == "auto" else precision == "bf16"
    return torch.bfloat16 if short else torch.float32


def demo(out="out/method.png"):
    """Every step on tests/forged.png, in numbers and as one row of pictures."""
    picture = Image.open(Path(__file__).with_name("tests") / "forged.png")
    picture = picture.crop((100, 0, 356, 256))                                 # a window of it
    image = torch.from_numpy(np.array(picture)) / 255                          # (H, W, 3)
    image = image.permute(2, 0, 1)[None]                                       # (1, 3, H, W)
    model = SAPL.load(device="cpu")
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
    print(f"{len(levels)} levels {tuple(levels[-1].shape)}; the quarter where the last varies "
          "most, the outlines:")
    coarse = F.max_pool2d(variation, 2)[0]                                     # (h / 2, w / 2)
    outline = coarse > coarse.quantile(0.75)                                   # (h / 2, w / 2)
    for row in outline:
        print("   ", "".join("##" if strong else " ." for strong in row))
    print(f"text features {tuple(output.text.shape)}, one a class, of this picture's prompts")
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
