"""CLIP: two towers that embed images and text in one joint space (Radford et al. 2021).

SAPL needs what OpenAI's package lacks: features of every patch, prompts given as embeddings, LoRA,
and any grid of whole patches. Modules and parameters keep OpenAI's names, so its weights load.
Shapes: B images, N = h * w patches, D joint width, Dv image width, Dt text width, L tokens.
"""
import functools
import gzip
import hashlib
import html
import http.client
import io
import math
import os
import sys
import urllib.request
from collections import OrderedDict
from pathlib import Path

import ftfy
import regex
import torch
import torch.nn as nn
import torch.nn.functional as F

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
    """CLIP's input normalisation: image (B, 3, H, W) in [0, 1], RGB -> pixels (B, 3, H, W)."""
    mean = image.new_tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)      # (3, 1, 1)
    std = image.new_tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)      # (3, 1, 1)
    return (image - mean) / std


# ------------------------------------------------------------------------------------- tokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
WORD = regex.compile(r"<\|startoftext\|>|<\|endoftext\|>|'(?:s|t|re|ve|m|ll|d)"
                     r"|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)


@functools.lru_cache                                     # built once per vocabulary size
class Tokenizer:
    """Byte-pair encoding (Sennrich et al. 2016). A vocab_size of 514 has no merges: no download."""

    def __init__(self, vocab_size):
        self.ranks = {}                          # of the pairs that merge, in the order learned
        if vocab_size > 514:                     # 514: 256 bytes, twice, and START and END
            content = fetch(VOCABULARY, VOCABULARY_SHA256).read_bytes()
            lines = gzip.decompress(content).decode().split("\n")[1:vocab_size - 513]
            self.ranks = {tuple(line.split()): rank for rank, line in enumerate(lines)}

        # Every byte is shown as one visible character: itself, or one of chr(256) to chr(323).
        visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
        hidden = [byte for byte in range(256) if byte not in visible]
        letters = [chr(code) for code in [*visible, *range(256, 324)]]
        self.letters = dict(zip(visible + hidden, letters))
        # Ids: 256 bytes, the same 256 at the end of a word ("a</w>"), merges, start, end.
        symbols = letters + [letter + "</w>" for letter in letters]
        symbols += ["".join(pair) for pair in self.ranks]
        symbols += [START, END]
        self.ids = {symbol: i for i, symbol in enumerate(symbols)}

    def split(self, word):
        """Repeatedly merge the neighbouring pair that was learned first."""
        symbols = [self.letters[byte] for byte in word.encode()]
        symbols[-1] += "</w>"
        while True:
            pairs = list(zip(symbols, symbols[1:]))
            known = [pair for pair in pairs if pair in self.ranks]
            if not known:
                return symbols
            i = pairs.index(min(known, key=self.ranks.get))
            symbols[i:i + 2] = [symbols[i] + symbols[i + 1]]

    def pieces(self, text):
        """Text -> symbols with START and END; encoding errors repaired, HTML entities decoded."""
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
        symbols = [START]
        for word in WORD.findall(text.strip().lower()):
            symbols += [word] if word in (START, END) else self.split(word)
        return symbols + [END]


def tokenize(texts, context_length=77, vocab_size=49408):
    """One text or B texts -> ids (B, context_length), zero-padded; ValueError if too long."""
    if isinstance(texts, str):
        texts = [texts]
    tokenizer = Tokenizer(vocab_size)
    tokens = torch.zeros(len(texts), context_length, dtype=torch.long)         # (B, L)
    for row, text in zip(tokens, texts):
        ids = [tokenizer.ids[piece] for piece in tokenizer.pieces(text)]
        if len(ids) > context_length:
            raise ValueError(f"found {len(ids)} tokens, expected at most {context_length}: "
                             f"shorten {text!r:.60}")
        row[:len(ids)] = torch.tensor(ids)
    return tokens


# ----------------------------------------------------- added to OpenAI's towers: LoRA and our stem

class LoRA(nn.Module):
    """A trainable rank-r update beside a frozen weight: alpha / r * B A x (Hu et al. 2021)."""

    def __init__(self, weight, rank, alpha):
        super().__init__()
        rows, columns = weight.shape
        self.scale = alpha / rank
        self.A = nn.Parameter(weight.new_empty(rank, columns).normal_(std=rank ** -0.5))
        self.B = nn.Parameter(weight.new_zeros(rows, rank))        # the update starts at zero

    def forward(self, x):
        return self.scale * F.linear(F.linear(x, self.A), self.B)              # (.., rows)


def add_lora(model, rank, alpha):
    """Freeze a module and add LoRA to every attention in it; Q, K and V share one A [ours]."""
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, Attention):
            module.lora = LoRA(module.in_proj_weight.detach(), rank, alpha)


