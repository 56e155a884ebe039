"""CLIP: equal to OpenAI's outputs and ids; files read safely; downloads; LoRA; number formats."""
import functools
import gzip
import hashlib
import http.server
import io
import json
import math
import os
import pickle
import resource
import threading
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import clip

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def reference():
    """Random weights of a small CLIP, inputs, and what OpenAI's own code gives for them in fp32."""
    with np.load(HERE / "clip_reference.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file}


@pytest.fixture(scope="module")
def weights(reference):
    """The weights alone, with OpenAI's keys."""
    return {key.removeprefix("weights/"): value for key, value in reference.items()
            if key.startswith("weights/")}


@pytest.fixture(scope="module")
def model(weights):
    """Image width 128, 3 blocks, 16-pixel patches, 64 pixels; text width 64, 2 blocks."""
    return clip.build(weights)


def close(a, b, tolerance=1e-5):
    return torch.allclose(a, b, rtol=0, atol=tolerance)


# ------------------------------------------------------------------------------------- tokenizer

@pytest.fixture
def vocabulary(monkeypatch):
    """OpenAI's vocabulary file, if this machine has it."""
    path = clip.cached(clip.VOCABULARY)
    for folder in (path.parent, HERE.parents[1] / "shared" / "clip"):
        if (folder / path.name).is_file():
            monkeypatch.setenv("CLIP_CACHE", str(folder))
            return
    pytest.skip(f"no {path}")


def test_ids_equal_openais(vocabulary):
    short = 0
    for entry in json.loads((HERE / "clip_tokens.json").read_text()):
        ids = [49406, *entry["ids"], 49407]
        if len(ids) <= 77:
            short += 1
            row = clip.tokenize(entry["text"])[0].tolist()
            assert row == ids + [0] * (77 - len(ids)), entry["text"]
    assert short > 10


def test_bytes_alone_need_no_vocabulary(monkeypatch):
    monkeypatch.setattr(clip, "fetch", None)
    tokens = clip.tokenize("Ab!", 8, vocab_size=514)
    assert tokens.tolist() == [[512, 64, 65 + 256, 256, 513, 0, 0, 0]]
    assert clip.tokenize("", 4, vocab_size=514).tolist() == [[512, 513, 0, 0]]
    less_than = clip.tokenize("&amp;amp;lt;", 3, vocab_size=514)
    assert less_than.tolist() == [[512, 27 + 256, 513]]

    text = "".join(map(chr, range(0x3000))) + "😀👩‍👩‍👧‍👦"
    assert clip.tokenize(text, 1 << 20, vocab_size=514).max() == 513


def test_long_texts_are_an_error():
    text = "a " * 75
    fits = clip.tokenize(text, vocab_size=514)
    assert fits.tolist() == [[512, *[64 + 256] * 75, 513]]
    with pytest.raises(ValueError, match=r"78 tokens.*'a a a "):
        clip.tokenize(["short", text + "a"], vocab_size=514)


def test_merges_in_the_order_they_were_learned(monkeypatch, tmp_path):
    content = gzip.compress(b"#version: 0\nl o\nlo w</w>\ne r\no w\na a\n")
    (tmp_path / clip.VOCABULARY.rpartition("/")[2]).write_bytes(content)
    monkeypatch.setattr(clip, "VOCABULARY_SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setenv("CLIP_CACHE", str(tmp_path))

    tokenizer = clip.Tokenizer(519)
    pieces = tokenizer.pieces("low lower aaab <|endoftext|>")
    assert pieces[1:-1] == ["low</w>", "lo", "w", "e", "r</w>", "aa", "a", "b</w>", "<|endoftext|>"]
    assert tokenizer.ids["lo"] == 512 and tokenizer.ids["<|endoftext|>"] == 518
    first_merge_only = clip.Tokenizer(515)
    assert first_merge_only.pieces("low")[1:-1] == ["lo", "w</w>"]


# ---------------------------------------------------------------------------------------- towers

@torch.no_grad()
def test_outputs_equal_openais(reference, model):
    pixels = reference["input/pixels"]
    tokens = reference["input/token_ids"]
    assert close(model.encode_image(pixels), reference["output/image_features"])
    assert close(model.encode_patches(pixels)[1], reference["output/patch_features"])
    assert close(model.encode_text(tokens), reference["output/text_features"])
    per_image, per_text = model(pixels, tokens)
    assert close(per_image, reference["output/logits_per_image"])
    assert torch.equal(per_text, per_image.T)


def test_normalize():
    mean = torch.tensor(clip.MEAN).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    assert close(clip.normalize(mean), torch.zeros(2, 3, 4, 4), 1e-6)
    white = clip.normalize(torch.ones(1, 3, 1, 1)).flatten()
    assert close(white, torch.tensor([1.9303, 2.0749, 2.1459]), 1e-4)


@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_attention_equals_torchs(causal):
    torch.manual_seed(0)
    ours = clip.Attention(128, causal)
    theirs = nn.MultiheadAttention(128, 2, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 9, 128)
    mask = nn.Transformer.generate_square_subsequent_mask(9) if causal else None
    assert close(ours(x), theirs(x, x, x, attn_mask=mask, need_weights=False)[0], 1e-6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 7])
def test_both_forms_of_attention_are_equal(causal, length):
    """In bfloat16 with gradients a CPU takes the written-out form, in float32 the fused one."""
    torch.manual_seed(0)
    inputs = torch.randn(3, 2, 4, length, 16).bfloat16().float()               # q, k and v

    def result_and_gradient(dtype):
        given = inputs.to(dtype).requires_grad_()
        output = clip.attend(*given, causal)
        gradient, = torch.autograd.grad(output.float().cos().sum(), given)
        return output.float(), gradient.float()

    plain = result_and_gradient(torch.bfloat16)
    fused = result_and_gradient(torch.float32)
    assert not torch.equal(plain[0], fused[0]) or length == 1
    assert close(plain[0], fused[0], 0.02)
    assert close(plain[1], fused[1], 0.03)


def test_the_fused_form_is_used_where_it_is_faster(monkeypatch):
    asked = []
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda q, k, v, is_causal: asked.append(q.dtype))
    q = torch.randn(1, 2, 4, 8)
    half = q.bfloat16()
    clip.attend(half, half, half, causal=False)                                # no gradient
    clip.attend(q.requires_grad_(), q, q, causal=False)
    assert asked == [torch.bfloat16, torch.float32]
    half.requires_grad_()
    clip.attend(half, half, half, causal=True)
    assert len(asked) == 2


