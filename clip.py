"""CLIP from scratch: two towers that put pictures and sentences into one space.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021).
Names of modules and parameters are OpenAI's, so their official weights load with `strict=True`.
Shapes: B images, N patches (N = h * w), D joint width, Dv image width, Dt text width, L text tokens.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

MEAN = (0.48145466, 0.4578275, 0.40821073)   # of OpenAI's training pictures, RGB
STD = (0.26862954, 0.26130258, 0.27577711)


def normalize(image):
    """CLIP's input normalisation. image (B, 3, H, W) in [0, 1] -> pixels (B, 3, H, W)."""
    mean, std = image.new_tensor(MEAN).view(3, 1, 1), image.new_tensor(STD).view(3, 1, 1)
    return (image - mean) / std


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
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.normal_(self.in_proj_weight, std=width ** -0.5)

    def forward(self, x, causal=False, dense=None):
        """x (B, L, D) -> (B, L, D). dense: None, "vv" or "qqkk" (see `encode_patches`)."""
        B, L, D = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)                 # (B, L, 3D)
        q, k, v = qkv.view(B, L, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)  # 3 x (B, heads, L, d)
        if dense == "vv":
            x = F.scaled_dot_product_attention(v, v, v)
        elif dense == "qqkk":
            x = (F.scaled_dot_product_attention(q, q, v) + F.scaled_dot_product_attention(k, k, v)) / 2
        else:
            x = F.scaled_dot_product_attention(q, k, v, is_causal=causal)         # (B, heads, L, d)
        return self.out_proj(x.transpose(1, 2).reshape(B, L, D))                  # (B, L, D)


class ResidualAttentionBlock(nn.Module):
    """Attention, then a two-layer perceptron, each on normalised input and added back."""

    def __init__(self, width, heads):
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", QuickGELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x, causal=False):
        x = x + self.attn(self.ln_1(x), causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width, layers, heads):
        super().__init__()
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
        layers, width = [], 6
        for i, out in enumerate(channels):
            k = 5 if i == 0 else 3
            layers += [nn.Conv2d(width, out, k, stride=2, padding=k // 2), nn.GELU()]
            width = out
        super().__init__(*layers)

    def forward(self, pixels):
        """pixels (B, 3, H, W) -> (B, channels[-1], H / 2^n, W / 2^n) for n channels."""
        row = pixels.new_tensor([1.0, 2.0, 1.0])
        blur = (row[:, None] * row / 16).expand(3, 1, 3, 3)
        smooth = F.conv2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), blur, groups=3)  # (B, 3, H, W)
        high_pass = 4 * (pixels - smooth)           # ours: about the range of the pixels themselves
        return super().forward(torch.cat([pixels, high_pass], dim=1))


