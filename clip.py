"""CLIP from scratch: two towers that put pictures and sentences into one space.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021).
Modules and parameters have OpenAI's names, so that their official weights load as they are.
Shapes: B images, N patches (N = h * w), D joint width, Dv image width, Dt text width, L tokens.
"""
import argparse
import functools
import gzip
import hashlib
import html
import io
import math
import os
import pickle
import pickletools
import sys
import time
import urllib.request
import zipfile
from collections import OrderedDict, namedtuple
from http.client import HTTPException
from pathlib import Path
from types import SimpleNamespace

import ftfy
import regex
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parametrize

MEAN = (0.48145466, 0.4578275, 0.40821073)   # of OpenAI's training pictures, RGB
STD = (0.26862954, 0.26130258, 0.27577711)
CACHE = "~/.cache/clip"                      # OpenAI's program keeps the same files there
MODELS = "https://openaipublic.azureedge.net/clip/models"
OFFICIAL = {                                 # SHA-256 / file
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
    "ViT-L/14@336px":
        "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02/ViT-L-14-336px.pt"}
VOCABULARY = "https://raw.githubusercontent.com/openai/CLIP/main/clip/bpe_simple_vocab_16e6.txt.gz"
VOCABULARY_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
PAUSES, TIMEOUT = (0, 1, 4), 30              # seconds before each attempt; without a byte
TINY = Path(__file__).with_name("weights") / "tiny.pt"


def normalize(image):
    """CLIP's input normalisation. image (B, 3, H, W) in [0, 1] -> pixels (B, 3, H, W)."""
    mean, std = image.new_tensor(MEAN).view(3, 1, 1), image.new_tensor(STD).view(3, 1, 1)
    return (image - mean) / std


# ------------------------------------------------------------------------------------- tokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
WORD = regex.compile(r"<\|startoftext\|>|<\|endoftext\|>|'(?:s|t|re|ve|m|ll|d)"
                     r"|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)


@functools.lru_cache
class Tokenizer:
    """Byte-pair encoding (Sennrich et al. 2016) of the UTF-8 bytes of lower-case text.

    Ids: 256 bytes, 256 bytes that end a word ("a</w>"), `vocab_size - 514` merges, start, end; so
    514 symbols need no vocabulary file. Built on first use; OSError if the file cannot be had.
    """

    def __init__(self, vocab_size, cache=None):
        merges = []                                   # pairs of symbols, the first learned first
        if vocab_size > 514:
            with gzip.open(fetch(VOCABULARY, VOCABULARY_SHA256, cache), "rt", encoding="utf8") as f:
                merges = [tuple(line.split()) for line in [*f][1:vocab_size - 513]]
        visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
        hidden = [byte for byte in range(256) if byte not in visible]     # shown as chr(256), ..
        letters = [*map(chr, visible), *map(chr, range(256, 256 + len(hidden)))]
        self.letters = dict(zip(visible + hidden, letters))
        symbols = letters + [letter + "</w>" for letter in letters]
        symbols += [left + right for left, right in merges] + [START, END]
        self.ids = {symbol: i for i, symbol in enumerate(symbols)}
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}

    def split(self, word):
        """The symbols of a word: of all neighbours that can merge, always those learned first."""
        symbols = [self.letters[byte] for byte in word.encode()]
        symbols[-1] += "</w>"
        while True:
            ranks = [self.ranks.get(pair, math.inf) for pair in zip(symbols, symbols[1:])]
            if min(ranks, default=math.inf) == math.inf:
                return symbols
            i = ranks.index(min(ranks))
            symbols[i:i + 2] = [symbols[i] + symbols[i + 1]]

    def pieces(self, text):
        """The symbols of any text; mojibake and HTML entities are repaired first."""
        text = html.unescape(html.unescape(ftfy.fix_text(text))).strip().lower()
        words = ([w] if w in (START, END) else self.split(w) for w in WORD.findall(text))
        return [symbol for word in words for symbol in word]