def test_the_fused_form_is_used_off_the_cpu(monkeypatch):
    asked = []
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda q, k, v, is_causal: asked.append(is_causal))
    q = torch.empty(1, 2, 4, 8, device="meta")
    clip.attend(q, q, q, causal=True)
    clip.attend(q, q, q, causal=False)
    assert asked == [True, False]


@torch.no_grad()
def test_mlp_equals_openais_formula():
    torch.manual_seed(0)
    mlp = clip.MLP(32)
    nn.init.normal_(mlp.c_fc.weight)
    x = torch.randn(2, 5, 32)
    hidden = mlp.c_fc(x)
    assert close(mlp(x), mlp.c_proj(hidden * torch.sigmoid(1.702 * hidden)))


@pytest.mark.parametrize("size", [(16, 16), (64, 64), (48, 160), (224, 96)])
@torch.no_grad()
def test_patches_of_any_size(model, size):
    before = model.visual.positional_embedding.clone()
    pixels = torch.randn(2, 3, *size)
    levels, features = model.encode_patches(pixels, [3, 1])
    h, w = model.visual.grid(pixels)
    assert (h, w) == (size[0] // 16, size[1] // 16)
    assert [level.shape for level in levels] == [(2, h * w, 128)] * 2
    assert features.shape == (2, h * w, 48)

    last = model.visual.ln_post(levels[0]) @ model.visual.proj         # level 3 is the last block
    assert close(features, last)
    assert close(features[:1], model.encode_patches(pixels[:1])[1])
    assert torch.equal(before, model.visual.positional_embedding)


@torch.no_grad()
def test_interpolated_positions_keep_their_place(weights):
    model = clip.build(weights)
    assert torch.equal(model.visual.positions(4, 4)[0], model.visual.positional_embedding)

    ramp = torch.arange(4.0).repeat(4)                         # grows to the right only
    model.visual.positional_embedding[1:] = ramp[:, None]
    grid = model.visual.positions(4, 8)[0, 1:, 0].view(4, 8)
    assert close(grid, grid[:1].expand(4, 8))
    assert (grid[0].diff() > 0).all()
    assert close(grid.mean(), ramp.mean(), 1e-3)


@pytest.mark.parametrize("size", [(63, 64), (64, 8), (0, 64)])
def test_sizes_that_do_not_fit_are_an_error(model, size):
    with pytest.raises(ValueError, match="multiples of 16"):
        model.encode_image(torch.zeros(1, 3, *size))


@torch.no_grad()
def test_short_prompts_equal_77_tokens(model, reference):
    tokens = reference["input/token_ids"]
    expected = reference["output/text_features"]
    embeddings = model.token_embedding(tokens)
    end = tokens.argmax(dim=-1)
    length = int(end.max()) + 1
    assert close(model.encode_prompts(embeddings[:, :length], end), expected)

    for row in range(len(tokens)):                             # its own length, `end` a plain int
        own = embeddings[row:row + 1, :end[row] + 1]
        assert close(model.encode_prompts(own, int(end[row])), expected[row:row + 1])

    embeddings[:, length:] = 1e3                               # what follows the end says nothing
    assert close(model.encode_prompts(embeddings, end), expected)


@torch.no_grad()
def test_the_stem_sees_noise_and_starts_at_zero():
    torch.manual_seed(0)
    stem = clip.Stem((8, 16, 24), 64)
    pixels = torch.randn(2, 3, 32, 48)
    assert torch.equal(stem(pixels), torch.zeros(2, 64, 2, 3))

    nn.init.normal_(stem[-1].weight)
    assert not close(stem(pixels)[0], stem(pixels)[1], 0.1)
    assert close(stem(torch.full_like(pixels, 0.3)), stem(torch.zeros_like(pixels)))   # flat


# ------------------------------------------------------------------------------------------ LoRA

def test_lora_starts_as_the_identity_trains_alone_and_merges(weights, reference):
    torch.manual_seed(0)
    model = clip.build(weights)
    pixels = reference["input/pixels"]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plain = model.encode_image(pixels).detach()

    clip.add_lora(model.visual, rank=4, alpha=8)               # 3 blocks, A and B
    added = [p for p in model.visual.parameters() if p.requires_grad]
    assert [tuple(p.shape) for p in added] == [(4, 128), (384, 4)] * 3
    assert torch.equal(model.encode_image(pixels), plain)

    optimizer = torch.optim.SGD(added, lr=0.1)
    for _ in range(2):                                         # A has a gradient once B is not 0
        optimizer.zero_grad()
        model.encode_image(pixels).square().mean().backward()
        optimizer.step()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if ".lora." in name}
    assert all(p.grad.abs().sum() > 0 for p in added)
    tuned = model.encode_image(pixels).detach()
    assert not close(tuned, plain, 1e-4)

    clip.merge_lora(model)
    assert close(model.encode_image(pixels), tuned)
    state = model.state_dict()
    assert state.keys() == before.keys()
    changed = {key for key in state if not torch.equal(state[key], before[key])}
    assert changed == {f"visual.transformer.resblocks.{i}.attn.in_proj_weight" for i in range(3)}