class Stem(nn.Sequential):
    """Strided convolutions of the high frequencies, added to the patch embedding of the shipped
    tower [ours]. Spliced regions differ in noise, which a linear embedding hardly sees."""

    def __init__(self, channels, width):
        layers = [nn.Conv2d(3, channels[0], 5, stride=2, padding=2)]
        for inner, outer in zip(channels, [*channels[1:], width]):
            layers += [nn.GELU(), nn.Conv2d(inner, outer, 3, stride=2, padding=1)]
        super().__init__(*layers)
        nn.init.zeros_(self[-1].weight)                  # the output starts at zero
        nn.init.zeros_(self[-1].bias)

    def forward(self, pixels):
        """pixels (B, 3, H, W) -> (B, Dv, h, w), halved by each convolution."""
        # A blur (1, 2, 1) by sums, which autocast leaves in fp32: bf16 would lose the noise.
        x = F.pad(pixels, (1, 1, 1, 1), mode="replicate")                      # (B, 3, H+2, W+2)
        x = (x[:, :, :-2] + 2 * x[:, :, 1:-1] + x[:, :, 2:]) / 4               # (B, 3, H, W+2)
        blurred = (x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]) / 4            # (B, 3, H, W)
        residual = (8 * (pixels - blurred)).tanh()       # amplifies noise, saturates edges
        return super().forward(residual)                                       # (B, Dv, h, w)


# ---------------------------------------------------------------------------------------- towers

