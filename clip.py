"""CLIP from scratch: two towers that put pictures and sentences into one space.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021); the
parameters have OpenAI's names, so that their official weights load as they are.
Shapes: B images, N patches (N = h * w), D joint width, Dv image width, Dt text width, L tokens.
"""
import gzip
import hashlib
import html
import io
import math
import os
import pickle
import pickletools
import struct
import sys
import time
import urllib.request
import zipfile
from collections import OrderedDict, namedtuple
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path

import ftfy
import regex
import torch
import torch.nn as nn
import torch.nn.functional as F

MEAN = (0.48145466, 0.4578275, 0.40821073)   # of OpenAI's training pictures, RGB
STD = (0.26862954, 0.26130258, 0.27577711)
MODELS = "https://openaipublic.azureedge.net/clip/models"
OFFICIAL = {                                 # SHA-256 of <name with dashes>.pt
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "ViT-L/14@336px": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02"}
VOCABULARY = "https://raw.githubusercontent.com/openai/CLIP/main/clip/bpe_simple_vocab_16e6.txt.gz"
VOCABULARY_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
CACHE = Path("~/.cache/clip").expanduser()   # OpenAI's own program keeps the same files there
TINY = Path(__file__).with_name("weights") / "tiny.pt"


def normalize(image):
    """CLIP's input normalisation. image (B, 3, H, W) in [0, 1] -> pixels (B, 3, H, W)."""
    mean, std = image.new_tensor(MEAN).view(3, 1, 1), image.new_tensor(STD).view(3, 1, 1)
    return (image - mean) / std


# ------------------------------------------------------------------------------------- tokenizer
START, END = "<|startoftext|>", "<|endoftext|>"
WORD = regex.compile(r"<\|startoftext\|>|<\|endoftext\|>|'(?:s|t|re|ve|m|ll|d)"
                     r"|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)


@lru_cache
class Tokenizer:
    """Byte-pair encoding (Sennrich et al. 2016) of the UTF-8 bytes of lower-case text.
    Ids: 256 bytes, 256 bytes that end a word ("a</w>"), `vocab_size - 514` merges (only they need
    the vocabulary file; OSError if it cannot be had), start, end."""

    def __init__(self, vocab_size, cache=None):
        merges = []                                      # pairs of symbols, first learned first
        if vocab_size > 514:
            with gzip.open(fetch(VOCABULARY, VOCABULARY_SHA256, cache), "rt", encoding="utf8") as f:
                merges = [tuple(line.split()) for line in [*f][1:vocab_size - 513]]
        visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
        hidden = [byte for byte in range(256) if byte not in visible]    # shown as chr(256), ..
        letters = [*map(chr, visible), *map(chr, range(256, 256 + len(hidden)))]
        symbols = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges)]
        self.letters = dict(zip(visible + hidden, letters))
        self.ids = {symbol: i for i, symbol in enumerate(symbols + [START, END])}
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}

    def split(self, word):
        """The symbols of a word: of all neighbours that can merge, those learned first, again."""
        symbols = [self.letters[byte] for byte in word.encode()]
        symbols[-1] += "</w>"
        while word not in (START, END):
            ranks = [self.ranks.get(pair, math.inf) for pair in zip(symbols, symbols[1:])]
            if min(ranks, default=math.inf) == math.inf:
                return symbols
            i = ranks.index(min(ranks))
            symbols[i:i + 2] = [symbols[i] + symbols[i + 1]]
        return [word]

    def pieces(self, text):
        """The symbols of any text; mojibake and HTML entities are repaired first."""
        text = html.unescape(html.unescape(ftfy.fix_text(text))).strip().lower()
        return [START, *(piece for word in WORD.findall(text) for piece in self.split(word)), END]


def tokenize(texts, context_length=77, vocab_size=49408, truncate=False, cache=None):
    """A text or a list of B texts -> OpenAI's token ids (B, context_length) long, zeros at the end.
    ValueError for too long a text, which `truncate` cuts before its end token instead."""
    tokenizer, texts = Tokenizer(vocab_size, cache), [texts] if isinstance(texts, str) else texts
    tokens = torch.zeros(len(texts), context_length, dtype=torch.long)
    for row, text in zip(tokens, texts):
        ids = [tokenizer.ids[symbol] for symbol in tokenizer.pieces(text)]
        if len(ids) > context_length and not truncate:
            raise ValueError(f"{len(ids)} tokens, at most {context_length} fit: cut {text!r:.60}")
        ids[context_length - 1:-1] = []
        row[:len(ids)] = torch.tensor(ids)
    return tokens


