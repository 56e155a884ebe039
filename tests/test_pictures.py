"""The pictures that pretrain the shipped model's CLIP, and how it learns from them."""
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter

import clip
import data
import make
import pictures
from ecpl import CLASSES
from mini import photo

CPU = torch.device("cpu")
SMALL = make.SIZES | {"vision_layers": 2, "vision_width": 64, "transformer_layers": 1}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Nine pictures on disk: paths."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(9):
        data.add_noise(photo(200, 170, seed=i), 6, rng).save(folder / f"{i}.png")
    return sorted(folder.iterdir())


def some(count=6, side=72):
    """Different pictures as PIL and as (n, 3, S, S)."""
    images = [photo(side, side, seed=i) for i in range(count)]
    return images, torch.stack([255 * data.to_tensor(image) for image in images]).round()


def largest_mean(found, expected):
    """The mean absolute difference of the pictures that differ most: tensor, list of PIL."""
    expected = torch.stack([255 * data.to_tensor(image) for image in expected]).round()
    return (found.round().clamp(0, 255) - expected).abs().mean(dim=(1, 2, 3)).max().item()


# --------------------------------------------------------------------------- beside PIL, on batches

@pytest.mark.parametrize("subsampled", [False, True])
def test_jpeg_is_that_of_libjpeg(subsampled):
    images, batch = some()
    quality = np.array([95, 80, 70, 50, 30, 5])
    shift = np.array([[0, 0], [3, 1], [7, 7], [1, 0], [0, 5], [2, 6]])
    found = pictures.jpeg(batch, quality, shift, subsampled)
    expected = [data.jpeg(image, int(q), (int(x), int(y)), subsampling=2 if subsampled else 0)
                for image, q, (y, x) in zip(images, quality, shift)]
    assert largest_mean(found, expected) < 0.8                   # grey levels
    assert largest_mean(batch, expected) > 3                     # what the coding changes


def test_blur_is_that_of_pil():
    images, batch = some(3)
    found = pictures.blur(batch, np.array([0.7, 1.5, 3.0]))
    inner = [image.filter(ImageFilter.GaussianBlur(sigma)).crop((9, 9, 63, 63))
             for image, sigma in zip(images, (0.7, 1.5, 3.0))]   # PIL repeats the border
    assert largest_mean(found[:, :, 9:63, 9:63], inner) < 1


@pytest.mark.parametrize("kernel, name", [
    (pictures.bicubic, "BICUBIC"), (pictures.lanczos, "LANCZOS"), (pictures.triangle, "BILINEAR")])
@pytest.mark.parametrize("new", [31, 72, 100])
def test_resampling_is_that_of_pil(kernel, name, new):
    images, batch = some()
    matrix = pictures.resampling(np.array([72]), np.array([new]), (72, new), kernel, CPU)
    expected = [image.resize((new, new), Image.Resampling[name]) for image in images]
    assert largest_mean(pictures.filtered(batch, matrix, matrix), expected) < 0.5


def test_resampling_of_several_sizes_at_once():
    """What lies beyond a picture's own size is zero."""
    matrix = pictures.resampling(np.array([8, 6]), np.array([4, 6]), (8, 6), pictures.bicubic, CPU)
    assert matrix.shape == (2, 6, 8)
    assert torch.equal(matrix[1], torch.eye(6, 8))
    assert (matrix[0, 4:] == 0).all()
    assert torch.allclose(matrix[0, :4].sum(dim=1), torch.ones(4))


def test_take_and_mirrored():
    batch = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)
    rows = np.array([[0, 1], [2, 3]])
    columns = np.array([[4, 3, 2], [0, 0, 1]])
    found = pictures.take(batch, rows, columns)
    assert torch.equal(found[0], batch[0, :, 0:2].flip(2)[:, :, :3])
    assert torch.equal(found[1], batch[1][:, [2, 3]][:, :, [0, 0, 1]])
    assert pictures.mirrored(np.arange(-3, 7), 4).tolist() == [3, 2, 1, 0, 1, 2, 3, 2, 1, 0]


@pytest.mark.parametrize("edit", pictures.EDITS)
def test_an_edit_changes_the_chosen_alone(edit):
    _, batch = some(4)
    before = batch.clone()
    rng = np.random.default_rng(0)
    chosen = np.array([True, False, True, False])
    strength = pictures.column(np.array([0.3, 0.9]), batch)
    pictures.apply(batch, chosen, lambda part: edit(part, strength, rng))
    assert torch.equal(batch[[1, 3]], before[[1, 3]])
    assert (batch[[0, 2]] - before[[0, 2]]).abs().mean(dim=(1, 2, 3)).min() > 0.1
    assert torch.equal(batch, batch.round().clamp(0, 255))