@torch.no_grad()
def test_lora_is_the_stated_product():
    change = clip.LoRA(torch.zeros(6, 4), rank=2, alpha=6)
    change.B.normal_()
    assert close(change(torch.eye(4)).T, 3 * change.B @ change.A)


# ------------------------------------------------------------------------------ files of weights

class Official(nn.Module):
    """A module with OpenAI's names that can be traced: weights fp16, norms fp32, three notes."""

    def __init__(self, weights):
        super().__init__()
        for key, value in weights.items():
            *path, name = key.split(".")
            module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            value = value.float() if "ln_" in key else value.half()
            module.register_parameter(name, nn.Parameter(value))
        for name in ("input_resolution", "context_length", "vocab_size"):
            self.register_buffer(name, torch.tensor(77))

    def forward(self, x):
        return x * self.logit_scale


@pytest.fixture(scope="module")
def official(weights, tmp_path_factory):
    """An archive as OpenAI publishes them."""
    path = tmp_path_factory.mktemp("official") / "ViT.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(Official(weights), torch.zeros(1)), path)
    return path


def test_torchscript_archive(official, reference, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = torch.jit.load(official).state_dict()
    monkeypatch.setattr(torch.jit, "load", None)               # they would run the file's code
    monkeypatch.setattr(torch, "load", None)

    ours = clip.read_archive(official)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype and torch.equal(ours[key], value)

    model = clip.load(official)
    assert model.name == str(official) and not model.training
    assert model.sha256 == hashlib.sha256(official.read_bytes()).hexdigest()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with torch.no_grad():
        features = model.encode_image(reference["input/pixels"])
    assert close(features, reference["output/image_features"])


def test_state_dicts_and_checkpoints(tmp_path, weights):
    expected = clip.build(weights).state_dict()
    checkpoint = {"format": 4, "clip": weights, "config": {"levels": (1, 2)},
                  "model": {"bias": torch.zeros(0)}, "optimizer": {"state": {0: {"step": 1}}}}
    for content in (weights, expected, checkpoint):
        torch.save(content, tmp_path / "w.pt")
        state = clip.load(tmp_path / "w.pt").state_dict()
        assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_strides_offsets_types_and_sharing(tmp_path):
    base = torch.arange(24.0)
    tensors = dict(t=base.view(4, 6).T, part=base[5:17].view(3, 4), step=base[1::3], scalar=base[7],
                   half=base.half(), brain=base.bfloat16(), double=base.double(), long=base.long(),
                   byte=base.byte(), truth=base > 5, int=base.int())
    torch.save(tensors, tmp_path / "t.pt")
    read = clip.read_archive(tmp_path / "t.pt")
    for key, value in tensors.items():
        assert torch.equal(read[key], value)
        assert read[key].dtype == value.dtype
        assert read[key].stride() == value.stride()
        assert read[key].storage_offset() == value.storage_offset()
    own = read["t"].untyped_storage()                          # one storage for all its views
    assert own.data_ptr() == read["step"].untyped_storage().data_ptr()


def tensor_program(length=4, shape=(4,), stride=(1,), offset=0, key="0"):
    """The pickle of {"w": tensor} as torch writes it, with any numbers in it."""
    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (
                "the storage", offset, shape, stride, False, OrderedDict())

    class Pickler(pickle.Pickler):
        def persistent_id(self, x):
            if x == "the storage":
                return "storage", torch.FloatStorage, key, "cpu", length

    file = io.BytesIO()
    Pickler(file, protocol=2).dump({"w": Tensor()})
    return file.getvalue()


def write_archive(path, entries):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def test_tensor_program_is_what_torch_writes(tmp_path):
    program = tensor_program(shape=(2, 2), stride=(1, 2))
    storage = torch.arange(4.0).numpy().tobytes()
    path = write_archive(tmp_path / "w.pt", {"w/data.pkl": program, "w/data/0": storage})
    assert clip.read_archive(path)["w"].tolist() == [[0, 2], [1, 3]]


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil_was_here",)


def doubled(depth):
    """A pickle of a dictionary that holds another twice, which holds another twice, .."""
    node = {}
    for _ in range(depth):
        node = {"a": node, "b": node}
    return pickle.dumps(node, 2)


HOSTILE = {
    "os.system": (pickle.dumps({"w": Evil()}, 2), "asks for (posix|nt).system"),
    "builtins": (b"\x80\x02c__builtin__\neval\nX\x03\x00\x00\x001+1\x85R.", "asks for"),
    "module of torch": (b"\x80\x02ctorch\nload\nX\x03\x00\x00\x00a/b\x85R.", "asks for torch.load"),
    "storage of torch": (b"\x80\x02ctorch\nUntypedStorage\n)R.", "asks for torch.UntypedStorage"),
    "short storage": (tensor_program(length=400, shape=(400,)), "twice|bounds"),
    "view too far": (tensor_program(shape=(2,), stride=(7,)), "bounds"),
    "offset too far": (tensor_program(shape=(1,), offset=4), "bounds"),
    "negative offset": (tensor_program(shape=(1,), offset=-1), "no readable archive"),
    "negative size": (tensor_program(shape=(-4,)), "no readable archive"),
    "negative stride": (tensor_program(shape=(2,), stride=(-1,)), "no readable archive"),
    "expanded to 4 TB": (tensor_program(shape=(2 ** 40,), stride=(0,)), "no CLIP"),
    "absurd sizes": (
        tensor_program(shape=(2 ** 62, 2 ** 62), stride=(1, 1)), "no readable archive"),
    "path outside": (tensor_program(key="../../../../../../etc/passwd"), "etc/passwd"),
    "absolute path": (tensor_program(key="/etc/passwd"), "etc/passwd"),
    "absurd bytes": (b"\x80\x05\x96\x00\x00\x00\x00\x00\x01\x00\x00.", "no readable archive"),
    "dictionary twice in itself": (
        b"\x80\x02}q\x00(X\x01\x00\x00\x00ah\x00X\x01\x00\x00\x00bh\x00u.", "no CLIP"),
    "dictionaries twice in dictionaries": (doubled(60), "no CLIP"),
    "no end": (b"\x80\x02}", "no readable archive"),
    "empty": (b"", "no readable archive"),
    "no dictionary": (b"\x80\x02K\x01.", "no CLIP"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_pickles(tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    program, message = HOSTILE[what]
    path = write_archive("hostile.pt", {"w/data.pkl": program, "w/data/0": bytes(16)})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=message) as error:
        clip.load(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10      # KiB
    assert os.listdir() == ["hostile.pt"]


DAMAGE = {
    "truncated": lambda content: content[:len(content) // 2],
    "overwritten": lambda content: content[:20_000] + b"damage" + content[20_006:],
    "not a zip": lambda content: b"\x80\x02}q\x00." * 100,
    "empty": lambda content: b"",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files(tmp_path, official, damage):
    (tmp_path / "w.pt").write_bytes(DAMAGE[damage](official.read_bytes()))
    with pytest.raises(ValueError, match="w.pt: no readable archive") as error:
        clip.load(tmp_path / "w.pt")
    assert "\n" not in str(error.value)


INCOMPLETE = {
    "no index": {"w/data/0": bytes(16)},
    "two indices": {"v/data.pkl": tensor_program(), "w/data.pkl": tensor_program()},
    "no storage": {"w/data.pkl": tensor_program()},
    "short storage": {"w/data.pkl": tensor_program(), "w/data/0": bytes(12)},
}


@pytest.mark.parametrize("what", INCOMPLETE)
def test_incomplete_archives(tmp_path, what):
    path = write_archive(tmp_path / "w.pt", INCOMPLETE[what])
    with pytest.raises(ValueError, match="w.pt: no readable archive"):
        clip.load(path)


MISFITS = {                                    # what is replaced, added, or (None) left out
    "ln_final.bias": {"ln_final.bias": None},
    "Unexpected.*surplus": {"surplus": torch.zeros(3)},
    "visual.proj": {"visual.proj": torch.zeros(100, 48)},
    "ResNet.*visual.conv1.weight": {"visual.conv1.weight": None},
    "visual.class_embedding": {"visual.class_embedding": torch.zeros(())},
    "tuple index": {"visual.conv1.weight": torch.zeros(())},
    "by zero": {"visual.conv1.weight": torch.zeros(128, 3, 0, 0)},
    "positional_embedding": {"visual.positional_embedding": torch.zeros(18, 128)},
    "NaN.*ln_post.bias": {"visual.ln_post.bias": torch.full((128,), math.nan)},
    "infinity.*text_projection": {"text_projection": torch.eye(64, 48).log()},
}


@pytest.mark.parametrize("message", MISFITS)
def test_weights_that_do_not_fit(weights, message):
    state = {key: x for key, x in (weights | MISFITS[message]).items() if x is not None}
    with pytest.raises(ValueError, match=message) as error:
        clip.build(state)
    assert "\n" not in str(error.value)


def test_resnets_are_refused(weights):
    resnet = {key: x for key, x in weights.items() if not key.startswith("visual.")}
    resnet["visual.layer1.0.conv1.weight"] = torch.zeros(8, 8, 1, 1)
    for state in (resnet, {}):
        with pytest.raises(ValueError, match="ResNet"):
            clip.build(state)


@pytest.mark.parametrize("stem", [(), (8, 16, 24)])
@torch.no_grad()
def test_the_stem_and_any_size_are_inferred(stem):
    torch.manual_seed(0)
    model = clip.CLIP(embed_dim=32, image_resolution=96, vision_layers=2, vision_width=64,
                      vision_patch_size=16, context_length=20, vocab_size=514,
                      transformer_width=64, transformer_layers=1, stem=stem).eval()
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    copy = clip.build(model.state_dict())
    assert copy.visual.patch_size == 16 and copy.context_length == 20
    pixels = torch.randn(2, 3, 32, 48)
    assert torch.equal(copy.encode_patches(pixels)[1], model.encode_patches(pixels)[1])

    expected = model.encode_image(pixels)                      # a copy: its weights are its own
    copy.visual.proj.zero_()
    assert torch.equal(model.encode_image(pixels), expected)


# embed_dim, pixels, image blocks and width, patch, text width, parameters as OpenAI published them
OPENAIS = {"ViT-B/32": (512, 224, 12, 768, 32, 512, 151_277_313),
           "ViT-B/16": (512, 224, 12, 768, 16, 512, 149_620_737),
           "ViT-L/14": (768, 224, 24, 1024, 14, 768, 427_616_513),
           "ViT-L/14@336px": (768, 336, 24, 1024, 14, 768, 427_944_193)}


@pytest.mark.parametrize("name", OPENAIS)
def test_sizes_of_the_official_models(name):
    embed, side, layers, width, patch, text, count = OPENAIS[name]
    with torch.device("meta"):
        model = clip.CLIP(embed_dim=embed, image_resolution=side, vision_layers=layers,
                          vision_width=width, vision_patch_size=patch, context_length=77,
                          vocab_size=49408, transformer_width=text, transformer_layers=12)
        assert model.encode_image(torch.empty(1, 3, side, side)).shape == (1, embed)
    assert sum(p.numel() for p in model.parameters()) == count
    assert model.visual.transformer.resblocks[0].attn.heads == width // 64
    assert len(clip.OFFICIAL[name]) == 64


@pytest.mark.parametrize("name", ["RN50", "ViT-B/8", str(HERE)])
def test_names_that_do_not_exist(name):
    with pytest.raises(ValueError, match="ViT-L/14@336px") as error:
        clip.load(name)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_the_shipped_model_is_a_clip():
    model = clip.load("tiny")
    assert model.name == "tiny" and len(model.token_embedding.weight) == 514
    assert model.encode_image(torch.zeros(1, 3, 64, 64)).isfinite().all()


# -------------------------------------------------------------------------------------- download

@pytest.fixture
def web(monkeypatch, tmp_path):
    """A folder and the address at which its files are served; tmp_path/cache is the cache."""
    folder = tmp_path / "web"
    folder.mkdir()
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("CLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_where_downloads_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("CLIP_CACHE", raising=False)
    assert clip.cached("https://there/of/file.pt") == tmp_path / ".cache" / "clip" / "file.pt"
    monkeypatch.setenv("CLIP_CACHE", "~/elsewhere")
    assert clip.cached("https://there/of/file.pt") == tmp_path / "elsewhere" / "file.pt"


def test_a_file_is_downloaded_once(web, tmp_path, capsys):
    folder, url = web
    content = bytes(range(256)) * 1024
    sha256 = hashlib.sha256(content).hexdigest()
    (folder / "file.pt").write_bytes(content)
    path = clip.fetch(f"{url}/file.pt", sha256)
    assert path.read_bytes() == content
    assert "100" in capsys.readouterr().err                    # a bar shows how far it is

    (folder / "file.pt").unlink()                              # now it must be found in the cache
    assert clip.fetch(f"{url}/file.pt", sha256) == path
    assert os.listdir(tmp_path / "cache") == ["file.pt"]


@pytest.mark.parametrize("served", [b"short", b"", None])
def test_failed_downloads_change_nothing(web, tmp_path, served):
    folder, url = web
    path = tmp_path / "cache" / "file.pt"
    path.parent.mkdir()
    path.write_bytes(b"an older file")
    if served is not None:                                     # else the server answers 404
        (folder / "file.pt").write_bytes(served)

    sha256 = hashlib.sha256(b"the right file").hexdigest()
    with pytest.raises(OSError) as error:
        clip.fetch(f"{url}/file.pt", sha256)
    message = str(error.value)
    for part in ("--clip tiny", sha256, str(path), f"{url}/file.pt"):
        assert part in message
    assert "\n" not in message
    assert os.listdir(path.parent) == ["file.pt"]
    assert path.read_bytes() == b"an older file"

    (folder / "file.pt").write_bytes(b"the right file")
    assert clip.fetch(f"{url}/file.pt", sha256).read_bytes() == b"the right file"


def test_official_names_are_downloaded_and_checked(web, tmp_path, monkeypatch, official):
    folder, url = web
    content = official.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    (folder / sha256).mkdir()                                  # as in OpenAI's addresses
    (folder / sha256 / "ViT-L-14-336px.pt").write_bytes(content)
    monkeypatch.setattr(clip, "MODELS", url)
    monkeypatch.setitem(clip.OFFICIAL, "ViT-L/14@336px", sha256)
    model = clip.load("ViT-L/14@336px")
    assert (model.name, model.sha256) == ("ViT-L/14@336px", sha256)
    assert os.listdir(tmp_path / "cache") == ["ViT-L-14-336px.pt"]


def test_offline(monkeypatch, tmp_path):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("CLIP_CACHE", str(tmp_path))
    monkeypatch.setattr(clip, "MODELS", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(OSError, match="found no .*ViT-B-16.pt.*--clip tiny") as error:
        clip.load("ViT-B/16")
    assert clip.OFFICIAL["ViT-B/16"] in str(error.value) and "\n" not in str(error.value)


# -------------------------------------------------------------------------------- number formats

@torch.no_grad()
def test_bfloat16_is_close_to_float32(model, reference):
    pixels = reference["input/pixels"]
    tokens = reference["input/token_ids"]
    with torch.autocast("cpu", torch.bfloat16):
        levels, patches = model.encode_patches(pixels, [1, 3])
        image = model.encode_image(pixels)
        text = model.encode_text(tokens)
    assert [level.dtype for level in levels] == [torch.bfloat16] * 2

    for half, full in ((patches, reference["output/patch_features"]),
                       (image, reference["output/image_features"]),
                       (text, reference["output/text_features"])):
        assert not torch.equal(half.float(), full)
        assert F.cosine_similarity(half.float(), full, dim=-1).min() > 0.999
