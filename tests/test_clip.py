"""CLIP: equal to OpenAI's outputs and ids; files read safely; downloads; prompts; LoRA."""
import gzip
import hashlib
import http.server
import json
import math
import os
import pickle
import resource
import struct
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn

import clip

HERE = Path(__file__).parent
NAME = clip.VOCABULARY.rpartition("/")[2]
FOLDER = next((folder for folder in (clip.CACHE, HERE.parents[1] / "shared" / "clip")
               if (folder / NAME).is_file()), None)
needs_vocabulary = pytest.mark.skipif(FOLDER is None, reason=f"no {NAME} in {clip.CACHE}")


@pytest.fixture(scope="module")
def reference():
    """Random weights of a small CLIP, inputs, and what OpenAI's own code gives for them in fp32."""
    with np.load(HERE / "clip_reference.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file}


@pytest.fixture(scope="module")
def weights(reference):
    return {key.removeprefix("weights/"): value for key, value in reference.items()
            if key.startswith("weights/")}


@pytest.fixture(scope="module")
def model(weights):
    return clip.build(weights)


def close(a, b, tolerance=1e-5):
    return torch.allclose(a, b, rtol=0, atol=tolerance)


# ---------------------------------------------------------------------------------------- towers

@torch.no_grad()
def test_outputs_equal_openais(reference, model):
    pixels, tokens = reference["input/pixels"], reference["input/token_ids"]
    assert close(model.encode_image(pixels), reference["output/image_features"])
    assert close(model.encode_text(tokens), reference["output/text_features"])
    assert close(model(pixels, tokens)[0], reference["output/logits_per_image"])
    assert torch.equal(model(pixels, tokens)[1], model(pixels, tokens)[0].T)
    assert close(model.encode_patches(pixels)[1], reference["output/patch_features"])


@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_attention_equals_torchs(causal):
    torch.manual_seed(0)
    ours, theirs = clip.Attention(128, causal), nn.MultiheadAttention(128, 2, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 9, 128)
    mask = nn.Transformer.generate_square_subsequent_mask(9) if causal else None
    assert close(ours(x), theirs(x, x, x, attn_mask=mask, need_weights=False)[0], 1e-6)


@torch.no_grad()
def test_dense_attention_is_value_to_value_and_query_to_query(model):
    attention, x = model.visual.transformer.resblocks[0].attn, torch.randn(2, 5, 128)
    q, k, v = (x @ attention.in_proj_weight.T + attention.in_proj_bias).view(2, 5, 3, 2, 64).unbind(2)

    def attend(a, b):
        share = torch.einsum("blhd,bmhd->bhlm", a, b).div(8).softmax(-1)
        return torch.einsum("bhlm,bmhd->blhd", share, v).flatten(2)

    assert close(attention(x, "vv"), attention.out_proj(attend(v, v)))
    assert close(attention(x, "qqkk"), attention.out_proj((attend(q, q) + attend(k, k)) / 2))


@pytest.mark.parametrize("size", [(16, 16), (64, 64), (48, 160), (224, 96)])
@pytest.mark.parametrize("dense", ["plain", "vv", "qqkk"])
@torch.no_grad()
def test_patches_of_any_size(model, size, dense):
    before = model.visual.positional_embedding.clone()
    pixels = torch.randn(2, 3, *size)
    levels, features = model.encode_patches(pixels, [3, 1], dense)
    h, w = model.visual.grid(pixels)
    assert (h, w) == (size[0] // 16, size[1] // 16)
    assert [level.shape for level in levels] == [(2, h * w, 128)] * 2
    assert features.shape == (2, h * w, 48) and features.isfinite().all()
    assert close(features[:1], model.encode_patches(pixels[:1], dense=dense)[1])
    assert torch.equal(before, model.visual.positional_embedding)
    expected = model.visual.ln_post(levels[0]) @ model.visual.proj     # level 3 is the last block
    assert close(features, expected)


@torch.no_grad()
def test_interpolated_positions_keep_their_place(model):
    own = model.visual.positions(4, 4)
    assert torch.equal(own[0], model.visual.positional_embedding)
    ramp = torch.arange(4.0).repeat(4)                                  # grows to the right only
    model = clip.build(model.state_dict())
    model.visual.positional_embedding[1:] = ramp[:, None]
    grid = model.visual.positions(4, 8)[0, 1:, 0].view(4, 8)
    assert close(grid, grid[:1].expand(4, 8)) and (grid[0].diff() > 0).all()
    assert close(grid.mean(), ramp.mean(), 1e-3)


@pytest.mark.parametrize("size", [(63, 64), (64, 8), (0, 64)])
def test_sizes_that_do_not_fit_are_an_error(model, size):
    with pytest.raises(ValueError, match="multiples of 16"):
        model.encode_image(torch.zeros(1, 3, *size))


def test_levels_that_do_not_exist_are_an_error(model):
    for level in (0, 4, -1):
        with pytest.raises(ValueError, match="from 1 to 3"):
            model.encode_patches(torch.zeros(1, 3, 64, 64), [level])


@torch.no_grad()
def test_short_prompts_equal_77_tokens(model, reference):
    tokens = reference["input/token_ids"]
    embeddings, end = model.token_embedding(tokens), tokens.argmax(-1)
    short = model.encode_prompts(embeddings[:, :int(end.max()) + 1], end)
    assert close(short, model.encode_text(tokens))
    for row in range(len(tokens)):                        # its own length, and `end` as a plain int
        one = model.encode_prompts(embeddings[row:row + 1, :end[row] + 1], int(end[row]))
        assert close(one, reference["output/text_features"][row:row + 1])
    embeddings[:, int(end.max()) + 1:] = 1e3              # what follows the end changes nothing
    assert close(model.encode_prompts(embeddings, end), short)


# ------------------------------------------------------------------------------------- tokenizer

@needs_vocabulary
def test_ids_equal_openais():
    for entry in json.loads((HERE / "clip_tokens.json").read_text()):
        ids = [49406, *entry["ids"], 49407]
        if len(ids) <= 77:
            row = clip.tokenize(entry["text"], cache=FOLDER)[0].tolist()
            assert row == ids + [0] * (77 - len(ids)), entry["text"]


@needs_vocabulary
def test_long_texts_are_an_error_or_cut():
    text = "a " * 75
    assert clip.tokenize(text, cache=FOLDER)[0, -1] == 49407          # exactly 77 fit
    with pytest.raises(ValueError, match=r"78 tokens.*'a a a "):
        clip.tokenize(["short", text + "a"], cache=FOLDER)
    assert clip.tokenize(text + "b c", truncate=True, cache=FOLDER).equal(clip.tokenize(text, cache=FOLDER))
    assert clip.tokenize("a b c", 3, truncate=True, cache=FOLDER).tolist() == [[49406, 320, 49407]]


def test_bytes_alone_need_no_vocabulary(monkeypatch):
    monkeypatch.setattr(clip, "fetch", None)
    assert clip.tokenize("Ab!", 8, vocab_size=514).tolist() == [[512, 64, 65 + 256, 256, 513, 0, 0, 0]]
    assert clip.tokenize("", 4, vocab_size=514).tolist() == [[512, 513, 0, 0]]
    every = clip.Tokenizer(514)
    text = "".join(map(chr, range(0x3000))) + "😀👩‍👩‍👧‍👦"
    assert {every.ids[symbol] for symbol in every.pieces(text)} <= set(range(514))


def test_merges_in_the_order_they_were_learned(monkeypatch, tmp_path):
    merges = "#version: 0\nl o\nlo w</w>\ne r\no w\n"
    (tmp_path / NAME).write_bytes(gzip.compress(merges.encode()))
    monkeypatch.setattr(clip, "VOCABULARY_SHA256", hashlib.sha256((tmp_path / NAME).read_bytes()).hexdigest())
    tokenizer = clip.Tokenizer(518, tmp_path)
    assert tokenizer.pieces("low lower <|endoftext|>")[1:-1] == [
        "low</w>", "lo", "w", "e", "r</w>", "<|endoftext|>"]
    assert tokenizer.ids["lo"] == 512 and tokenizer.ids["<|endoftext|>"] == 517
    assert clip.Tokenizer(513 + 2, tmp_path).pieces("low")[1:-1] == ["lo", "w</w>"]


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
        for name, value in dict(input_resolution=64, context_length=77, vocab_size=600).items():
            self.register_buffer(name, torch.tensor(value))

    def forward(self, x):
        return x * self.logit_scale


@pytest.fixture(scope="module")
def official(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("official") / "ViT.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(Official(weights), torch.zeros(1)), path)
    return path


def test_torchscript_archive(official, weights, reference):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = torch.jit.load(official).state_dict()
    ours = clip.read_archive(official)
    assert ours.keys() == theirs.keys() and len(ours) == len(weights) + 3
    assert all(ours[k].dtype == v.dtype and torch.equal(ours[k], v) for k, v in theirs.items())
    model = clip.load(official)
    assert model.name == str(official) and not model.training
    assert model.sha256 == hashlib.sha256(official.read_bytes()).hexdigest()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with torch.no_grad():
        assert close(model.encode_image(reference["input/pixels"]), reference["output/image_features"])


def test_nothing_of_torch_jit_is_used():
    assert "jit.load" not in Path(clip.__file__).read_text()
    assert "torch.load" not in Path(clip.__file__).read_text()


def test_state_dicts_and_checkpoints(tmp_path, weights):
    expected = clip.build(weights).state_dict()
    for content in (weights, clip.build(weights).state_dict(),
                    {"format": 1, "clip": weights, "model": {"ecpl.bias": torch.zeros(())}, "epoch": 3,
                     "config": {"levels": [1, 2], "lr": 1e-3, "tune": None},
                     "rng": torch.get_rng_state(), "optimizer": {"state": {0: {"step": 1}}}}):
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
        assert torch.equal(read[key], value) and read[key].stride() == value.stride()
        assert read[key].dtype == value.dtype and read[key].storage_offset() == value.storage_offset()
    read["t"][0, 0] = -1                                      # one storage, seen by all its views
    assert read["t"].untyped_storage().data_ptr() == read["step"].untyped_storage().data_ptr()


def rewrite(source, target, change):
    """Copy an archive, entry by entry; `change` maps (name in the archive, bytes) to bytes or None."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            data = change(info.filename.partition("/")[2], old.read(info))
            if data is not None:
                new.writestr(info.filename, data)
    return target


def test_big_endian_archives(tmp_path):
    tensors = dict(a=torch.randn(3, 5), b=torch.randn(4).half(), c=torch.tensor([1, -2]))
    torch.save(tensors, tmp_path / "little.pt")
    sizes = {"data/0": 4, "data/1": 2, "data/2": 8}

    def swap(name, data):
        if name in sizes:
            return np.frombuffer(data, np.uint8).reshape(-1, sizes[name])[:, ::-1].tobytes()
        return b"big" if name == "byteorder" else data

    read = clip.read_archive(rewrite(tmp_path / "little.pt", tmp_path / "big.pt", swap))
    assert all(torch.equal(read[key], tensors[key]) for key in tensors)


def tensor_program(length=4, shape=(4,), stride=(1,), offset=0, key="0", name="w"):
    """The pickle of {name: tensor} as torch writes it, with any numbers in it."""
    def number(n):
        return b"J" + struct.pack("<i", n) if abs(n) < 2 ** 31 else b"\x8a\x08" + struct.pack("<q", n)

    def text(s):
        return b"X" + struct.pack("<I", len(s.encode())) + s.encode()

    def numbers(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + number(length)
    tensor = (b"ctorch._utils\n_rebuild_tensor_v2\n((" + storage[1:] + b"tQ" + number(offset)
              + numbers(shape) + numbers(stride) + b"\x89ccollections\nOrderedDict\n)RtR")
    return b"\x80\x02}" + text(name) + tensor + b"s."


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil_was_here",)


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
    "expanded to 4 TB": (tensor_program(shape=(2 ** 40,), stride=(0,)), "twice its size"),
    "absurd sizes": (tensor_program(shape=(2 ** 62, 2 ** 62), stride=(1, 1)), "twice its size"),
    "path outside": (tensor_program(key="../../../../../../etc/passwd"), "etc/passwd"),
    "absolute path": (tensor_program(key="/etc/passwd"), "etc/passwd"),
    "absurd memo": (b"\x80\x02Nr\xff\xff\xff\x7f.", "absurd memory"),
    "absurd bytes": (b"\x80\x05\x96\x00\x00\x00\x00\x00\x01\x00\x00.", "no readable archive"),
    "dictionary in itself": (b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.", "."),
    "no end": (b"\x80\x02}", "no readable archive"),
    "empty": (b"", "no readable archive"),
    "no dictionary": (b"\x80\x02K\x01.", "."),
}


def hostile_archive(path, program):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w/data.pkl", program)
        archive.writestr("w/data/0", np.zeros(4, np.float32).tobytes())
        archive.writestr("w/byteorder", "little")
    return path


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_pickles(tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(ValueError, match=HOSTILE[what][1]) as error:
        clip.load(hostile_archive(tmp_path / "hostile.pt", HOSTILE[what][0]))
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10      # KiB
    assert time.perf_counter() - start < 2
    assert sorted(os.listdir()) == ["hostile.pt"]


def test_the_tensors_of_the_helper_are_read(tmp_path):
    path = hostile_archive(tmp_path / "fine.pt", tensor_program(shape=(2, 2), stride=(2, 1)))
    assert clip.read_archive(path)["w"].tolist() == [[0, 0], [0, 0]]


def damaged_zip(official, path, damage):
    data = official.read_bytes()
    if damage == "truncated":
        path.write_bytes(data[:len(data) // 2])
    elif damage == "not a zip":
        path.write_bytes(b"\x80\x02}q\x00." * 100)
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "short storage":
        rewrite(official, path, lambda name, data: data[:-4] if name == "data/4" else data)
    elif damage == "no storage":
        rewrite(official, path, lambda name, data: None if name == "data/4" else data)
    elif damage == "no index":
        rewrite(official, path, lambda name, data: None if name == "data.pkl" else data)
    elif damage == "bomb":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("w/data.pkl", tensor_program(2 ** 24, (2 ** 24,)))
            archive.writestr("w/data/0", bytes(2 ** 26))
    return path


@pytest.mark.parametrize("damage", ["truncated", "not a zip", "empty", "short storage", "no storage",
                                    "no index", "bomb"])
def test_damaged_archives(tmp_path, official, damage):
    with pytest.raises(ValueError, match="no readable archive") as error:
        clip.load(damaged_zip(official, tmp_path / "w.pt", damage))
    assert "\n" not in str(error.value) and "w.pt" in str(error.value)


def changed(weights, **changes):
    """The weights with some replaced, added, or (None) left out; `__` stands for a dot."""
    state = dict(weights)
    for key, value in changes.items():
        state[key.replace("__", ".")] = value
    return {key: value for key, value in state.items() if value is not None}


def test_weights_that_do_not_fit(weights):
    def bad(match, **changes):
        state = changed(weights, **changes)
        with pytest.raises(ValueError, match=match) as error:
            clip.build(state)
        assert "\n" not in str(error.value)

    bad("ln_final.bias", ln_final__bias=None)
    bad("surplus.*expected none", surplus=torch.zeros(3))
    bad("visual.proj", visual__proj=torch.zeros(100, 48))
    bad("ResNet.*visual.conv1.weight", visual__conv1__weight=None)
    bad("odd: tuple index", visual__class_embedding=torch.zeros(()))
    bad("ResNet|found", visual__conv1__weight=torch.zeros(128, 3, 0, 0))
    bad("positional_embedding", visual__positional_embedding=torch.zeros(18, 128))
    bad("NaN.*ln_post.bias", visual__ln_post__bias=torch.full((128,), math.nan))
    bad("infinity.*text_projection", text_projection=torch.full((64, 48), -math.inf))
    bad("ResNet", **{key.replace(".", "__"): None for key in weights if key.startswith("visual.")},
        visual__layer1__0__conv1__weight=torch.zeros(8, 8, 1, 1))
    with pytest.raises(ValueError, match="ResNet"):
        clip.build({})


def test_building_copies_unless_released(weights):
    state = {key: value.float() for key, value in weights.items()}
    model = clip.build(state)
    model.visual.proj.data.zero_()
    assert state["visual.proj"].abs().sum() > 0 and len(state) == len(weights)
    clip.build(state, release=True)
    assert not state


def test_the_stem_and_any_size_are_inferred():
    torch.manual_seed(0)
    sizes = dict(embed_dim=32, image_resolution=96, vision_layers=2, vision_width=64,
                 vision_patch_size=16, context_length=20, vocab_size=514, transformer_width=64,
                 transformer_layers=1)
    for stem in ((), (8, 16, 24)):
        model = clip.CLIP(**sizes, stem=stem).eval()
        torch.nn.init.normal_(model.visual.conv1.weight if not stem else model.visual.stem[-1].weight)
        copy = clip.build(model.state_dict())
        assert copy.visual.patch_size == 16 and copy.context_length == 20
        pixels = torch.randn(2, 3, 32, 48)
        with torch.no_grad():
            assert torch.equal(copy.encode_patches(pixels)[1], model.encode_patches(pixels)[1])


OPENAIS = {"ViT-B/32": (512, 224, 12, 768, 32, 512, 151_277_313), "ViT-B/16": (512, 224, 12, 768, 16, 512, 149_620_737),
           "ViT-L/14": (768, 224, 24, 1024, 14, 768, 427_616_513), "ViT-L/14@336px": (768, 336, 24, 1024, 14, 768, 427_944_193)}


@pytest.mark.parametrize("name", OPENAIS)
def test_sizes_of_the_official_models(name):
    embed, side, layers, width, patch, text, count = OPENAIS[name]
    with torch.device("meta"):
        model = clip.CLIP(embed_dim=embed, image_resolution=side, vision_layers=layers, vision_width=width,
                          vision_patch_size=patch, context_length=77, vocab_size=49408,
                          transformer_width=text, transformer_layers=12)
        assert model.encode_image(torch.empty(1, 3, side, side)).shape == (1, embed)
    assert sum(p.numel() for p in model.parameters()) == count      # OpenAI's, as published
    assert model.visual.transformer.resblocks[0].attn.heads == width // 64
    assert len(clip.OFFICIAL[name]) == 64


def test_names_that_do_not_exist(tmp_path):
    for name in ("RN50", "ViT-B/8", str(tmp_path)):
        with pytest.raises(ValueError, match="ViT-L/14@336px") as error:
            clip.load(name)
        assert name in str(error.value) and "\n" not in str(error.value)


# -------------------------------------------------------------------------------------- download

class Server(http.server.BaseHTTPRequestHandler):
    """Sends `content` as its path says: /whole, /slow, /cut, /wrong, /stall, /late (third time)."""
    content, asked = bytes(range(256)) * 4096, []             # 1 MiB

    def do_GET(self):
        how, content = self.path.split("/")[1], self.content
        self.asked.append(how)
        if how == "missing":
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        try:
            if how == "cut" or how == "late" and len(self.asked) < 3:
                self.wfile.write(content[:99_999])
                self.connection.close()
            elif how == "stall":
                self.wfile.write(content[:99_999])
                time.sleep(0.5)
            elif how == "slow":
                for i in range(0, len(content), 1 << 16):
                    self.wfile.write(content[i:i + (1 << 16)])
                    time.sleep(0.01)
            else:
                self.wfile.write(content[::-1] if how == "wrong" else content)
        except OSError:
            pass                                              # the client has gone

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(clip.fetch, "__defaults__", (None, 0.2, (0, 0.01, 0.01)))     # impatient
    monkeypatch.setenv("no_proxy", "*")
    Server.asked.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        threading.Thread(target=running.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.mark.parametrize("how, times", [("whole", 1), ("slow", 1), ("late", 3)])
def test_download(server, tmp_path, capsys, how, times):
    sha256 = hashlib.sha256(Server.content).hexdigest()
    for _ in range(2):                                        # the second call finds it
        path = clip.fetch(f"{server}/{how}/file.pt", sha256, tmp_path / "new")
        assert path.read_bytes() == Server.content
    assert Server.asked == [how] * times and os.listdir(tmp_path / "new") == ["file.pt"]
    assert "file.pt: 1,048,576 of 1,048,576 bytes" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["cut", "wrong", "stall", "missing"])
def test_failed_downloads_leave_nothing(server, tmp_path, how):
    with pytest.raises(OSError) as error:
        clip.fetch(f"{server}/{how}/file.pt", "0" * 64, tmp_path)
    message = str(error.value)
    assert "\n" not in message and "--clip tiny" in message and "0" * 64 in message
    assert str(tmp_path / "file.pt") in message and f"{server}/{how}/file.pt" in message
    assert Server.asked == [how] * 3 and os.listdir(tmp_path) == []


def test_damaged_files_in_the_cache_are_replaced(server, tmp_path):
    (tmp_path / "file.pt").write_bytes(b"half")
    with pytest.raises(OSError):
        clip.fetch(f"{server}/cut/file.pt", "0" * 64, tmp_path)
    assert (tmp_path / "file.pt").read_bytes() == b"half"     # until there is something better
    sha256 = hashlib.sha256(Server.content).hexdigest()
    assert clip.fetch(f"{server}/whole/file.pt", sha256, tmp_path).read_bytes() == Server.content


def test_official_names_are_downloaded_once_and_checked(server, tmp_path, monkeypatch, official):
    monkeypatch.setattr(Server, "content", official.read_bytes())
    monkeypatch.setattr(clip, "MODELS", f"{server}")
    sha256 = hashlib.sha256(official.read_bytes()).hexdigest()
    monkeypatch.setitem(clip.OFFICIAL, "ViT-L/14@336px", sha256)
    for _ in range(2):
        model = clip.load("ViT-L/14@336px", cache=tmp_path)
    assert (model.name, model.sha256) == ("ViT-L/14@336px", sha256)
    assert Server.asked == [sha256] and os.listdir(tmp_path) == ["ViT-L-14-336px.pt"]


def test_offline(monkeypatch, tmp_path):
    monkeypatch.setattr(clip.fetch, "__defaults__", (None, 1, (0, 0, 0)))
    monkeypatch.setattr(clip, "MODELS", "http://127.0.0.1:9")          # nobody listens there
    with pytest.raises(OSError, match="ViT-B-16.pt is missing.*--clip tiny") as error:
        clip.load("ViT-B/16", cache=tmp_path)
    assert clip.OFFICIAL["ViT-B/16"] in str(error.value) and "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------ LoRA

def test_lora_starts_as_the_identity_trains_alone_and_merges(weights, reference):
    torch.manual_seed(0)
    model, pixels = clip.build(weights), reference["input/pixels"]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plain = model.encode_image(pixels).detach()
    added = clip.add_lora(model.visual, rank=4, alpha=8)
    assert len(added) == 3 * 2 * 2 and sum(p.numel() for p in added) == 3 * 4 * (128 + 384 + 128 + 128)
    assert torch.equal(model.encode_image(pixels), plain)
    optimizer = torch.optim.SGD(added, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model.encode_image(pixels).square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in added)
    trained = {id(p) for p in added}
    assert all(p.grad is None and not p.requires_grad for p in model.visual.parameters() if id(p) not in trained)
    tuned = model.encode_image(pixels).detach()
    assert not close(tuned, plain, 1e-4)
    clip.merge_lora(model)
    assert close(model.encode_image(pixels), tuned)
    state = model.state_dict()
    assert state.keys() == before.keys()
    assert {key for key in state if not torch.equal(state[key], before[key])} == {
        f"visual.transformer.resblocks.{i}.attn.{name}" for i in range(3)
        for name in ("in_proj_weight", "out_proj.weight")}


def test_lora_targets(weights):
    assert len(clip.add_lora(clip.build(weights), 2, 2, ["c_fc", "c_proj"])) == (3 + 2) * 2 * 2
    assert len(clip.add_lora(clip.build(weights).transformer, 2, 2, ["in_proj"])) == 2 * 2
    change = clip.LoRA(torch.zeros(6, 4), rank=2, alpha=6)
    with torch.no_grad():
        change.B.normal_()
        assert close(change(torch.eye(4)).T, 3 * change.B @ change.A)


# ---------------------------------------------------------------------------------------- lesson

def test_the_lesson_needs_no_file(tmp_path):
    run = subprocess.run([sys.executable, clip.__file__, "two", "cats"], capture_output=True, text=True,
                         env={**os.environ, "HOME": str(tmp_path)}, cwd=tmp_path)
    assert run.returncode == 0 and run.stderr == "", run.stderr
    assert "no vocabulary in" in run.stdout and "t 83 | w 86 | o</w> 334" in run.stdout
    assert "(1, 196, 512)" in run.stdout and "86,192,640" in run.stdout
    assert os.listdir(tmp_path) == []


def test_normalize():
    image = torch.tensor(clip.MEAN).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    assert close(clip.normalize(image), torch.zeros(2, 3, 4, 4), 1e-6)
    white = clip.normalize(torch.ones(1, 3, 1, 1)).flatten()
    assert close(white, torch.tensor([1.9303, 2.0749, 2.1459]), 1e-4)