class Attention(nn.Module):
    """Multi-head self-attention with the parameter names of `nn.MultiheadAttention`."""

    def __init__(self, width, causal):
        super().__init__()
        self.heads = max(1, width // 64)
        self.causal = causal
        self.in_proj_weight = nn.Parameter(width ** -0.5 * torch.randn(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        self.lora = None                                 # see add_lora

    def forward(self, x):
        """x (B, L, D) -> (B, L, D). In the blocks, D is the width of their tower, Dv or Dt."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)              # (B, L, 3D)
        if self.lora is not None:
            qkv = qkv + self.lora(x)
        qkv = qkv.unflatten(2, (3, self.heads, -1))                            # (B, L, 3, heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                   # (B, heads, L, d)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)     # (B, heads, L, d)
        return self.out_proj(x.transpose(1, 2).flatten(2))                     # (B, L, D)


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class ResidualAttentionBlock(nn.Module):
    def __init__(self, width, causal):
        super().__init__()
        self.attn = Attention(width, causal)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(
            c_fc=nn.Linear(width, 4 * width),                                  # (B, L, 4D)
            gelu=QuickGELU(),
            c_proj=nn.Linear(4 * width, width)))                               # (B, L, D)
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Sequential):
    def __init__(self, width, layers, causal=False):
        blocks = [ResidualAttentionBlock(width, causal) for _ in range(layers)]
        super().__init__(OrderedDict(resblocks=nn.Sequential(*blocks)))


class VisionTransformer(nn.Module):
    """The image tower, for images whose sides are multiples of `patch_size`."""

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
        """pixels (B, 3, H, W) -> (h, w), their rows and columns of patches, or ValueError."""
        p = self.patch_size
        H, W = pixels.shape[-2:]
        if min(H, W) < p or H % p or W % p:
            raise ValueError(f"found an image of {H}x{W} pixels, expected multiples of {p}: pad it")
        return H // p, W // p

    def positions(self, h, w):
        """Position embeddings, interpolated to an (h, w) grid: (1 + N, Dv)."""
        own = self.positional_embedding                                        # (1 + side^2, Dv)
        side = math.isqrt(len(own))
        grid = own[1:].T.reshape(1, -1, side, side)                            # (1, Dv, side, side)
        grid = F.interpolate(grid, (h, w), mode="bicubic", antialias=True)     # (1, Dv, h, w)
        return torch.cat([own[:1], grid.flatten(2)[0].T])                      # (1 + N, Dv)

    def embed(self, pixels):
        """pixels (B, 3, H, W) -> input tokens of the blocks (B, 1 + N, Dv), class token first."""
        h, w = self.grid(pixels)
        x = self.conv1(pixels)                                                 # (B, Dv, h, w)
        if self.stem is not None:
            x = x + self.stem(pixels)
        x = x.flatten(2).transpose(1, 2)                                       # (B, N, Dv)
        first = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)         # (B, 1, Dv)
        x = torch.cat([first, x], dim=1)                                       # (B, 1 + N, Dv)
        # Under autocast conv1 returns bf16; keep the residual stream in bf16.
        x = x + self.positions(h, w).to(x.dtype)
        return self.ln_pre(x).to(x.dtype)


class CLIP(nn.Module):
    """Both towers. Arguments as in OpenAI's code, less the heads, plus the channels of our Stem."""

    def __init__(self, *, embed_dim, image_resolution, vision_layers, vision_width,
                 vision_patch_size, context_length, vocab_size, transformer_width,
                 transformer_layers, stem=()):
        super().__init__()
        width = transformer_width
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
        x = self.visual.transformer(self.visual.embed(pixels))                 # (B, 1 + N, Dv)
        return self.visual.ln_post(x[:, 0]) @ self.visual.proj                 # (B, D)

    def encode_patches(self, pixels, levels=()):
        """pixels (B, 3, H, W) -> patch tokens after the blocks `levels` (from 1) [(B, N, Dv)], and
        dense features (B, N, D): every patch projected as CLIP projects the class token."""
        tokens = [self.visual.embed(pixels)]                                   # [(B, 1 + N, Dv)]
        for block in self.visual.transformer.resblocks:
            tokens.append(block(tokens[-1]))
        features = self.visual.ln_post(tokens[-1][:, 1:]) @ self.visual.proj   # (B, N, D)
        return [tokens[level][:, 1:] for level in levels], features            # [(B, N, Dv)], ..

    def encode_prompts(self, embeddings, end):
        """Token embeddings (B, L, Dt) and the index of the end token, (B,) or int -> text features
        (B, D), not normalised. Attention is causal, so what follows the end has no effect."""
        positions = self.positional_embedding[:embeddings.shape[1]]            # (L, Dt)
        x = self.transformer(embeddings + positions)                           # (B, L, Dt)
        x = x[torch.arange(len(x), device=x.device), end]                      # (B, Dt)
        return self.ln_final(x) @ self.text_projection                         # (B, D)

    def encode_text(self, tokens):
        """Token ids (B, L) -> text features (B, D), not normalised."""
        end = tokens.argmax(dim=-1)                      # (B,); the end token has the highest id
        return self.encode_prompts(self.token_embedding(tokens), end)          # (B, D)


# --------------------------------------------------------------------------------------- weights

def build(state_dict):
    """Weights with OpenAI's keys -> CLIP of their sizes, in fp32 and eval mode, or ValueError."""
    # OpenAI's archives also hold three integers, which nothing needs.
    weights = {key: x for key, x in state_dict.items() if x.is_floating_point()}
    blocks = [key for key in weights if key.endswith(".ln_1.weight")]
    vision_layers = sum(key.startswith("visual.") for key in blocks)
    stem = [len(x) for key, x in weights.items()
            if ".stem." in key and x.dim() == 4]         # its convolutions
    try:
        tokens, vision_width = weights["visual.positional_embedding"].shape
        patch = weights["visual.conv1.weight"].shape[-1]
        vocab_size, text_width = weights["token_embedding.weight"].shape
        with torch.device("meta"):                       # allocates no memory
            model = CLIP(
                embed_dim=weights["text_projection"].shape[1],
                image_resolution=math.isqrt(tokens - 1) * patch,   # one token is the class
                vision_layers=vision_layers, vision_width=vision_width, vision_patch_size=patch,
                context_length=len(weights["positional_embedding"]), vocab_size=vocab_size,
                transformer_width=text_width, transformer_layers=len(blocks) - vision_layers,
                stem=stem[:-1])                          # the last has vision_width
        model.to_empty(device="cpu").load_state_dict(weights)
    except (LookupError, ValueError, RuntimeError) as error:
        raise ValueError(f"found weights that do not fit ({error!r:.200}), expected those of a "
                         "CLIP with a Vision Transformer, not a ResNet") from error
    return model.eval()


def read_archive(path):
    """The CLIP in a file of torch.save or torch.jit.save -> {key: tensor}, or ValueError."""
    # weights_only runs no code of the file, but rejects TorchScript (OpenAI's archives) because it
    # has a constants.pkl. Renamed, it is ignored; modules load as dicts with tensors in __dict__.
    content = Path(path).read_bytes().replace(b"/constants.pkl", b"/constants.off")
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(content))
        modules = [(OrderedDict, name) for name in names if name.startswith("__torch__.")]
        with torch.serialization.safe_globals(modules):
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:                           # a damaged file can raise anything
        raise ValueError(f"found no readable weights in {path} ({type(error).__name__}), expected "
                         "a file written by torch.save") from error

    tensors = {}
    seen = set()                                         # a dictionary may contain itself
    nodes = [("", state)]
    for name, node in nodes:                             # the list grows in the loop
        if isinstance(node, torch.Tensor):
            tensors[name] = node
        elif isinstance(node, dict) and id(node) not in seen:
            seen.add(id(node))
            children = node | getattr(node, "__dict__", {})
            nodes += [(f"{name}.{key}", child) for key, child in children.items()]

    # Strip what wraps a CLIP: ".state_dict", ".model", ".module", or ".clip" in SAPL's checkpoints.
    ends = [name for name in tensors if name.endswith(".text_projection")]
    prefix = ends[0].removesuffix("text_projection") if ends else "."
    return {key.removeprefix(prefix): x for key, x in tensors.items()
            if key.startswith(prefix)}


def sha256_of(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cached(url):
    """Where a download is kept: in $CLIP_CACHE, or else where OpenAI's code keeps it."""
    folder = os.environ.get("CLIP_CACHE", "~/.cache/clip")
    return Path(folder).expanduser() / url.rpartition("/")[2]


def fetch(url, sha256):
    """The path of an intact copy in the cache, downloaded if need be; OSError if that fails."""
    target = cached(url)
    if target.is_file() and sha256_of(target) == sha256:
        return target
    print(f"downloading {url}", file=sys.stderr)
    try:
        content = urllib.request.urlopen(url, timeout=30).read()
        if hashlib.sha256(content).hexdigest() != sha256:
            raise OSError("wrong SHA-256")
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(f".{os.getpid()}")
        part.write_bytes(content)
        part.replace(target)                             # never half a file under this name
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"could not download {url} ({error}): put the weights and {VOCABULARY} into "
                      f"{target.parent} (train.py --clip tiny needs neither)") from error
    return target


def load(name_or_path="tiny"):
    """A CLIP in fp32 and eval mode: "tiny" (shipped), a key of OFFICIAL (downloaded once), or a
    file. Raises ValueError or OSError."""
    name = str(name_or_path)
    path = TINY if name == "tiny" else Path(name).expanduser()
    if name in OFFICIAL:
        file = name.replace("/", "-").replace("@", "-") + ".pt"
        path = fetch(f"{MODELS}/{OFFICIAL[name]}/{file}", OFFICIAL[name])
    elif not path.is_file():
        raise ValueError(f"found no CLIP {name!r}, expected tiny, {', '.join(OFFICIAL)}, or a file")
    return build(read_archive(path))


def lesson(text):
    """Print the tokens of a text, one a line, and their ids."""
    tokenizer = Tokenizer(49408 if cached(VOCABULARY).is_file() else 514)      # 514: bytes alone
    for piece in tokenizer.pieces(text):
        print(f"{tokenizer.ids[piece]:5}  {piece}")


if __name__ == "__main__":
    lesson(" ".join(sys.argv[1:]) or "a photo of a manipulated image")
