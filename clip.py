"""CLIP from scratch: two towers that put pictures and sentences into one space.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021). The
parameters have OpenAI's names, so that their official weights load as they are.
Reading order: tokenizer -> towers, LoRA -> files of weights -> a lesson (`python clip.py`).

Shapes: B images, N = h * w patches, D joint width, Dv image width, Dt text width, L tokens.
"""
import gzip
import hashlib
import html
import http.client
import math
import os
import pickle
import socket
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import ftfy
import numpy as np
import regex
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

MEAN = (0.48145466, 0.4578275, 0.40821073)   # of OpenAI's training pictures, RGB
STD = (0.26862954, 0.26130258, 0.27577711)
MODELS = "https://openaipublic.azureedge.net/clip/models"
OFFICIAL = {                                 # SHA-256 of <name with dashes>.pt
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "ViT-L/14@336px": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
}
VOCABULARY = "https://raw.githubusercontent.com/openai/CLIP/main/clip/bpe_simple_vocab_16e6.txt.gz"
VOCABULARY_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
TINY = Path(__file__).with_name("weights") / "tiny.pt"


def normalize(image):
    """CLIP's input normalisation. image (B, 3, H, W) in [0, 1] -> pixels (B, 3, H, W)."""
    mean = image.new_tensor(MEAN).view(3, 1, 1)                                # (3, 1, 1)
    std = image.new_tensor(STD).view(3, 1, 1)                                  # (3, 1, 1)
    return (image - mean) / std


# ------------------------------------------------------------------------------------- tokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
WORD = regex.compile(r"<\|startoftext\|>|<\|endoftext\|>|'(?:s|t|re|ve|m|ll|d)"
                     r"|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)


class Tokenizer:
    """Byte-pair encoding (Sennrich et al. 2016) of the UTF-8 bytes of lower-case text.

    Ids, in this order: 256 bytes, the same 256 where they end a word ("a</w>"), merges of two
    symbols, start, end. Only merges need the vocabulary file (OSError if it cannot be had).
    """

    def __init__(self, vocab_size):
        merges = []                                      # pairs of symbols, first learned first
        if vocab_size > 514:
            content = fetch(VOCABULARY, VOCABULARY_SHA256).read_bytes()
            lines = gzip.decompress(content).decode().split("\n")
            merges = [tuple(line.split()) for line in lines[1:vocab_size - 513]]

        # Each byte is shown as one letter; bytes without a visible one get chr(256), chr(257), ..
        visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
        hidden = [byte for byte in range(256) if byte not in visible]
        letters = [chr(byte) for byte in visible]
        letters += [chr(256 + i) for i in range(len(hidden))]
        self.letters = dict(zip(visible + hidden, letters))

        symbols = letters + [letter + "</w>" for letter in letters]
        symbols += ["".join(pair) for pair in merges]
        symbols += [START, END]
        self.ids = {symbol: i for i, symbol in enumerate(symbols)}
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}

    def split(self, word):
        """The symbols of a word: of all neighbours that can merge, those learned first, again."""
        if word in (START, END):
            return [word]
        symbols = [self.letters[byte] for byte in word.encode()]
        symbols[-1] += "</w>"

        while True:
            ranks = [self.ranks.get(pair, math.inf) for pair in zip(symbols, symbols[1:])]
            first = min(ranks, default=math.inf)
            if first == math.inf:
                return symbols
            i = ranks.index(first)
            symbols[i:i + 2] = [symbols[i] + symbols[i + 1]]

    def pieces(self, text):
        """The symbols of any text; mojibake and HTML entities are repaired first."""
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
        symbols = [START]
        for word in WORD.findall(text.strip().lower()):
            symbols += self.split(word)
        return symbols + [END]