# ---------------------------------------------------------------------------------------- towers
def noise(*shape, std):
    """A random parameter. Ours: uniform, as `build` would load torch's normal ones for a second."""
    return nn.Parameter(torch.empty(shape).uniform_(-std * 3 ** 0.5, std * 3 ** 0.5))


class LoRA(nn.Module):
    """A trainable change of low rank beside a frozen linear map, alpha / rank * B A x (Hu et al.
    2021). Beside it, because a weight that it were added to would need a gradient of its own."""
    def __init__(self, weight, rank, alpha):
        super().__init__()
        self.scale = alpha / rank
        self.A = nn.Parameter(weight.new_empty(rank, weight.shape[1]).normal_(std=rank ** -0.5))
        self.B = nn.Parameter(weight.new_zeros(len(weight), rank))             # no change at first

    def forward(self, x):
        return self.scale * F.linear(F.linear(x, self.A), self.B)              # (.., rows)


class Linear(nn.Linear):
    """A linear map with room for LoRA."""
    def __init__(self, columns, rows):
        super().__init__(columns, rows)
        self.lora = None

    def forward(self, x):
        y = super().forward(x)                                                 # (.., rows)
        return y + self.lora(x) if self.lora else y


class Attention(nn.Module):
    """Multi-head self-attention with the parameter names of `nn.MultiheadAttention`."""
    def __init__(self, width, causal):
        super().__init__()
        self.heads, self.causal = max(1, width // 64), causal
        self.in_proj_weight = noise(3 * width, width, std=width ** -0.5)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = Linear(width, width)
        self.lora = None                                                       # beside in_proj

    def forward(self, x, dense="plain"):
        """x (B, L, D) -> (B, L, D). dense: "plain", "vv" or "qqkk" (see `encode_patches`)."""
        B, L, D = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)              # (B, L, 3D)
        qkv = qkv + self.lora(x) if self.lora else qkv
        qkv = qkv.view(B, L, 3, self.heads, D // self.heads)                   # (B, L, 3, heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()                          # (B, heads, L, d)
        pairs = {"plain": [(q, k)], "vv": [(v, v)], "qqkk": [(q, q), (k, k)]}[dense]
        x = [F.scaled_dot_product_attention(a, b, v, is_causal=self.causal) for a, b in pairs]
        x = x[0] if len(x) == 1 else (x[0] + x[1]) / 2                         # (B, heads, L, d)
        return self.out_proj(x.transpose(1, 2).reshape(B, L, D))               # (B, L, D)


class ResidualAttentionBlock(nn.Module):
    """Attention, then a two-layer perceptron, each on normalised input and added back."""
    def __init__(self, width, causal):
        super().__init__()
        self.attn = Attention(width, causal)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict(dict(c_fc=Linear(width, 4 * width),
                                      c_proj=Linear(4 * width, width)))
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        hidden = self.mlp["c_fc"](self.ln_2(x))                                   # (B, L, 4D)
        hidden = hidden * (1.702 * hidden).sigmoid_()                          # OpenAI's cheap GELU
        return x + self.mlp["c_proj"](hidden)


class Transformer(nn.Sequential):
    def __init__(self, width, layers, causal=False):
        blocks = (ResidualAttentionBlock(width, causal) for _ in range(layers))
        super().__init__(OrderedDict(resblocks=nn.Sequential(*blocks)))


class Stem(nn.Sequential):
    """Ours, not OpenAI's: a second eye, stride-2 convolutions on what a small blur takes away.
    Regions from elsewhere differ in noise and compression, which a linear patch embedding hardly
    sees. Added to it, from zero at first. Only the shipped tiny model has a stem."""
    def __init__(self, channels, width):
        layers = []
        for inner, out in zip((3, *channels), (*channels, width)):
            k = 3 if layers else 5
            layers += [nn.Conv2d(inner, out, k, stride=2, padding=k // 2), nn.GELU()]
        super().__init__(*layers[:-1])
        nn.init.zeros_(self[-1].weight)
        nn.init.zeros_(self[-1].bias)

    def forward(self, pixels):
        """pixels (B, 3, H, W) -> (B, Dv, h, w), patches of 2^n pixels for n convolutions."""
        blur = pixels.new_tensor([[1, 2, 1], [2, 4, 2], [1, 2, 1]]).div(16).expand(3, 1, 3, 3)
        padded = F.pad(pixels, (1, 1, 1, 1), mode="replicate")                 # (B, 3, H+2, W+2)
        residual = pixels - F.conv2d(padded, blur, groups=3)                   # (B, 3, H, W)
        return super().forward((8 * residual).tanh())  # ours: 8, so noise counts and edges saturate


class VisionTransformer(nn.Module):
    """The image tower. Any input whose sides are multiples of `patch_size` (in pixels)."""
    def __init__(self, resolution, patch_size, width, layers, embed_dim, stem):
        super().__init__()
        self.patch_size = patch_size
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.stem = Stem(stem, width) if stem else None
        scale, tokens = width ** -0.5, (resolution // patch_size) ** 2 + 1
        self.class_embedding = noise(width, std=scale)
        self.positional_embedding = noise(tokens, width, std=scale)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers)
        self.ln_post = nn.LayerNorm(width)
        self.proj = noise(width, embed_dim, std=scale)

    def grid(self, pixels):
        """(h, w), rows and columns of patches, of pixels (B, 3, H, W), or ValueError."""
        (H, W), p = pixels.shape[-2:], self.patch_size
        if H % p or W % p or not H or not W:
            raise ValueError(f"image of {H}x{W} pixels, expected multiples of {p}: resize it")
        return H // p, W // p

    def positions(self, h, w):
        """The position embedding for an (h, w) grid: (1, 1 + N, Dv), a new tensor."""
        side, grid = math.isqrt(len(self.positional_embedding)), self.positional_embedding[1:]
        if (h, w) != (side, side):
            grid = grid.T.reshape(1, -1, side, side)                           # (1, Dv, side, side)
            grid = F.interpolate(grid, (h, w), mode="bicubic", antialias=True)     # (1, Dv, h, w)
            grid = grid.flatten(2)[0].T                                        # (N, Dv)
        return torch.cat([self.positional_embedding[:1], grid])[None]          # (1, 1 + N, Dv)

    def embed(self, pixels):
        """pixels (B, 3, H, W) -> tokens before the first block (B, 1 + N, Dv), class first."""
        h, w = self.grid(pixels)
        x = self.conv1(pixels)                                                 # (B, Dv, h, w)
        x = (x + self.stem(pixels) if self.stem else x).flatten(2).transpose(1, 2)     # (B, N, Dv)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)  # (B, 1 + N, Dv)
        return self.ln_pre(x + self.positions(h, w))

    def forward(self, pixels):
        """pixels (B, 3, H, W) -> image features (B, D)."""
        x = self.transformer(self.embed(pixels))
        return self.ln_post(x[:, 0]) @ self.proj                               # (B, D)


def is_trained(module):
    """Whether training changes any weight of a module."""
    return any(p.requires_grad for p in module.parameters())


class CLIP(nn.Module):
    """Both towers. Sizes as in OpenAI's configuration; `stem` is ours (see Stem)."""
    def __init__(self, *, embed_dim, image_resolution, vision_layers, vision_width,
                 vision_patch_size, context_length, vocab_size, transformer_width,
                 transformer_layers, stem=()):
        super().__init__()
        self.context_length, width = context_length, transformer_width
        self.visual = VisionTransformer(image_resolution, vision_patch_size, vision_width,
                                        vision_layers, embed_dim, stem)
        self.transformer = Transformer(width, transformer_layers, causal=True)
        words = noise(vocab_size, width, std=0.02)
        self.token_embedding = nn.Embedding.from_pretrained(words, freeze=False)
        self.positional_embedding = noise(context_length, width, std=0.01)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = noise(width, embed_dim, std=width ** -0.5)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_image(self, pixels):
        """pixels (B, 3, H, W) -> image features (B, D), not normalised."""
        return self.visual(pixels)

    def encode_patches(self, pixels, levels=(), dense="plain", memo=None):
        """Patch tokens [(B, N, Dv)] after the blocks `levels` (from 1), dense features (B, N, D).
        dense: attention in the last block, for features that stay with their patch. "plain":
        OpenAI's; "vv": values attend to values (MaskCLIP, Zhou et al. 2022); "qqkk": mean of
        query-query and key-key (SCLIP, Wang et al. 2023; ExCEL 2025). Both leave out the block's
        residual and perceptron (ClearCLIP, Lan et al. 2024). Sides are multiples of the patch.
        memo: a dict, empty at first, that keeps the tokens that no training changes: the next call
        with it, for the same pixels and settings, starts after them."""
        blocks = self.visual.transformer.resblocks
        if not all(1 <= level <= len(blocks) for level in levels):
            raise ValueError(f"levels {levels}, expected numbers from 1 to {len(blocks)}")
        found = dict(memo or {0: self.visual.embed(pixels)})                   # {0: (B, 1 + N, Dv)}
        for i in range(max(found), len(blocks)):
            x, block, own = found[i], blocks[i], dense == "plain" or i + 1 < len(blocks)
            found[i + 1] = block(x) if own else block.attn(block.ln_1(x), dense)  # (B, 1 + N, Dv)
        if memo == {} and not self.visual.conv1.weight.requires_grad:
            trained = (i for i, block in enumerate(blocks) if is_trained(block))
            frozen = next(trained, len(blocks))
            memo.update({i: found[i] for i in {*levels, frozen} if i <= frozen})
        features = self.visual.ln_post(found[len(blocks)][:, 1:]) @ self.visual.proj  # (B, N, D)
        return [found[level][:, 1:] for level in levels], features

    def encode_prompts(self, embeddings, end):
        """Prompt embeddings (B, L, Dt) of any length -> text features (B, D), not normalised.
        end: (B,) or int, the place of the end token; what follows it changes nothing (causal)."""
        positions = self.positional_embedding[:embeddings.shape[1]]            # (L, Dt)
        x = self.transformer(embeddings + positions)                           # (B, L, Dt)
        x = x[torch.arange(len(x), device=x.device), end]                      # (B, Dt)
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


def add_lora(model, rank, alpha, targets=("in_proj", "out_proj")):
    """Freeze a module and give the linear maps in it LoRA; returns the new parameters, a list.
    targets: of "in_proj" (ours: one A for queries, keys, values), "out_proj", "c_fc", "c_proj"."""
    added = []
    for path, module in list(model.requires_grad_(False).named_modules()):
        joint = isinstance(module, Attention)
        if ("in_proj" if joint else path.rpartition(".")[2]) in targets:
            weight = module.in_proj_weight if joint else module.weight
            module.lora = LoRA(weight.detach(), rank, alpha)
            added += module.lora.parameters()
    return added


@torch.no_grad()
def merge_lora(model):
    """Add the changes to the weights: the same outputs and keys as a model without LoRA."""
    for module in model.modules():
        if lora := getattr(module, "lora", None):
            weight = module.in_proj_weight if isinstance(module, Attention) else module.weight
            weight += lora.scale * lora.B @ lora.A                             # (rows, columns)
            module.lora = None


# ------------------------------------------------------------------------------ files of weights
def build(state_dict, device="cpu", release=False):
    """A CLIP with these weights (OpenAI's keys), sizes inferred from them, fp32, in eval mode.
    release: empty `state_dict` on the way, so that no weight is in memory twice.
    ValueError, one line: a ResNet, missing, surplus or misshapen weights, NaN or infinity."""
    shapes = {k: tuple(v.shape) for k, v in state_dict.items() if v.is_floating_point()}  # no notes
    try:
        stem = [f"visual.stem.{2 * i}.weight" for i in range(8)]
        stem = tuple(shapes[key][0] for key in stem if key in shapes)[:-1]     # the last is Dv
        blocks = [key for key in shapes if key.endswith(".ln_1.weight")][:99]
        vision_layers = sum(key.startswith("visual.") for key in blocks)
        patch = shapes["visual.conv1.weight"][-1]
        side = math.isqrt(shapes["visual.positional_embedding"][0] - 1)        # without the class
        vocab_size, transformer_width = shapes["token_embedding.weight"]
        with torch.device("meta"):                                             # takes no memory
            model = CLIP(
                embed_dim=shapes["text_projection"][1], image_resolution=side * patch, stem=stem,
                vision_layers=vision_layers, vision_width=shapes["visual.class_embedding"][0],
                vision_patch_size=patch, context_length=shapes["positional_embedding"][0],
                vocab_size=vocab_size, transformer_width=transformer_width,
                transformer_layers=len(blocks) - vision_layers)
    except (LookupError, ValueError, ArithmeticError) as error:
        raise ValueError(f"no CLIP with patches (a ResNet?), missing or odd: {error}") from error
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    for key in {**expected, **shapes}:
        if (found := shapes.get(key, "none")) != (wanted := expected.get(key, "none")):
            raise ValueError(f"not the weights of a CLIP: {key}: found {found}, expected {wanted}")
    model.to_empty(device=device)
    for key, weight in model.state_dict().items():
        weight.copy_(state_dict.pop(key) if release else state_dict[key])
        if not torch.stack(weight.aminmax()).isfinite().all():
            raise ValueError(f"damaged weights: NaN or infinity in {key}")
    return model.eval()


Stored = namedtuple("Stored", "storage offset shape stride")   # a tensor that is not read yet
KNOWN = {f"torch.{kind}Storage": getattr(torch, kind.lower())
         for kind in "Half BFloat16 Float Double Long Int Bool".split()}
KNOWN |= {"torch.ByteStorage": torch.uint8, "collections.OrderedDict": OrderedDict,
          "torch._utils._rebuild_tensor_v2": lambda *arguments: Stored(*arguments[:4])}


class Unpickler(pickle.Unpickler):
    """Reads tensors (as `Stored`), dictionaries and modules; any other name is an error."""
    persistent_load = staticmethod(tuple)        # a storage: (_, dtype, key, device, length)

    def find_class(self, module, name):
        if module.partition(".")[0] == "__torch__":
            return OrderedDict                           # a module keeps its attributes in vars()
        if f"{module}.{name}" not in KNOWN:
            raise ValueError(f"it asks for {module}.{name}, expected only tensors")
        return KNOWN[f"{module}.{name}"]


def read_archive(path):
    """{name: tensor} of a file of `torch.jit.save` or `torch.save`, without running its code.
    The file is a zip: data.pkl describes the tensors, data/0, data/1, .. hold their numbers. Of a
    checkpoint of SAPL only the CLIP is read. ValueError, one line, for anything else."""
    def read(name):
        info = archive.getinfo(root + name)
        file.seek(info.header_offset + 26)               # there: lengths of two texts, then they
        file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)
        raw = torch.empty(min(info.file_size, size), dtype=torch.uint8)
        if info.compress_type or file.readinto(raw.numpy()) < info.file_size:
            raise ValueError(f"{name} is compressed or cut short")
        return raw                                       # (bytes,)

    size, found, storages, tensors = os.path.getsize(path), {}, {}, {}
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            root, = [name[:-len("data.pkl")] for name in names if name.endswith("/data.pkl")]
            program = read("data.pkl").numpy().tobytes()
            if any("PUT" in code.name and n > size for code, n, _ in pickletools.genops(program)):
                raise ValueError("its pickle asks for absurd memory")
            nodes, seen = [("", Unpickler(io.BytesIO(program)).load())], set()
            for name, node in nodes:                     # grows while we walk
                if isinstance(node, Stored):
                    found[name[1:]] = node
                elif isinstance(node, dict) and id(node) not in seen and len(name) < 200:
                    seen.add(id(node))                   # it may hold itself
                    children = {**node, **getattr(node, "__dict__", {})}
                    nodes += [(f"{name}.{key}", child) for key, child in children.items()]
            found = {k[5:]: v for k, v in found.items() if k.startswith("clip.")} or found
            if sum(math.prod(t.shape) * t.storage[1].itemsize for t in found.values()) > 2 * size:
                raise ValueError("its tensors claim more than twice its size")
            order = archive.read(f"{root}byteorder") if f"{root}byteorder" in names else b"little"
            for name, ((_, dtype, key, *_), offset, shape, stride) in found.items():
                if key not in storages:
                    raw = read(f"data/{key}")
                    if order != sys.byteorder.encode():
                        raw = raw.view(-1, dtype.itemsize).flip(1).flatten()
                    storages[key] = raw.view(dtype)                            # (length,)
                tensors[name] = storages[key].as_strided(shape, stride, offset)    # shape
            return tensors
    except Exception as error:                           # damage has many faces
        raise ValueError(f"{path}: no readable archive of weights: {error}") from error


def fetch(url, sha256, cache=None, timeout=30, pauses=(0, 1, 5)):
    """The path of a file in the cache folder, downloaded if it is not there whole; else OSError."""
    target = Path(cache or CACHE).expanduser() / url.rpartition("/")[2]
    if target.is_file() and hashlib.sha256(target.read_bytes()).hexdigest() == sha256:
        return target
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    for pause in pauses:
        time.sleep(pause)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with urllib.request.urlopen(url, timeout=timeout) as answer, open(part, "wb") as file:
                total, digest = answer.length or 0, hashlib.sha256()
                while block := answer.read(1 << 20):
                    digest.update(block)
                    done = file.tell() + file.write(block)
                    print(f"\r{target.name}: {done:,} of {total:,} bytes", end=" ", file=sys.stderr)
            if digest.hexdigest() == sha256:
                return part.replace(target)
            problem = f"got {part.stat().st_size} of {total} bytes, with another SHA-256"
        except (OSError, HTTPException) as error:
            problem = error
        finally:
            part.unlink(missing_ok=True)
    raise OSError(f"{target} is missing and cannot be downloaded ({problem}): put {url} there "
                  f"(SHA-256 {sha256}), or use --clip tiny, which works without it")


def load(name_or_path="tiny", device="cpu", cache=None):
    """A CLIP in fp32 and eval mode, with its `name` and the `sha256` of its file.
    name_or_path: of OFFICIAL (kept in `cache`), "tiny" (in this repository), or a file: OpenAI's
    archive, a state dict, a checkpoint of SAPL. ValueError or OSError, one line."""
    name = str(name_or_path)
    path = TINY if name == "tiny" else Path(name).expanduser()
    if name in OFFICIAL:
        url = f"{MODELS}/{OFFICIAL[name]}/{name.replace('/', '-').replace('@', '-')}.pt"
        path = fetch(url, OFFICIAL[name], cache)
    elif not path.is_file():
        raise ValueError(f"no CLIP {name!r}, no file {path}: expected tiny, {', '.join(OFFICIAL)}, "
                         "or a file (ResNets have no patches)")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    model = build(read_archive(path), device, release=True)
    model.name, model.sha256 = name, sha256
    return model


def lesson(text):
    """Print the pieces of a text with their ids, then shapes and parameters of ViT-B/16."""
    there = (CACHE / VOCABULARY.rpartition("/")[2]).is_file()
    tokenizer = Tokenizer(49408 if there else 514)
    print("pieces" if there else f"no vocabulary in {CACHE}: bytes instead of pieces",
          *(f"{piece} {tokenizer.ids[piece]}" for piece in tokenizer.pieces(text)), sep=" | ")
    with torch.device("meta"):                           # shapes alone, no numbers
        model = CLIP(embed_dim=512, image_resolution=224, vision_layers=12, vision_width=768,
                     vision_patch_size=16, context_length=77, vocab_size=49408,
                     transformer_width=512, transformer_layers=12)
        (patches,), dense = model.encode_patches(torch.empty(1, 3, 224, 224), levels=[12])
    print("pixels (1, 3, 224, 224), patches", tuple(patches.shape), "projected", tuple(dense.shape))
    for name, part in model.named_children():
        print(f"{name:16} {sum(p.numel() for p in part.parameters()):12,} parameters")


if __name__ == "__main__":
    lesson(" ".join(sys.argv[1:]) or "a photo of a manipulated image")