def test_fill_keeps_what_is_known_and_continues_it():
    image = torch.full((1, 3, 24, 24), 90.0)
    region = torch.zeros(1, 24, 24)
    region[:, 5:14, 8:20] = 1
    spoiled = torch.where(region[:, None] > 0, 255.0, image)
    assert torch.allclose(pictures.fill(spoiled, region), image)


def test_regions_lie_in_their_boxes():
    _, batch = some(6)
    rng = np.random.default_rng(1)
    boxes = pictures.random_boxes(6, 72, rng)
    for seed in range(8):
        region = pictures.outlines(batch, boxes, np.random.default_rng(seed))
        assert set(region.unique().tolist()) <= {0.0, 1.0}
        for one, y, x, height, width in zip(region, *boxes):
            rows, columns = one.nonzero(as_tuple=True)
            assert len(rows) > 0
            assert (rows - y).abs().max() <= height / 2 + 2      # an object's border is smoothed
            assert (columns - x).abs().max() <= width / 2 + 2


# ------------------------------------------------------------------------------------ the pictures

def test_a_manipulation_changes_its_region_alone(photos):
    source = pictures.Pictures(photos, CPU, seed=0)
    images = source.windows(48, 72)
    kind = np.arange(24) % 4
    words = [[] for _ in kind]
    image, region, seen = source.manipulate(images[:24], images[24:], kind, words)
    change = (image - images[:24]).abs().amax(dim=1)             # (n, S, S)
    assert (change[region == 0] == 0).all()
    assert seen.float().mean() > 0.5
    inside = (change * region).sum(dim=(1, 2)) / region.sum(dim=(1, 2))
    assert (inside[seen] > 3).all()
    assert all(len(words[i]) == 1 for i in range(24) if kind[i] == 3)        # a local edit's name


def test_a_batch(photos):
    source = pictures.Pictures(photos, CPU, seed=3)
    batch = source.batch(10, 64)
    assert batch.image.shape == (20, 3, 64, 64)
    assert 0 <= batch.image.min() and batch.image.max() <= 1
    assert batch.inside.shape == (20, 64)
    assert (batch.inside[0::2] == 0).all()
    assert (batch.inside[1::2].amax(dim=1) > 0.9).float().mean() > 0.5
    assert batch.known[0::2].all()
    assert batch.classes[0::2] == [CLASSES[0]] * 10
    assert all(name.startswith(CLASSES[1]) for name in batch.classes[1::2])
    assert len(batch.histories) == 20
    halves = list(batch.split(2))
    assert torch.equal(torch.cat([half.image for half in halves]), batch.image)
    assert halves[0].histories + halves[1].histories == batch.histories

    torch.manual_seed(0)
    again = pictures.Pictures(photos, CPU, seed=4).batch(3, 64)
    torch.manual_seed(0)
    assert torch.equal(pictures.Pictures(photos, CPU, seed=4).batch(3, 64).image, again.image)


def test_windows_of_photos_that_are_too_small(photos):
    """They are continued by reflection: row 170 + i is row 168 - i."""
    source = pictures.Pictures(photos[:1], CPU, seed=0)
    images = source.windows(5, 256)                              # the photo is 200 x 170
    assert torch.equal(images[:, :, 170:200], images[:, :, 139:169].flip(2))
    assert images.std(dim=(1, 2, 3)).min() > 1


def test_both_of_a_pair_are_degraded_alike(photos):
    """But for the noise; else its traces would tell the class."""
    source = pictures.Pictures(photos, CPU, seed=0)
    images = source.windows(30, 80)
    for side in (80, 64):
        found = source.degrade(torch.cat([images, images]), side)
        apart = (found[:30] - found[30:]).abs().amax(dim=(1, 2, 3))
        assert found.shape == (60, 3, side, side)
        assert (apart == 0).float().mean() > 0.6                 # no noise
        assert apart.max() < 100


def test_captions_say_what_is_pasted_only_if_told(photos):
    batch = pictures.Pictures(photos, CPU, seed=0).batch(6, 64)
    pixels = clip.normalize(batch.image)
    name = make.tokens_of([(CLASSES[1],)])[0, 1:12].tolist()     # the letters of "manipulated"
    for told in (True, False):
        tokens = make.targets_of(batch, pixels, told).tokens[:-2]
        assert (tokens[:, 1:12].tolist().count(name) > 0) == told