def tokenize(texts, context_length=77, vocab_size=49408):
    """A text or a list of B texts -> OpenAI's token ids (B, context_length), zeros at the end.

    Raises ValueError for too long a text.
    """
    if isinstance(texts, str):
        texts = [texts]
    tokenizer = Tokenizer(vocab_size)
    tokens = torch.zeros(len(texts), context_length, dtype=torch.long)         # (B, L)

    for row, text in zip(tokens, texts):
        ids = [tokenizer.ids[symbol] for symbol in tokenizer.pieces(text)]
        if len(ids) > context_length:
            raise ValueError(f"found {len(ids)} tokens, expected {context_length} at most: "
                             f"shorten {text!r:.60}")
        row[:len(ids)] = torch.tensor(ids)
    return tokens


# ------------------------------------------------------------------------------ towers, and LoRA

class LoRA(nn.Module):
    """A trainable change of low rank beside a frozen linear map: alpha / rank * B A x (Hu et al.
    2021). Added to the weight itself, that would need a gradient of full size."""

    def __init__(self, weight, rank, alpha):
        super().__init__()
        rows, columns = weight.shape
        self.scale = alpha / rank
        self.A = nn.Parameter(weight.new_empty(rank, columns).normal_(std=rank ** -0.5))
        self.B = nn.Parameter(weight.new_zeros(rows, rank))                    # no change at first

    def forward(self, x):
        return self.scale * F.linear(F.linear(x, self.A), self.B)              # (.., rows)


def attend(q, k, v, causal):
    """Scaled dot-product attention: q, k, v (B, heads, L, d) -> (B, heads, L, d)."""
    # On a CPU the fused form's backward pass in bfloat16 is 2 to 6 times slower than two products.
    plain = q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad
    if not plain:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)                     # (B, heads, L, L)
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)       # (L, L)
        scores = scores.masked_fill(future, -math.inf)
    return scores.softmax(dim=-1) @ v                                          # (B, heads, L, d)


