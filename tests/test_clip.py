"""CLIP: OpenAI's outputs and ids; LoRA and stem; files read safely; downloads."""
import functools
import gzip
import hashlib
import http.server
import json
import os
import pickle
import threading
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import clip
import mini
from mini import close

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def reference():
    """Random weights of a small CLIP, inputs, and the outputs of OpenAI's own code in fp32."""
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


@pytest.mark.skipif(not clip.cached(clip.VOCABULARY).is_file(), reason="no vocabulary")
def test_ids_equal_openais():
    for entry in json.loads((HERE / "clip_tokens.json").read_text()):
        ids = [49406, *entry["ids"], 49407]
        if len(ids) <= 77:
            row = clip.tokenize(entry["text"])[0].tolist()
            assert row == ids + [0] * (77 - len(ids)), entry["text"]


def test_bytes_alone_need_no_vocabulary(monkeypatch):
    monkeypatch.setattr(clip, "fetch", None)
    clip.Tokenizer.cache_clear()
    tokens = clip.tokenize(["Ab!", "", "&amp;amp;lt;"], 8, vocab_size=514)
    assert tokens.tolist() == [
        [512, 64, 65 + 256, 256, 513, 0, 0, 0],
        [512, 513, 0, 0, 0, 0, 0, 0],
        [512, 27 + 256, 513, 0, 0, 0, 0, 0]]
    text = "".join(map(chr, range(0x3000)))
    assert clip.tokenize(text, 1 << 20, vocab_size=514).max() == 513
    assert clip.Tokenizer(514) is clip.Tokenizer(514)          # built once


def test_a_text_that_is_too_long():
    assert clip.tokenize("a " * 75, vocab_size=514)[0, -1] == 513
    with pytest.raises(ValueError, match=r"78 tokens.*'a a a "):
        clip.tokenize(["short", "a " * 76], vocab_size=514)