def tokenize(texts, context_length=77, vocab_size=49408, truncate=False, cache=None):
    """A text or a list of B texts -> token ids (B, context_length) long: start, text, end, zeros.

    Equal to OpenAI's. Too long a text: ValueError, or with truncate cut before its end token.
    """
    texts = [texts] if isinstance(texts, str) else texts
    codec = Tokenizer(vocab_size, cache)
    tokens = torch.zeros(len(texts), context_length, dtype=torch.long)
    for row, text in zip(tokens, texts):
        ids = [codec.ids[symbol] for symbol in (START, *codec.pieces(text), END)]
        if len(ids) > context_length and not truncate:
            raise ValueError(f"text of {len(ids)} tokens, expected at most {context_length}: "
                             f"shorten it or use truncate=True: {text!r:.60}")
        ids[context_length - 1:-1] = []
        row[:len(ids)] = torch.tensor(ids)
    return tokens


# ---------------------------------------------------------------------------------------- towers

class QuickGELU(nn.Module):
    """OpenAI's cheap GELU: x * sigmoid(1.702 x)."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Multi-head self-attention with the parameter names of `nn.MultiheadAttention`."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(width ** -0.5 * torch.randn(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x, causal=False, dense=None):
        """x (B, L, D) -> (B, L, D). dense: None, "vv" or "qqkk" (see `encode_patches`)."""
        B, L, D = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)              # (B, L, 3D)
        qkv = qkv.view(B, L, 3, self.heads, D // self.heads)                   # (B, L, 3, heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()                          # (B, heads, L, d)
        attend = F.scaled_dot_product_attention
        if dense == "vv":
            x = attend(v, v, v)                                                # (B, heads, L, d)
        elif dense == "qqkk":
            x = (attend(q, q, v) + attend(k, k, v)) / 2                        # (B, heads, L, d)
        else:
            x = attend(q, k, v, is_causal=causal)                              # (B, heads, L, d)
        return self.out_proj(x.transpose(1, 2).reshape(B, L, D))               # (B, L, D)


class ResidualAttentionBlock(nn.Module):
    """Attention, then a two-layer perceptron, each on normalised input and added back."""

    def __init__(self, width, heads):
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(c_fc=nn.Linear(width, 4 * width), gelu=QuickGELU(),
                                             c_proj=nn.Linear(4 * width, width)))
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x, causal=False):
        x = x + self.attn(self.ln_1(x), causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width, layers):
        super().__init__()
        heads = max(1, width // 64)
        self.resblocks = nn.ModuleList(ResidualAttentionBlock(width, heads) for _ in range(layers))

    def forward(self, x, causal=False):
        for block in self.resblocks:
            x = block(x, causal)
        return x


class Stem(nn.Sequential):
    """Ours, not OpenAI's: a high-pass view and stride-2 convolutions before the patch embedding.

    Small regions of a picture differ in noise and compression more than in colour; a 16-pixel
    patch embedding learned from few pictures misses that. Only the shipped tiny model has a stem.
    """

    def __init__(self, channels):
        layers = []
        for width, out in zip((6, *channels), channels):
            k = 3 if layers else 5
            layers += [nn.Conv2d(width, out, k, stride=2, padding=k // 2), nn.GELU()]
        super().__init__(*layers)

    def forward(self, pixels):
        """pixels (B, 3, H, W) -> (B, channels[-1], H / 2^n, W / 2^n) for n channels."""
        row = pixels.new_tensor([1.0, 2.0, 1.0])
        blur = (row[:, None] * row / 16).expand(3, 1, 3, 3)
        padded = F.pad(pixels, (1, 1, 1, 1), mode="replicate")                 # (B, 3, H+2, W+2)
        high_pass = 4 * (pixels - F.conv2d(padded, blur, groups=3))  # ours: about the pixels' range
        return super().forward(torch.cat([pixels, high_pass], dim=1))


class VisionTransformer(nn.Module):
    """The image tower. Any input whose sides are multiples of `patch_size` (in pixels)."""

    def __init__(self, *, resolution, patch_size, width, layers, embed_dim, stem=()):
        super().__init__()
        self.patch_size = patch_size
        if stem:
            self.stem = Stem(stem)
        inner = patch_size // 2 ** len(stem)        # what the stem leaves of the patch
        self.conv1 = nn.Conv2d(stem[-1] if stem else 3, width, inner, stride=inner, bias=False)
        scale, tokens = width ** -0.5, (resolution // patch_size) ** 2 + 1
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(tokens, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, embed_dim))

    def grid(self, pixels):
        """(h, w): rows and columns of patches of pixels (B, 3, H, W); ValueError if they misfit."""
        H, W = pixels.shape[-2:]
        p = self.patch_size
        if H % p or W % p or not H or not W:
            raise ValueError(f"image of {H}x{W} pixels, expected multiples of {p}: resize it")
        return H // p, W // p

    def positions(self, h, w):
        """The position embedding for an (h, w) grid: (1, 1 + N, Dv), a new tensor."""
        first, grid = self.positional_embedding[:1], self.positional_embedding[1:]
        side = math.isqrt(len(grid))
        if (h, w) != (side, side):
            grid = grid.T.reshape(1, -1, side, side)                           # (1, Dv, side, side)
            grid = F.interpolate(grid, (h, w), mode="bicubic", align_corners=False, antialias=True)
            grid = grid.flatten(2)[0].T                                        # (N, Dv)
        return torch.cat([first, grid])[None]                                  # (1, 1 + N, Dv)

    def embed(self, pixels):
        """pixels (B, 3, H, W) -> tokens before the first block (B, 1 + N, Dv), class first."""
        h, w = self.grid(pixels)
        x = self.stem(pixels) if hasattr(self, "stem") else pixels
        x = self.conv1(x).flatten(2).transpose(1, 2)                           # (B, N, Dv)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)  # (B, 1 + N, Dv)
        return self.ln_pre(x + self.positions(h, w))

    def forward(self, pixels):
        """pixels (B, 3, H, W) -> image features (B, D)."""
        x = self.transformer(self.embed(pixels))
        return self.ln_post(x[:, 0]) @ self.proj                               # (B, D)


class CLIP(nn.Module):
    """Both towers. Sizes as in OpenAI's configuration; `stem` is ours (see Stem)."""

    def __init__(self, *, embed_dim, image_resolution, vision_layers, vision_width,
                 vision_patch_size, context_length, vocab_size, transformer_width,
                 transformer_layers, stem=()):
        super().__init__()
        self.context_length, width = context_length, transformer_width
        self.visual = VisionTransformer(
            resolution=image_resolution, patch_size=vision_patch_size, width=vision_width,
            layers=vision_layers, embed_dim=embed_dim, stem=stem)
        self.transformer = Transformer(width, transformer_layers)
        self.token_embedding = nn.Embedding(vocab_size, width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(context_length, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(width ** -0.5 * torch.randn(width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def encode_image(self, pixels):
        """pixels (B, 3, H, W) -> image features (B, D), not normalised."""
        return self.visual(pixels)

    def encode_patches(self, pixels, levels=(), dense=None):
        """Patch tokens at several depths, and the dense features in the joint space.

        pixels: (B, 3, H, W), sides multiples of the patch. levels: blocks counted from 1.
        dense: attention in the last block, for features that stay with their patch: None is
            OpenAI's own; "vv": values attend to values (MaskCLIP, Zhou et al. 2022); "qqkk": mean
            of query-query and key-key attention (SCLIP, Wang et al. 2023; ExCEL, 2025). These two
            also leave out that block's residual and perceptron (ClearCLIP, Lan et al. 2024).
        Returns: [(B, N, Dv) for each level], dense features (B, N, D), not normalised.
        """
        x, found = self.visual.embed(pixels), {}                               # (B, 1 + N, Dv)
        blocks = self.visual.transformer.resblocks
        if not all(1 <= level <= len(blocks) for level in levels):
            raise ValueError(f"levels {levels}, expected numbers from 1 to {len(blocks)}")
        for depth, block in enumerate(blocks, start=1):
            last = dense and depth == len(blocks)
            x = block.attn(block.ln_1(x), dense=dense) if last else block(x)   # (B, 1 + N, Dv)
            found[depth] = x
        features = self.visual.ln_post(x[:, 1:]) @ self.visual.proj            # (B, N, D)
        return [found[level][:, 1:] for level in levels], features

    def encode_prompts(self, embeddings, end):
        """Prompt embeddings of any length through the text tower.

        embeddings: (B, L, Dt) without positions, L at most `context_length`. end: (B,) or int, the
        place of the end token. The attention is causal: what stands after `end` changes nothing.
        Returns: text features (B, D), not normalised.
        """
        B, L, _ = embeddings.shape
        x = embeddings + self.positional_embedding[:L]                         # (B, L, Dt)
        x = self.transformer(x, causal=True)                                   # (B, L, Dt)
        end = torch.as_tensor(end, device=x.device).expand(B)
        x = x[torch.arange(B, device=x.device), end]                           # (B, Dt)
        return self.ln_final(x) @ self.text_projection                         # (B, D)

    def encode_text(self, tokens):
        """Token ids (B, L) -> text features (B, D), not normalised; the highest id is the end."""
        return self.encode_prompts(self.token_embedding(tokens), tokens.argmax(dim=-1))

    def forward(self, pixels, tokens):
        """Cosines times the temperature: (logits per image (B, T), logits per text (T, B))."""
        image = F.normalize(self.encode_image(pixels), dim=-1)
        text = F.normalize(self.encode_text(tokens), dim=-1)
        logits = self.logit_scale.exp() * image @ text.T                       # (B, T)
        return logits, logits.T


class LoRA(nn.Module):
    """A weight plus a trainable change of low rank, W + alpha / rank * B A (Hu et al. 2021)."""

    def __init__(self, weight, rank, alpha):
        super().__init__()
        rows, columns = weight.shape
        self.scale = alpha / rank
        self.A = nn.Parameter(weight.new_empty(rank, columns).normal_(std=columns ** -0.5))
        self.B = nn.Parameter(weight.new_zeros(rows, rank))                    # no change at first

    def forward(self, weight):
        return weight + self.scale * (self.B @ self.A)                         # (rows, columns)


def add_lora(model, rank, alpha, targets=("in_proj", "out_proj")):
    """Freeze a tower (or both) and give its linear maps LoRA; returns the new parameters, a list.

    targets: of "in_proj" (ours: one A for queries, keys and values), "out_proj", "c_fc", "c_proj".
    """
    added = []
    for path, module in list(model.requires_grad_(False).named_modules()):
        for name in ("in_proj_weight", "weight"):
            target = "in_proj" if name == "in_proj_weight" else path.rpartition(".")[2]
            if target in targets and hasattr(module, name):
                lora = LoRA(getattr(module, name), rank, alpha)
                parametrize.register_parametrization(module, name, lora, unsafe=True)
                added += lora.parameters()
    return added


def merge_lora(model):
    """Write the changes into the weights: the same outputs and keys as a model without LoRA."""
    for module in list(model.modules()):
        for name in list(getattr(module, "parametrizations", ())):
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)


# ------------------------------------------------------------------------------ files of weights

def build(state_dict, device="cpu", release=False):
    """A CLIP with these weights (OpenAI's keys), sizes inferred from them, fp32, in eval mode.

    release: empty `state_dict` on the way, so that no weight is in memory twice.
    ValueError, one line: a ResNet, missing, surplus or misshapen weights, NaN or infinity.
    """
    notes = ("input_resolution", "context_length", "vocab_size")               # in OpenAI's files
    shapes = {key: tuple(value.shape) for key, value in state_dict.items() if key not in notes}
    if any(key.startswith("visual.layer1.") for key in shapes):
        raise ValueError(f"weights of a ResNet, which has no patches: use {', '.join(OFFICIAL)}")
    try:
        blocks = [key for key in shapes if key.endswith(".ln_1.weight")][:99]
        vision_layers = sum(key.startswith("visual.") for key in blocks)
        stem = [f"visual.stem.{2 * i}.weight" for i in range(8)]
        stem = tuple(shapes[key][0] for key in stem if key in shapes)
        vision_width, _, kernel, _ = shapes["visual.conv1.weight"]
        vocab_size, text_width = shapes["token_embedding.weight"]
        patch = kernel * 2 ** len(stem)
        side = math.isqrt(shapes["visual.positional_embedding"][0] - 1)        # class token apart
        with torch.device("meta"):                                             # takes no memory
            model = CLIP(embed_dim=shapes["visual.proj"][1], image_resolution=side * patch,
                         vision_layers=vision_layers, vision_width=vision_width,
                         vision_patch_size=patch, context_length=shapes["positional_embedding"][0],
                         vocab_size=vocab_size, transformer_width=text_width,
                         transformer_layers=len(blocks) - vision_layers, stem=stem)
    except (LookupError, ValueError, ArithmeticError) as error:
        raise ValueError(f"not the weights of a CLIP: missing or misshapen: {error}") from error
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    odd = [key for key in {**expected, **shapes} if expected.get(key) != shapes.get(key)]
    if odd:
        found, wanted = shapes.get(odd[0], "missing"), expected.get(odd[0], "no such key")
        raise ValueError(f"not the weights of a CLIP: {len(odd)} keys differ, first {odd[0]}: "
                         f"found {found}, expected {wanted}")
    model.to_empty(device=device)
    for key, weight in model.state_dict().items():
        weight.copy_(state_dict.pop(key) if release else state_dict[key])
        if not torch.stack(weight.aminmax()).isfinite().all():
            raise ValueError(f"damaged weights: NaN or infinity in {key}")
    return model.eval()


Stored = namedtuple("Stored", "storage offset shape stride")   # a tensor that is not read yet
DTYPES = {f"{kind}Storage": dtype for kind, dtype in dict(
    Half=torch.float16, BFloat16=torch.bfloat16, Float=torch.float32, Double=torch.float64,
    Long=torch.int64, Int=torch.int32, Byte=torch.uint8, Bool=torch.bool).items()}
OPCODES = """APPEND APPENDS BINFLOAT BINGET BININT BININT1 BININT2 BINPERSID BINPUT BINUNICODE BUILD
    EMPTY_DICT EMPTY_LIST EMPTY_TUPLE GLOBAL LONG1 LONG_BINGET LONG_BINPUT MARK NEWFALSE NEWOBJ
    NEWTRUE NONE PROTO REDUCE SETITEM SETITEMS STOP TUPLE TUPLE1 TUPLE2 TUPLE3""".split()


class Unpickler(pickle.Unpickler):
    """Knows tensors (they become `Stored`), dictionaries and modules; another name is an error."""

    def find_class(self, module, name):
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda *arguments: Stored(*arguments[:4])
        if module.startswith("__torch__.") or (module, name) == ("collections", "OrderedDict"):
            return OrderedDict                                   # a module's attributes: its vars()
        raise ValueError(f"it asks for {module}.{name}, expected nothing but tensors")

    def persistent_load(self, pid):
        return pid                                               # (_, dtype, key, device, length)


def parse(program):
    """{name: Stored} of the tensors that the pickle `program` (bytes) describes."""
    for opcode, value, _ in pickletools.genops(program):         # some take memory at will
        if opcode.name not in OPCODES or "PUT" in opcode.name and value > len(program):
            raise ValueError(f"its pickle holds {opcode.name} {value!r:.40}")
    found, todo = {}, [("", Unpickler(io.BytesIO(program)).load())]
    for name, node in todo:                                      # grows while we walk
        if isinstance(node, Stored):
            found[name[1:]] = node
        elif isinstance(node, dict) and len(todo) < 99_999:      # it may hold itself
            children = {**node, **getattr(node, "__dict__", {})}
            todo += [(f"{name}.{key}", child) for key, child in children.items()]
    return {k[5:]: v for k, v in found.items() if k.startswith("clip.")} or found


def read_archive(path):
    """{name: tensor} of a file of `torch.jit.save` or `torch.save`, without running its code.

    The file is a zip: data.pkl describes the tensors, data/0, data/1, .. hold their numbers. Of a
    checkpoint of SAPL only the CLIP is read. ValueError, one line, for anything else.
    """
    size, storages, tensors = os.path.getsize(path), {}, {}

    def read(name):
        info = archive.getinfo(root + name)
        if info.compress_type or max(info.compress_size, info.file_size) > size:
            raise ValueError(f"{name} is compressed or longer than the file")
        return archive.read(info)

    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            root, = [name[:-len("data.pkl")] for name in names if name.endswith("/data.pkl")]
            found = parse(read("data.pkl"))
            if sum(math.prod(t.shape) * t.storage[1].itemsize for t in found.values()) > 2 * size:
                raise ValueError("its tensors claim more than twice its size")
            swap = f"{root}byteorder" in names and read("byteorder") != sys.byteorder.encode()
            for name, ((_, dtype, key, _, length), offset, shape, stride) in found.items():
                last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
                if (min(offset, *shape, *stride, 0) < 0 or last >= max(length, 1)
                        or math.prod(shape) > length or not key.isalnum()):
                    raise ValueError(f"{name} of shape {shape} leaves storage {key!r} of {length}")
                if (key, dtype) not in storages:
                    raw = torch.frombuffer(bytearray(read(f"data/{key}")), dtype=torch.uint8)
                    raw = raw[:length * dtype.itemsize].view(-1, dtype.itemsize)
                    raw = raw.flip(1) if swap else raw
                    storages[key, dtype] = raw.flatten().view(dtype)             # (length,)
                tensors[name] = storages[key, dtype].as_strided(shape, stride, offset)   # shape
            return tensors
    except OSError:
        raise
    except Exception as error:                                   # damage has many faces
        raise ValueError(f"{path}: no readable archive of weights: {error}") from error


def sha256_of(path):
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fetch(url, sha256, cache=None):
    """The path of a file in the cache folder, downloaded if it is not there whole.

    OSError, one line, after three attempts: what is missing, where to put it.
    """
    target = Path(cache or CACHE).expanduser() / url.rpartition("/")[2]
    if target.is_file() and sha256_of(target) == sha256:
        return target
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    for pause in PAUSES:
        time.sleep(pause)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with urllib.request.urlopen(url, timeout=TIMEOUT) as answer, open(part, "wb") as file:
                total, digest = answer.length or 0, hashlib.sha256()
                while block := answer.read(1 << 20):
                    digest.update(block)
                    done = file.tell() + file.write(block) >> 20
                    print(f"\r{target.name}: {done} of {total >> 20} MiB", end="", file=sys.stderr)
            if digest.hexdigest() != sha256:
                raise OSError("cut short or not the right file")
            return part.replace(target)
        except (OSError, HTTPException) as error:
            reason = error
        finally:
            part.unlink(missing_ok=True)
    raise OSError(f"{target} is missing and {url} failed ({reason}): "
                  f"put the file there (SHA-256 {sha256}), or use --clip tiny, which needs none")


def load(name_or_path="tiny", device="cpu", cache=None):
    """A CLIP in fp32, eval mode, with its `name` and the `sha256` of its file.

    name_or_path: a name of OFFICIAL (downloaded to `cache`), "tiny" (of this repository), or a
    file: OpenAI's archive, a state dict, a checkpoint of SAPL. ValueError or OSError, one line.
    """
    name = str(name_or_path)
    if name in OFFICIAL:
        path = fetch(f"{MODELS}/{OFFICIAL[name]}", OFFICIAL[name].partition("/")[0], cache)
    else:
        path = TINY if name == "tiny" else Path(name).expanduser()
    if not path.is_file():
        raise ValueError(f"no CLIP {name!r} ({path}): expected a file, tiny, {', '.join(OFFICIAL)} "
                         "(ResNets have no patches)")
    model = build(read_archive(path), device, release=True)
    model.name, model.sha256 = name, sha256_of(path)
    return model


def main():
    """A lesson: the pieces and ids of a sentence, shapes and parameters of the towers."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("text", nargs="?", default="a photo of a manipulated image")
    parser.add_argument("--clip-cache", default=CACHE, help="where the vocabulary is: %(default)s")
    args = parser.parse_args()
    vocabulary = Path(args.clip_cache).expanduser() / VOCABULARY.rpartition("/")[2]
    if not vocabulary.is_file():
        print(f"{vocabulary} is absent: bytes instead of pieces")
    codec = Tokenizer(49408 if vocabulary.is_file() else 514, args.clip_cache)
    symbols = [START, *codec.pieces(args.text), END]
    print("pieces", *symbols, "\nids   ", *(codec.ids[symbol] for symbol in symbols))
    with torch.device("meta"):                                                 # shapes, no numbers
        model = CLIP(embed_dim=512, image_resolution=224, vision_layers=12, vision_width=768,
                     vision_patch_size=16, context_length=77, vocab_size=49408,
                     transformer_width=512, transformer_layers=12)
        pixels, tokens = torch.empty(1, 3, 224, 224), torch.zeros(1, 77, dtype=torch.long)
        (patches,), dense = model.encode_patches(pixels, levels=[12])
        features = model.encode_image(pixels), model.encode_text(tokens)
    image, both = (sum(p.numel() for p in m.parameters()) for m in (model.visual, model))
    for name, count, *steps in (("image", image, pixels, patches, dense, features[0]),
                                ("text", both - image, tokens, features[1])):
        print(f"ViT-B/16 {name} tower, {count:,} parameters:",
              *(" -> ".join(str(tuple(step.shape)) for step in steps),))


if __name__ == "__main__":
    main()