class Attention(nn.Module):
    """Multi-head self-attention with the parameter names of `nn.MultiheadAttention`."""

    def __init__(self, width, causal):
        super().__init__()
        self.heads = max(1, width // 64)
        self.causal = causal
        self.in_proj_weight = nn.Parameter(width ** -0.5 * torch.randn(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        self.lora = None                                 # beside in_proj, see `add_lora`

    def forward(self, x):
        """x (B, L, D) -> (B, L, D)."""
        B, L, D = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)              # (B, L, 3D)
        if self.lora is not None:
            qkv = qkv + self.lora(x)
        qkv = qkv.view(B, L, 3, self.heads, D // self.heads)                   # (B, L, 3, heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).contiguous()                      # (B, heads, L, d)

        heads = attend(q, k, v, self.causal)                                   # (B, heads, L, d)
        return self.out_proj(heads.transpose(1, 2).reshape(B, L, D))           # (B, L, D)


class MLP(nn.Module):
    """Two linear maps with OpenAI's cheap GELU between: h * sigmoid(1.702 h)."""

    def __init__(self, width):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x):
        """x (B, L, D) -> (B, L, D)."""
        # The same as silu(1.702 h) / 1.702; both factors go into the weights, which are small.
        fc, proj = self.c_fc, self.c_proj
        hidden = F.silu(F.linear(x, 1.702 * fc.weight, 1.702 * fc.bias))       # (B, L, 4D)
        return F.linear(hidden, proj.weight / 1.702, proj.bias)                # (B, L, D)


class ResidualAttentionBlock(nn.Module):
    """Attention, then the perceptron, each on normalised input and added back."""

    def __init__(self, width, causal):
        super().__init__()
        self.attn = Attention(width, causal)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = MLP(width)
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Sequential):
    """Blocks one after the other: x (B, L, D) -> (B, L, D)."""

    def __init__(self, width, layers, causal=False):
        blocks = [ResidualAttentionBlock(width, causal) for _ in range(layers)]
        super().__init__(OrderedDict(resblocks=nn.Sequential(*blocks)))


def sums(x):
    """Sums of 2 x 2 neighbours: (.., H, W) -> (.., H - 1, W - 1)."""
    x = x[..., :-1, :] + x[..., 1:, :]                                         # (.., H - 1, W)
    return x[..., :-1] + x[..., 1:]                                            # (.., H - 1, W - 1)


class Stem(nn.Sequential):
    """Ours, in the shipped tiny model alone: stride-2 convolutions on what a small blur takes away.

    Regions from elsewhere differ in noise and compression, which a linear patch embedding hardly
    sees. Added to it, from zero at first.
    """

    def __init__(self, channels, width):
        layers = [nn.Conv2d(3, channels[0], 5, stride=2, padding=2)]
        for inner, outer in zip(channels, [*channels[1:], width]):
            layers += [nn.GELU(), nn.Conv2d(inner, outer, 3, stride=2, padding=1)]
        super().__init__(*layers)
        nn.init.zeros_(self[-1].weight)
        nn.init.zeros_(self[-1].bias)

    def forward(self, pixels):
        """pixels (B, 3, H, W) -> (B, Dv, h, w), patches of 2^n pixels for n convolutions."""
        # Sums, not a convolution: autocast would round that to bfloat16, coarser than a grey level.
        padded = F.pad(pixels, (1, 1, 1, 1), mode="replicate")                 # (B, 3, H+2, W+2)
        blurred = sums(sums(padded)) / 16        # (B, 3, H, W), weighed by 1, 2, 1 both ways
        residual = (8 * (pixels - blurred)).tanh()   # ours: 8, so that noise counts, edges saturate
        residual = residual.contiguous(memory_format=torch.channels_last)      # convolves faster
        return super().forward(residual)                                       # (B, Dv, h, w)


class VisionTransformer(nn.Module):
    """The image tower. Any input whose sides are multiples of `patch_size` (in pixels)."""

    def __init__(self, resolution, patch_size, width, layers, embed_dim, stem):
        super().__init__()
        tokens = (resolution // patch_size) ** 2 + 1
        self.patch_size = patch_size
        scale = width ** -0.5
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.stem = Stem(stem, width) if stem else None
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(tokens, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, embed_dim))

    def grid(self, pixels):
        """(h, w), rows and columns of patches, of pixels (B, 3, H, W), or ValueError."""
        p = self.patch_size
        H, W = pixels.shape[-2:]
        if min(H, W) < p or H % p or W % p:
            raise ValueError(f"found an image of {H}x{W} pixels, expected multiples of {p}: "
                             "resize it")
        return H // p, W // p

    def positions(self, h, w):
        """The position embedding for an (h, w) grid: (1, 1 + N, Dv)."""
        own = self.positional_embedding                                        # (1 + side^2, Dv)
        side = math.isqrt(len(own))
        grid = own[1:].T.reshape(1, -1, side, side)                            # (1, Dv, side, side)
        grid = F.interpolate(grid, (h, w), mode="bicubic", antialias=True)     # (1, Dv, h, w)
        return torch.cat([own[:1], grid.flatten(2)[0].T])[None]                # (1, 1 + N, Dv)

    def embed(self, pixels):
        """pixels (B, 3, H, W) -> tokens before the first block (B, 1 + N, Dv), class first."""
        h, w = self.grid(pixels)
        x = self.conv1(pixels)                                                 # (B, Dv, h, w)
        if self.stem is not None:
            x = x + self.stem(pixels)
        x = x.flatten(2).transpose(1, 2)                                       # (B, N, Dv)
        first = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)         # (B, 1, Dv)
        x = torch.cat([first, x], dim=1)                                       # (B, 1 + N, Dv)
        # Under autocast the convolution's answer is half as long a number: the blocks stay at it.
        return self.ln_pre(x + self.positions(h, w).to(x.dtype)).to(x.dtype)

    def forward(self, pixels):
        """pixels (B, 3, H, W) -> image features (B, D)."""
        x = self.transformer(self.embed(pixels))                               # (B, 1 + N, Dv)
        return self.ln_post(x[:, 0]) @ self.proj                               # (B, D)