# -------------------------------------------------------------------------------------- the losses

def test_tokens_are_those_of_the_whole_caption():
    captions = [("manipulated, splice", "quality 60", "blurred"), (), ("smooth",)]
    texts = [", ".join(caption) for caption in captions]
    expected = clip.tokenize(texts, 77, 514)
    assert make.tokens_of(captions).tolist() == expected.tolist()
    assert make.tokens_of([("blurred",) * 40])[0, -1] == 513     # cut off, with its end


def test_same_source_wants_patches_of_a_part_alike():
    source = torch.tensor([[0, 0, 1, 1], [2, 2, 2, 3]])
    pick = torch.arange(4).repeat(2, 1)
    alike = 5 * F.one_hot(source, 4).float()
    assert make.same_source(alike, source, pick) < 0.01
    assert make.same_source(alike, source.roll(1, dims=1), pick) > 0.5
    # by hand: two patches, one source, a third of another
    z = torch.tensor([[[1.0, 0], [0.6, 0.8], [0, 1.0]]])
    logits = torch.tensor([[0.6, 0.0], [0.6, 0.8]]) / 0.1        # of the first, of the second
    expected = F.cross_entropy(logits, torch.tensor([0, 0]))
    found = make.same_source(z, torch.tensor([[0, 0, 1]]), torch.tensor([[0, 1, 2]]))
    assert torch.isclose(found, expected)


def test_losses_weigh_parts_alike_and_leave_out_what_cannot_be_seen(photos):
    source = pictures.Pictures(photos, CPU, seed=0)
    batch = source.batch(8, 64)
    batch = batch._replace(known=batch.known & (torch.arange(16) != 3))
    pixels = clip.normalize(batch.image)
    targets = make.targets_of(batch, pixels, told=True)
    assert torch.isclose(targets.weight.sum(), torch.tensor(1.0))
    part = targets.manipulated.bool()
    assert not part[3].any()
    assert (targets.weight[3][batch.inside[3] >= 0.05] == 0).all()
    assert targets.caption.max() < targets.count
    sums = (targets.weight * part).sum(dim=1)
    sums = sums[sums > 0]
    assert torch.allclose(sums, sums[0].expand_as(sums))

    torch.manual_seed(0)
    model = clip.CLIP(**SMALL)
    heads = torch.nn.ModuleDict({"source": torch.nn.Linear(128, 64),
                                 "bias": torch.nn.Linear(1, 1, bias=False)})
    losses = make.RegionLosses(model, heads, told=True)
    found = dict(zip(losses.names, losses(*targets)))
    assert torch.isfinite(torch.stack(list(found.values()))).all()
    assert abs(found["map"] - np.log(2)) < 0.6                   # nothing learned yet
    untold = make.RegionLosses(model, heads, told=False)
    assert untold(*make.targets_of(batch, pixels, told=False)).shape == (2,)


def test_orthogonal():
    for shape in ((3, 40, 12), (3, 12, 40), (1, 16, 16)):
        found = make.orthogonal(torch.randn(shape))
        assert found.shape == shape
        singular = torch.linalg.svdvals(found.float())
        assert 0.3 < singular.min() and singular.max() < 1.3


def test_muon_is_that_of_torch():
    """But for its bfloat16."""
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(24, 8)) for _ in range(2)]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    start = ours[1].detach().clone()
    own = make.Muon(ours, lr=0.01)
    reference = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        own.step()
        reference.step()
    assert (ours[1] - theirs[1]).norm() < 0.03 * (ours[1] - start).norm()


def test_a_student_that_is_its_teacher_has_no_error():
    """Their patches differ in size; here the teacher's tokens are given to both."""
    torch.manual_seed(0)
    teacher = clip.CLIP(**SMALL | {"vision_patch_size": 16, "stem": ()}).visual
    student = clip.CLIP(**SMALL).visual
    pixels = torch.randn(2, 3, 64, 64)
    student.transformer.load_state_dict(teacher.transformer.state_dict())
    losses = make.Distillation(student, teacher)
    found = losses(pixels, torch.tensor(0.0))                    # blocks start from the teacher's
    assert found[0] > 0.1
    assert found[1:].max() < 1e-6
    assert losses(pixels, torch.tensor(1.0))[1:].min() > 0.1     # from the student's own