class VisionTransformer(nn.Module):
    """The image tower. Any input whose sides are multiples of `patch_size` (in pixels)."""

    def __init__(self, *, resolution, patch_size, width, layers, heads, embed_dim, stem=()):
        super().__init__()
        self.patch_size = patch_size
        if stem:
            self.stem = Stem(stem)
        inner = patch_size // 2 ** len(stem)        # what the stem leaves of the patch
        self.conv1 = nn.Conv2d(stem[-1] if stem else 3, width, inner, stride=inner, bias=False)
        scale = width ** -0.5
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn((resolution // patch_size) ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, embed_dim))

    def grid(self, pixels):
        """(h, w): rows and columns of patches of pixels (B, 3, H, W); ValueError if they do not fit."""
        H, W = pixels.shape[-2:]
        p = self.patch_size
        if H % p or W % p or not H or not W:
            raise ValueError(f"image size {H}x{W} is not a multiple of the patch size {p}: resize or pad it")
        return H // p, W // p

    def positions(self, h, w):
        """The position embedding for an (h, w) grid: (1, 1 + N, Dv), a new tensor unless native."""
        cls, grid = self.positional_embedding[:1], self.positional_embedding[1:]   # (1, Dv), (side^2, Dv)
        side = round(len(grid) ** 0.5)
        if (h, w) != (side, side):
            grid = grid.T.reshape(1, -1, side, side)                               # (1, Dv, side, side)
            grid = F.interpolate(grid, (h, w), mode="bicubic", align_corners=False, antialias=True)
            grid = grid.flatten(2)[0].T                                            # (N, Dv)
        return torch.cat([cls, grid])[None]                                        # (1, 1 + N, Dv)

    def embed(self, pixels):
        """pixels (B, 3, H, W) -> tokens before the first block (B, 1 + N, Dv), class token first."""
        h, w = self.grid(pixels)
        x = self.stem(pixels) if hasattr(self, "stem") else pixels
        x = self.conv1(x).flatten(2).transpose(1, 2)                               # (B, N, Dv)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)      # (B, 1 + N, Dv)
        return self.ln_pre(x + self.positions(h, w))

    def forward(self, pixels):
        """pixels (B, 3, H, W) -> image features (B, D)."""
        x = self.transformer(self.embed(pixels))
        return self.ln_post(x[:, 0]) @ self.proj                                   # (B, D)


class CLIP(nn.Module):
    """Both towers. Sizes as in OpenAI's configuration; `stem` is ours (see Stem)."""

    def __init__(self, *, embed_dim, image_resolution, vision_layers, vision_width, vision_patch_size,
                 context_length, vocab_size, transformer_width, transformer_layers, stem=()):
        super().__init__()
        self.context_length = context_length
        self.visual = VisionTransformer(
            resolution=image_resolution, patch_size=vision_patch_size, width=vision_width,
            layers=vision_layers, heads=vision_width // 64, embed_dim=embed_dim, stem=stem)
        self.transformer = Transformer(transformer_width, transformer_layers, transformer_width // 64)
        self.token_embedding = nn.Embedding(vocab_size, transformer_width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(context_length, transformer_width))
        self.ln_final = nn.LayerNorm(transformer_width)
        self.text_projection = nn.Parameter(transformer_width ** -0.5 * torch.randn(transformer_width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def encode_image(self, pixels):
        """pixels (B, 3, H, W) -> image features (B, D), not normalised."""
        return self.visual(pixels)

    def encode_patches(self, pixels, levels=(), dense=None):
        """Patch tokens at several depths, and the dense features in the joint space.

        pixels: (B, 3, H, W), sides multiples of the patch. levels: blocks counted from 1.
        dense: attention of the last block, for features that stay with their patch:
            None   OpenAI's own
            "vv"   values attend to values (MaskCLIP and CLIP-Surgery, simplified)
            "qqkk" mean of query-query and key-key attention (SCLIP)
            The dense forms also leave out the last block's residual and MLP (ClearCLIP).
        Returns: [(B, N, Dv) for each level], dense features (B, N, D), not normalised.
        """
        x, found = self.visual.embed(pixels), {}                                   # (B, 1 + N, Dv)
        last = len(self.visual.transformer.resblocks)
        assert all(1 <= level <= last for level in levels), f"levels {levels} of {last} blocks"
        for depth, block in enumerate(self.visual.transformer.resblocks, start=1):
            if dense and depth == last:
                found[depth] = block.attn(block.ln_1(x), dense=dense)              # (B, 1 + N, Dv)
            else:
                found[depth] = block(x)                                            # (B, 1 + N, Dv)
            x = found[depth]
        features = self.visual.ln_post(x[:, 1:]) @ self.visual.proj                # (B, N, D)
        return [found[level][:, 1:] for level in levels], features

    def encode_prompts(self, embeddings, end):
        """Prompt embeddings of any length through the text tower.

        embeddings: (B, L, Dt) without positions, L at most `context_length`. end: (B,) or int, the
        place of the end token. The attention is causal: what stands after `end` changes nothing.
        Returns: text features (B, D), not normalised.
        """
        B, L, _ = embeddings.shape
        x = self.transformer(embeddings + self.positional_embedding[:L], causal=True)  # (B, L, Dt)
        end = torch.as_tensor(end, device=x.device).expand(B)
        x = x[torch.arange(B, device=x.device), end]                               # (B, Dt)
        return self.ln_final(x) @ self.text_projection                             # (B, D)

    def encode_text(self, tokens):
        """Token ids (B, L) -> text features (B, D), not normalised. The end token has the highest id."""
        return self.encode_prompts(self.token_embedding(tokens), tokens.argmax(dim=-1))

    def forward(self, pixels, tokens):
        """Cosines times the temperature: (logits per image (B, T), logits per text (T, B))."""
        image = F.normalize(self.encode_image(pixels), dim=-1)
        text = F.normalize(self.encode_text(tokens), dim=-1)
        logits = self.logit_scale.exp() * image @ text.T                           # (B, T)
        return logits, logits.T