def test_merges_in_the_order_they_were_learned(monkeypatch, tmp_path):
    content = gzip.compress(b"#version: 0\nl o\nlo w</w>\ne r\no w\na a\n")
    (tmp_path / clip.VOCABULARY.rpartition("/")[2]).write_bytes(content)
    monkeypatch.setattr(clip, "VOCABULARY_SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setenv("CLIP_CACHE", str(tmp_path))

    tokenizer = clip.Tokenizer(519)
    pieces = tokenizer.pieces("low lower aaab <|endoftext|>")
    assert pieces[1:-1] == ["low</w>", "lo", "w", "e", "r</w>", "aa", "a", "b</w>", "<|endoftext|>"]
    assert tokenizer.ids["lo"] == 512
    assert tokenizer.ids["<|endoftext|>"] == 518


@pytest.mark.parametrize("half", [False, True])
@torch.no_grad()
def test_outputs_equal_openais(reference, model, half):
    pixels = reference["input/pixels"]
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        levels, patches = model.encode_patches(pixels, [1])
        found = {"image_features": model.encode_image(pixels),
                 "patch_features": patches,
                 "text_features": model.encode_text(reference["input/token_ids"])}
    assert levels[0].dtype == (torch.bfloat16 if half else torch.float32)
    for name, x in found.items():
        expected = reference[f"output/{name}"]
        assert close(x.float(), expected) != half
        assert F.cosine_similarity(x.float(), expected, dim=-1).min() > 0.999


def test_normalize():
    white = clip.normalize(torch.ones(1, 3, 1, 1)).flatten()
    expected = torch.tensor([1.9303, 2.0749, 2.1459])
    assert close(white, expected, 1e-4)


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


@pytest.mark.parametrize("size", [(16, 16), (64, 64), (48, 160), (224, 96)])
@torch.no_grad()
def test_patches_of_any_size(model, size):
    pixels = torch.randn(2, 3, *size)
    levels, features = model.encode_patches(pixels, [3, 1])
    h, w = model.visual.grid(pixels)
    assert (h, w) == (size[0] // 16, size[1] // 16)
    assert levels[0].shape == (2, h * w, 128)
    assert features.shape == (2, h * w, 48)

    last = model.visual.ln_post(levels[0]) @ model.visual.proj         # level 3 is the last block
    assert close(features, last)
    assert close(features[:1], model.encode_patches(pixels[:1])[1])


@torch.no_grad()
def test_interpolated_positions_keep_their_place(weights):
    model = clip.build(weights)
    assert torch.equal(model.visual.positions(4, 4), model.visual.positional_embedding)
    ramp = torch.arange(4.0).repeat(4)                         # grows from left to right
    model.visual.positional_embedding[1:] = ramp[:, None]
    grid = model.visual.positions(4, 8)[1:, 0].view(4, 8)
    assert close(grid, grid[:1].expand(4, 8))
    assert (grid[0].diff() > 0).all()


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

    last = int(end[0])                                         # one prompt, `end` a plain int
    assert close(model.encode_prompts(embeddings[:1, :last + 1], last), expected[:1])
    embeddings[:, length:] = 1e3                               # what follows the end is not seen
    assert close(model.encode_prompts(embeddings, end), expected)


def test_lora_starts_as_the_identity_and_trains_alone(weights, reference):
    torch.manual_seed(0)
    model = clip.build(weights)
    pixels = reference["input/pixels"]
    plain = model.encode_image(pixels).detach()
    clip.add_lora(model.visual, rank=4, alpha=8)               # 3 blocks, A and B
    assert torch.equal(model.encode_image(pixels), plain)

    added = [p for p in model.visual.parameters() if p.requires_grad]
    assert [tuple(p.shape) for p in added] == [(4, 128), (384, 4)] * 3
    optimizer = torch.optim.SGD(added, lr=0.1)
    for _ in range(2):                                         # A has a gradient once B is not 0
        optimizer.zero_grad()
        model.encode_image(pixels).square().mean().backward()
        optimizer.step()
    assert all(p.grad.abs().sum() > 0 for p in added)
    lora = model.visual.transformer.resblocks[0].attn.lora
    x = torch.randn(5, 128)
    assert close(lora(x), 8 / 4 * x @ (lora.B @ lora.A).T)


@torch.no_grad()
def test_the_stem_starts_at_zero_and_sees_a_residual_in_float32():
    torch.manual_seed(0)
    stem = clip.Stem((8, 16, 24), 64)
    pixels = torch.randn(2, 3, 32, 48)
    seen = []
    stem[0].register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))
    with torch.autocast("cpu", torch.bfloat16):
        output = stem(pixels)
    assert output.shape == (2, 64, 2, 3)
    assert not output.any()

    row = torch.tensor([1.0, 2.0, 1.0]) / 4
    kernel = (row[:, None] * row).expand(3, 1, 3, 3)
    padded = F.pad(pixels, (1, 1, 1, 1), mode="replicate")
    blurred = F.conv2d(padded, kernel, groups=3)
    assert seen[0].dtype == torch.float32
    assert close(seen[0], (8 * (pixels - blurred)).tanh())


@pytest.fixture(scope="module")
def official(weights, reference, tmp_path_factory):
    """An archive as OpenAI publishes them: TorchScript, fp16, with integers."""
    model = clip.build(weights).half()
    model.register_buffer("vocab_size", torch.tensor(600))
    path = tmp_path_factory.mktemp("official") / "ViT.pt"
    inputs = {"encode_image": reference["input/pixels"].half()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace_module(model, inputs), path)
    return path