def test_measure_knows_a_perfect_map(monkeypatch):
    inside = torch.zeros(6, 16, dtype=torch.bool)
    inside[1::2, 3:7] = True
    images = 10.0 * inside.view(6, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    model = clip.CLIP(**SMALL)
    words = torch.from_numpy(make.tokens_of(make.CLASS_CAPTIONS))
    own = F.normalize(model.encode_text(words), dim=-1)          # (2, D)

    def features(part):
        share = F.avg_pool2d(part[:, :1], 8).flatten(1) / 10     # (B, N)
        return [], own[0] + share[..., None] * (own[1] - own[0])

    monkeypatch.setattr(model, "encode_patches", features)
    assert make.measure(model, (images, inside)) == (1.0, 1.0)
    assert make.measure(model, (images.flip(0), inside)) != (1.0, 1.0)


def test_steps_learn_a_batch_by_heart(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(make, "SIZES", SMALL)
    args = SimpleNamespace(seed=0, teacher=None, out=str(tmp_path), lr=1e-3, decay=0.9)
    training = make.Training(args, CPU)
    batch = pictures.Pictures(photos, CPU, seed=0).batch(4, 64)
    losses = make.RegionLosses(training.model, training.heads, told=True)
    targets = make.targets_of(batch, clip.normalize(batch.image), told=True)
    before = training.model.state_dict()["visual.conv1.weight"].clone()
    totals = []
    for _ in range(25):
        total = losses(*targets).sum()
        training.step(total, 1.0)
        totals.append(total.item())
    assert totals[-1] < 0.6 * totals[0]
    own = training.model.visual.conv1.weight
    mean = training.mean.visual.conv1.weight                     # behind, on its way
    assert 0 < (mean - own).norm() < (own - before).norm()


def test_pretraining_goes_on_and_leaves_a_clip(photos, tmp_path, monkeypatch):
    """Some steps of both stages with a random teacher; started again, only what is left."""
    monkeypatch.setattr(make, "SIZES", SMALL)
    monkeypatch.setattr(make, "SIDES", (64,))
    monkeypatch.setattr(make, "AT_ONCE", 2)
    monkeypatch.setattr(make, "make_watch", lambda *arguments: None)
    monkeypatch.setattr(make, "measure", lambda *arguments: (0.5, 0.5))
    steps = []
    monkeypatch.setattr(make.time, "process_time", lambda: 60.0 * len(steps))    # a step a minute
    real = make.Training.step

    def step(self, loss, rate):
        steps.append(loss.item())
        real(self, loss, rate)

    monkeypatch.setattr(make.Training, "step", step)
    sizes = SMALL | {"vision_patch_size": 16, "stem": (), "vision_layers": 3}
    torch.save(clip.CLIP(**sizes).state_dict(), tmp_path / "teacher.pt")
    words = ["make.py", "--photos", str(photos[0].parent), "--out", str(tmp_path / "out"),
             "--teacher", str(tmp_path / "teacher.pt"), "--pairs", "1", "--device", "cpu"]

    monkeypatch.setattr(make.sys, "argv", [*words, "--distil-minutes", "12", "--minutes", "3"])
    assert make.main() == 0
    assert len(steps) == 15
    assert np.isfinite(steps).all()
    monkeypatch.setattr(make.sys, "argv", [*words, "--distil-minutes", "12", "--minutes", "5"])
    first = torch.load(tmp_path / "out" / "tower.pt", weights_only=True)
    assert make.main() == 0
    assert len(steps) == 17
    second = torch.load(tmp_path / "out" / "tower.pt", weights_only=True)
    key = "visual.transformer.resblocks.0.attn.in_proj_weight"
    assert 0 < (second[key] - first[key]).norm() < 0.1 * first[key].norm()       # it went on
    assert len((tmp_path / "out" / "log.csv").read_text().splitlines()) > 2
    assert clip.load(tmp_path / "out" / "tower.pt").visual.patch_size == 8


@pytest.mark.parametrize("words, message", [
    ("--photos {0}/none", "found no .*none, expected a folder"),
    ("--photos {0}", "found 6 photos in .*, expected hundreds"),
    ("--photos {0} --minutes 0", "found --minutes 0.0 .*, expected more than 0"),
    ("--photos {0} --pairs 0", "found .*--pairs 0, expected more than 0")])
def test_a_wrong_call_of_make_is_one_line(photos, tmp_path, monkeypatch, capsys, words, message):
    few = tmp_path / "few"
    few.mkdir()
    for path in photos[:7]:
        (few / path.name).write_bytes(path.read_bytes())
    words = words.format(few).split()
    monkeypatch.setattr(make.sys, "argv", ["make.py", *words, "--out", str(tmp_path / "out")])
    assert make.main() == 2
    line, = capsys.readouterr().err.strip().splitlines()
    assert re.match(f"error: {message}", line)