class CLIP(nn.Module):
    """Both towers. Sizes as in OpenAI's configuration; `stem` is ours (see Stem)."""

    def __init__(self, *, embed_dim, image_resolution, vision_layers, vision_width,
                 vision_patch_size, context_length, vocab_size, transformer_width,
                 transformer_layers, stem=()):
        super().__init__()
        width = transformer_width
        self.context_length = context_length
        self.visual = VisionTransformer(image_resolution, vision_patch_size, vision_width,
                                        vision_layers, embed_dim, stem)
        self.transformer = Transformer(width, transformer_layers, causal=True)
        self.token_embedding = nn.Embedding(vocab_size, width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(context_length, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(width ** -0.5 * torch.randn(width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_image(self, pixels):
        """pixels (B, 3, H, W) -> image features (B, D), not normalised."""
        return self.visual(pixels)

    def encode_patches(self, pixels, levels=()):
        """pixels (B, 3, H, W) -> patch tokens after the blocks `levels` (from 1), [(B, N, Dv)], and
        dense features (B, N, D): what CLIP makes of its class token, made of every patch."""
        tokens = [self.visual.embed(pixels)]                                   # [(B, 1 + N, Dv)]
        for block in self.visual.transformer.resblocks:
            tokens.append(block(tokens[-1]))
        features = self.visual.ln_post(tokens[-1][:, 1:]) @ self.visual.proj   # (B, N, D)
        return [tokens[level][:, 1:] for level in levels], features            # [(B, N, Dv)], ..

    def encode_prompts(self, embeddings, end):
        """Prompt embeddings (B, L, Dt) of any length -> text features (B, D), not normalised.

        end: (B,) or int, the place of the end token; what follows it changes nothing (causal).
        """
        positions = self.positional_embedding[:embeddings.shape[1]]            # (L, Dt)
        x = self.transformer(embeddings + positions)                           # (B, L, Dt)
        x = x[torch.arange(len(x), device=x.device), end]                      # (B, Dt)
        return self.ln_final(x) @ self.text_projection                         # (B, D)

    def encode_text(self, tokens):
        """Token ids (B, L) -> text features (B, D), not normalised."""
        end = tokens.argmax(dim=-1)                      # the end token has the highest id of all
        return self.encode_prompts(self.token_embedding(tokens), end)

    def forward(self, pixels, tokens):
        """Cosines times the temperature: (logits per image (B, T), logits per text (T, B))."""
        image = F.normalize(self.encode_image(pixels), dim=-1)                 # (B, D)
        text = F.normalize(self.encode_text(tokens), dim=-1)                   # (T, D)
        logits = self.logit_scale.exp() * image @ text.T                       # (B, T)
        return logits, logits.T                                                # (B, T), (T, B)


def add_lora(model, rank, alpha):
    """Freeze a module; LoRA for the queries, keys and values of each attention in it, with one A
    for all three [ours]."""
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, Attention):
            module.lora = LoRA(module.in_proj_weight.detach(), rank, alpha)


@torch.no_grad()
def merge_lora(model):
    """Add the changes to the weights: the same outputs, the keys of a model without LoRA."""
    for module in model.modules():
        if isinstance(module, Attention) and module.lora is not None:
            module.in_proj_weight += module.lora.scale * module.lora.B @ module.lora.A
            module.lora = None


# ------------------------------------------------------------------------------ files of weights

def sizes_of(shapes):
    """{key: shape} of a state dict -> the arguments of `CLIP`."""
    stem = [shape[0] for key, shape in shapes.items()
            if key.startswith("visual.stem.") and key.endswith(".weight")]
    blocks = [key for key in shapes if key.endswith(".ln_1.weight")]
    vision_layers = len([key for key in blocks if key.startswith("visual.")])
    tokens, vision_width = shapes["visual.positional_embedding"]
    patch = shapes["visual.conv1.weight"][-1]
    vocab_size, transformer_width = shapes["token_embedding.weight"]
    return dict(
        embed_dim=shapes["text_projection"][1],
        image_resolution=math.isqrt(tokens - 1) * patch,           # one token is the class
        vision_layers=vision_layers, vision_width=vision_width, vision_patch_size=patch,
        context_length=shapes["positional_embedding"][0], vocab_size=vocab_size,
        transformer_width=transformer_width, transformer_layers=len(blocks) - vision_layers,
        stem=stem[:-1])                                            # the last makes Dv


def build(state_dict, device="cpu"):
    """A CLIP with these weights (OpenAI's keys), sizes inferred from them, fp32, in eval mode.

    Raises ValueError, one line: a ResNet, missing, surplus or misshapen weights, NaN or infinity.
    """
    # OpenAI's archives also hold three whole numbers, notes of no use
    weights = {key: x for key, x in state_dict.items() if x.is_floating_point()}
    shapes = {key: tuple(x.shape) for key, x in weights.items()}
    try:
        with torch.device("meta"):                                 # shapes alone, no memory
            model = CLIP(**sizes_of(shapes))
        model.to_empty(device=device).load_state_dict(weights)
    except (LookupError, ValueError, ArithmeticError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"found no CLIP with patches, but perhaps a ResNet ({reason}), expected "
                         "the weights of a Vision Transformer: name another file") from error

    for key, weight in model.state_dict().items():
        if not weight.isfinite().all():
            raise ValueError(f"damaged weights: NaN or infinity in {key}")
    return model.eval()


KNOWN = {f"torch.{name}Storage": getattr(torch, name.lower())
         for name in ("Half", "BFloat16", "Float", "Double", "Long", "Int", "Bool")}
KNOWN |= {"torch.ByteStorage": torch.uint8, "collections.OrderedDict": OrderedDict,
          "torch._utils._rebuild_tensor_v2":
          lambda numbers, offset, shape, stride, *_: numbers.as_strided(shape, stride, offset)}


class Unpickler(pickle.Unpickler):
    """Reads tensors, dictionaries and modules of an open zip; any other name is an error."""

    def __init__(self, archive, index):
        super().__init__(archive.open(index))
        self.archive = archive
        self.folder = index.removesuffix("data.pkl") + "data/"
        self.storages = {}                               # tensors may share one

    def persistent_load(self, storage):
        _, dtype, key, *_ = storage
        if key not in self.storages:
            content = bytearray(self.archive.read(self.folder + key))
            # empty tensors have no bytes, which frombuffer refuses
            content = content or bytearray(8)
            self.storages[key] = torch.frombuffer(content, dtype=dtype)        # (length,)
        return self.storages[key]

    def find_class(self, module, name):
        if module.partition(".")[0] == "__torch__":
            return OrderedDict                           # a module keeps its attributes in vars()
        if f"{module}.{name}" not in KNOWN:
            raise ValueError(f"it asks for {module}.{name}, expected only tensors")
        return KNOWN[f"{module}.{name}"]


def find_tensors(node, name, seen):
    """{dotted name: tensor} of what dictionaries and modules hold, each of them seen once."""
    if isinstance(node, torch.Tensor):
        return {name: node}
    if not isinstance(node, dict) or id(node) in seen:
        return {}
    seen.add(id(node))                                   # a dictionary may hold itself
    found = {}
    for key, child in (dict(node) | getattr(node, "__dict__", {})).items():
        found |= find_tensors(child, f"{name}.{key}".removeprefix("."), seen)
    return found


def read_archive(path):
    """{name: tensor} of a file of `torch.jit.save` or `torch.save`, without running its code.

    The file is a zip: data.pkl describes the tensors, data/0, data/1, .. hold their numbers. Of a
    checkpoint of SAPL only the CLIP is returned. Raises ValueError, one line, for anything else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            # an error unless there is exactly one
            [index] = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            found = find_tensors(Unpickler(archive, index).load(), "", set())
    except Exception as error:                           # damage has many faces
        raise ValueError(f"no readable archive of weights: {error}") from error
    own = {name.removeprefix("clip."): x for name, x in found.items() if name.startswith("clip.")}
    return own or found


def sha256_of(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cached(url):
    """Where a file is kept: in $CLIP_CACHE, or where OpenAI's own program keeps it."""
    folder = os.environ.get("CLIP_CACHE", "~/.cache/clip")
    return Path(folder).expanduser() / url.rpartition("/")[2]


def fetch(url, sha256):
    """The path of a file in the cache, downloaded if it is not there whole; else OSError."""
    target = cached(url)
    if target.is_file() and sha256_of(target) == sha256:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(30)                     # seconds: no way to hang
        torch.hub.download_url_to_file(url, target, hash_prefix=sha256)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise OSError(f"found no {target}, and it cannot be downloaded ({error}), expected the "
                      f"file of {url} with SHA-256 {sha256}: put it there, or use --clip tiny, "
                      "which works without it") from error
    return target


def load(name_or_path="tiny", device="cpu"):
    """A CLIP in fp32 and eval mode, with its `name` and the `sha256` of its file.

    name_or_path: a name of OFFICIAL (downloaded once), "tiny" (in this repository), or a file:
    OpenAI's archive, a state dict, a checkpoint of SAPL. Raises ValueError or OSError, one line.
    """
    name = str(name_or_path)
    path = TINY if name == "tiny" else Path(name).expanduser()
    if name in OFFICIAL:
        file = name.replace("/", "-").replace("@", "-") + ".pt"
        path = fetch(f"{MODELS}/{OFFICIAL[name]}/{file}", OFFICIAL[name])
    elif not path.is_file():
        raise ValueError(f"found no CLIP {name!r}, expected tiny, {', '.join(OFFICIAL)}, or a "
                         "file: check the name (ResNets have no patches)")
    try:
        model = build(read_archive(path), device)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    model.name = name
    model.sha256 = sha256_of(path)
    return model


def lesson(words):
    """Print the pieces of some words, then what patches of a picture say to two sentences."""
    vocab_size = 49408
    if not cached(VOCABULARY).is_file():
        print(f"found no vocabulary, {cached(VOCABULARY)}: bytes instead of pieces")
        vocab_size = 514
    tokenizer = Tokenizer(vocab_size)
    print(" | ".join(f"{piece} {tokenizer.ids[piece]}" for piece in tokenizer.pieces(words)))

    model = load("tiny")
    tokens = tokenize(["genuine", "manipulated"], vocab_size=514)              # (2, 77)
    picture = Image.open(Path(__file__).with_name("tests") / "forged.png")
    image = torch.from_numpy(np.array(picture)) / 255                          # (320, 448, 3)
    image = image.permute(2, 0, 1)[None]                                       # (1, 3, 320, 448)
    with torch.no_grad():
        _, features = model.encode_patches(normalize(image))                   # (1, N, D)
        text = F.normalize(model.encode_text(tokens), dim=-1)                  # (2, D)
    similarity = F.normalize(features, dim=-1) @ text.T                        # (1, N, 2)
    print(f"pixels {tuple(image.shape)} -> patches {tuple(features.shape)}, sentences "
          f"{tuple(text.shape)} -> cosines {tuple(similarity.shape)}")

    print('cosine with "manipulated" less that with "genuine", percent, 5 x 5 patches a number:')
    difference = similarity[..., 1] - similarity[..., 0]                       # (1, N)
    difference = difference.view(1, *model.visual.grid(image))                 # (1, h, w)
    for row in F.avg_pool2d(difference, 5)[0]:
        print("   ", " ".join(f"{100 * value:4.0f}" for value in row))


if __name__ == "__main__":
    lesson(" ".join(sys.argv[1:]) or "a photo of a manipulated image")