def test_torchscript_archive(official, weights, monkeypatch):
    monkeypatch.setattr(torch.jit, "load", None)               # it would compile the file's code
    trusted = set(torch.serialization.get_safe_globals())
    read = clip.read_archive(official)
    assert read.keys() - weights.keys() == {"vocab_size"}
    for key, value in weights.items():
        assert torch.equal(read[key], value)
    assert set(torch.serialization.get_safe_globals()) == trusted

    model = clip.load(official)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_wrapped_state_dicts(tmp_path, weights):
    parallel = {f"module.{key}": value for key, value in weights.items()}
    for content in (
            weights,
            parallel,
            {"epoch": 3, "state_dict": parallel},
            {"model": weights, "optimizer": {"state": {0: {"step": 1}}}},
            {"format": 6, "clip": weights, "model": {"bias": torch.zeros(0)}}):    # SAPL
        torch.save(content, tmp_path / "w.pt")
        read = clip.read_archive(tmp_path / "w.pt")
        assert read.keys() == weights.keys()
        assert all(torch.equal(read[key], weights[key]) for key in weights)


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
    "os.system": pickle.dumps({"w": Evil()}, 2),
    "a function of torch": b"\x80\x02ctorch\nload\nX\x03\x00\x00\x00a/b\x85R.",
    "a class of TorchScript": b"\x80\x02c__torch__.os\nsystem\nX\x01\x00\x00\x00a\x85R.",
    "a dictionary in itself": b"\x80\x02}q\x00(X\x01\x00\x00\x00ah\x00u.",
    "dictionaries twice in dictionaries": doubled(60),
    "cut": doubled(3)[:-5],
    "empty": b"",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_pickles(tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("hostile.pt", "w") as archive:
        archive.writestr("w/version", "3")
        archive.writestr("w/data.pkl", HOSTILE[what])
    with pytest.raises(ValueError, match="no readable weights|do not fit") as error:
        clip.load("hostile.pt")
    assert "\n" not in str(error.value)
    assert os.listdir() == ["hostile.pt"]


def test_damaged_files(tmp_path, official):
    path = tmp_path / "w.pt"
    for content in (official.read_bytes()[:20_000], b"not a zip", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"no readable weights in {path}"):
            clip.load(path)


MISFITS = {                                    # what is replaced, added, or (None) left out
    "ln_final.bias": {"ln_final.bias": None},
    "Unexpected.*surplus": {"surplus": torch.zeros(3)},
    "visual.proj": {"visual.proj": torch.zeros(100, 48)},
    "positional_embedding": {"visual.positional_embedding": torch.zeros(18, 128)},
    "ResNet": {"visual.positional_embedding": None, "visual.layer1.0.bn1.bias": torch.zeros(1)},
}


@pytest.mark.parametrize("message", MISFITS)
def test_weights_that_do_not_fit(weights, message):
    state = {key: x for key, x in (weights | MISFITS[message]).items() if x is not None}
    with pytest.raises(ValueError, match=message) as error:
        clip.build(state)
    assert "\n" not in str(error.value)


def test_a_programmers_error_keeps_its_traceback(weights, monkeypatch):
    monkeypatch.delattr(clip, "Transformer")
    with pytest.raises(NameError, match="Transformer"):
        clip.build(weights)


@pytest.mark.parametrize("stem", [(), (8, 16, 24)])
@torch.no_grad()
def test_the_stem_and_any_size_are_inferred(stem):
    model = mini.mini_clip(stem=stem)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    copy = clip.build(model.state_dict())
    assert copy.visual.patch_size == 16
    assert len(copy.positional_embedding) == 77
    pixels = torch.randn(2, 3, 32, 48)
    expected = model.encode_image(pixels)
    assert torch.equal(copy.encode_image(pixels), expected)
    copy.visual.proj.zero_()                                   # its weights are its own
    assert torch.equal(model.encode_image(pixels), expected)


@pytest.mark.parametrize("name", ["RN50", "ViT-B/8", str(HERE)])
def test_names_that_do_not_exist(name):
    with pytest.raises(ValueError, match="ViT-L/14@336px") as error:
        clip.load(name)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


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


@pytest.mark.parametrize("name", ["file.pt", "absent.pt"])
def test_failed_downloads_change_nothing_and_say_what_is_needed(web, tmp_path, name):
    folder, url = web
    (folder / "file.pt").write_bytes(b"another file")
    path = tmp_path / "cache" / name
    path.parent.mkdir()
    path.write_bytes(b"an older file")
    with pytest.raises(OSError, match=f"could not download {url}/{name}.*--clip tiny") as error:
        clip.fetch(f"{url}/{name}", "0" * 64)
    assert f"put the weights and {clip.VOCABULARY} into {path.parent}" in str(error.value)
    assert "\n" not in str(error.value)
    assert os.listdir(path.parent) == [name]
    assert path.read_bytes() == b"an older file"


def test_official_names_are_downloaded_once_and_checked(web, tmp_path, monkeypatch, official):
    folder, url = web
    content = official.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    served = folder / sha256 / "ViT-L-14-336px.pt"             # as in OpenAI's addresses
    served.parent.mkdir()
    served.write_bytes(content)
    monkeypatch.setattr(clip, "MODELS", url)
    monkeypatch.setitem(clip.OFFICIAL, "ViT-L/14@336px", sha256)
    clip.load("ViT-L/14@336px")
    assert os.listdir(tmp_path / "cache") == [served.name]

    served.unlink()                                            # now it must be found in the cache
    clip.load("ViT-L/14@336px")
