"""The pictures: that their arrays are what they are called, and that their files can be read."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import TINY, run
from PIL import Image
from timm.models.vision_transformer import Attention

from dinoct.config import AugConfig, DataConfig, IbotConfig, ModelConfig, WindowConfig
from dinoct.data.batch import CropBatch, collate
from dinoct.data.dataset import SliceViews, middle_slice, open_split, read_slice
from dinoct.data.views import ViewMaker
from dinoct.models.load import random_backbone
from dinoct.viz import PICTURES, draw_monitor, draw_views, whole_slice
from dinoct.viz.figures import Scene
from dinoct.viz.maps import class_attention, cosine_to, principal_colours, see
from dinoct.viz.pictures import draw_similarity
from dinoct.viz.slices import body_mask, body_patches, clipped, default_patch

SMALL = ModelConfig(patch=8, dim=32, depth=2, heads=4, img_size=32, registers=3)
CPU = torch.device("cpu")
AIR, LUNG, TISSUE = -1000, -850, 40


def disc(hu: np.ndarray, row: int, col: int, radius: int, value: int) -> None:
    rows, cols = np.ogrid[: hu.shape[0], : hu.shape[1]]
    hu[(rows - row) ** 2 + (cols - col) ** 2 <= radius**2] = value


@pytest.fixture
def chest() -> np.ndarray:
    """A trunk with a lung on either side, an arm, and a couch that touches the back."""
    hu = np.full((256, 256), AIR, np.int16)
    disc(hu, 110, 130, 80, TISSUE)
    disc(hu, 110, 90, 28, LUNG)
    disc(hu, 110, 170, 24, LUNG)
    disc(hu, 110, 22, 22, TISSUE)
    hu[189:191, 10:250] = 100
    return hu


@pytest.fixture(scope="module")
def backbone() -> torch.nn.Module:
    return random_backbone(SMALL, seed=0)


def draw(backbone, hu: np.ndarray, out: Path, **options) -> dict:
    options = {"window": WindowConfig(), "size": 32, "device": CPU, "title": "step 0"} | options
    return draw_monitor(backbone, hu, out=out, **options)


# --- arrays ---------------------------------------------------------------------------------------------------------


def test_attention_is_that_of_timms_own_path(backbone):
    """A fused kernel shows no weights: what is computed again must be what timm's unfused path multiplies with."""
    image = torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    block, tokens, seen = backbone.vit.blocks[-1], [], []
    hook = block.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0]))
    with class_attention(backbone) as attention, torch.inference_mode():
        backbone(image)
    hook.remove()
    plain = copy.deepcopy(block.attn)
    plain.fused_attn = False
    plain.attn_drop.register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.inference_mode():
        Attention.forward(plain, block.norm1(tokens[0]))
    torch.testing.assert_close(torch.from_numpy(attention()), seen[0][0, :, 0], atol=1e-5, rtol=0)
    assert not block.attn.q_norm._forward_hooks  # nothing stays behind


def test_a_compiled_model_is_looked_into_too(backbone):
    """Compiled code goes by the hooks that see the queries and keys."""
    compiled = copy.deepcopy(backbone)
    for block in compiled.vit.blocks:
        block.compile(backend="eager")
    image = np.random.default_rng(0).random((32, 32), dtype=np.float32)
    with torch.inference_mode():
        compiled(torch.from_numpy(image)[None, None])
    np.testing.assert_allclose(see(compiled, image, CPU).heads, see(backbone, image, CPU).heads, atol=1e-6)


def test_the_shares_of_attention_add_up(backbone):
    seen = see(backbone, np.random.default_rng(0).random((32, 32), dtype=np.float32), CPU)
    assert seen.heads.shape == (4, 4, 4)
    assert seen.heads.mean(axis=0).sum() + seen.on_class + seen.on_registers == pytest.approx(1, abs=1e-5)
    bare = random_backbone(replace(SMALL, registers=0), seed=0)
    assert see(bare, np.zeros((32, 32), np.float32), CPU).on_registers is None


def test_similarity_is_one_at_the_patch_itself():
    tokens = np.random.default_rng(0).normal(size=(4, 5, 8))
    tokens[3, 4], tokens[0, 0] = 2 * tokens[1, 2], -tokens[1, 2]
    cosines = cosine_to(tokens, (1, 2))
    assert cosines[1, 2] == pytest.approx(1)
    assert cosines[3, 4] == pytest.approx(1)
    assert cosines[0, 0] == pytest.approx(-1)
    assert np.abs(cosines).max() <= 1 + 1e-6


def test_principal_components_are_those_of_the_patches_that_are_shown():
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(6, 6, 16))
    shown = np.zeros((6, 6), bool)
    shown[1:5, 1:5] = True
    colours, explained = principal_colours(tokens, shown)
    assert (colours[~shown] == 0).all()
    assert (colours[shown, 3] == 1).all()
    assert 0 < explained[2] <= explained[1] <= explained[0]
    tokens[~shown] *= 1000  # what is not shown has no say
    np.testing.assert_allclose(principal_colours(tokens, shown)[0], colours)


def test_equal_tokens_have_equal_colours_wherever_they_stand():
    """The signs of singular vectors are arbitrary, and the order of the rows may turn them: the colours must not."""
    rng = np.random.default_rng(0)
    tokens, everywhere = rng.normal(size=(36, 1, 16)), np.ones((36, 1), bool)
    colours, _ = principal_colours(tokens, everywhere)
    for order in (rng.permutation(36) for _ in range(8)):
        np.testing.assert_allclose(principal_colours(tokens[order], everywhere)[0], colours[order], atol=1e-6)


def test_tokens_that_are_all_alike_are_grey_and_not_noise():
    colours, explained = principal_colours(np.ones((4, 4, 8)), np.ones((4, 4), bool))
    assert (colours[..., :3] == 0.5).all()
    assert (explained == 0).all()


def test_one_patch_of_body_has_a_colour_and_none_has_none():
    tokens, shown = np.random.default_rng(0).normal(size=(4, 4, 8)), np.zeros((4, 4), bool)
    assert (principal_colours(tokens, shown)[0] == 0).all()
    shown[2, 1] = True
    assert principal_colours(tokens, shown)[0][2, 1].tolist() == [0.5, 0.5, 0.5, 1.0]


def test_the_body_has_its_lungs_and_arms_and_no_couch(chest):
    mask = body_mask(chest)
    for row, col in ((110, 90), (110, 170), (110, 130), (110, 20)):
        assert mask[row, col]
    assert not mask[190, 30]
    assert not mask[10, 10]
    assert not body_mask(np.full((64, 64), AIR, np.int16)).any()
    assert body_mask(np.full((64, 64), TISSUE, np.int16)).all()


def test_patches_outside_the_body_are_known_on_any_grid(chest):
    fine = body_patches(chest, (16, 16))
    assert fine[7, 8]
    assert fine[7, 1]  # the arm
    assert not fine[0].any()
    assert not fine[11, :4].any()  # the couch
    assert not fine[12:].any()
    assert body_patches(chest, (2, 2))[0].all()


def test_the_default_patch_lies_in_the_larger_lung(chest):
    row, col = default_patch(chest, (16, 16))
    assert abs(16 * (row + 0.5) - 110) < 16
    assert abs(16 * (col + 0.5) - 90) < 16
    solid = np.full((256, 256), AIR, np.int16)
    disc(solid, 60, 190, 50, TISSUE)
    assert default_patch(solid, (8, 8)) in {(row, col) for row in (1, 2) for col in (5, 6)}  # no lung: in the body
    assert default_patch(np.full((64, 64), AIR, np.int16), (4, 4)) == (2, 2)  # nothing at all


def test_clipped_shares_are_those_of_a_hand_count():
    a, b = np.array([[-1100, -1000], [0, 400]]), np.array([[401, 3000, 500, 100]])
    assert clipped([a, b], (-1000, 400)) == (1 / 8, 3 / 8)


# --- files ----------------------------------------------------------------------------------------------------------


def test_every_picture_opens_and_carries_nothing_but_pixels(backbone, chest, tmp_path):
    stats = draw(backbone, chest, tmp_path / "look", sample=[chest, chest[:100]])
    assert {path.name for path in (tmp_path / "look").iterdir()} == {f"{n}.png" for n in PICTURES} | {"stats.json"}
    for name in PICTURES:
        with Image.open(tmp_path / "look" / f"{name}.png") as picture:
            assert min(picture.size) > 400
            assert not picture.text  # no program, no time
            assert len(np.unique(np.asarray(picture.convert("L")))) > 10
    assert json.loads((tmp_path / "look" / "stats.json").read_text()) == stats
    below, above = clipped([chest, chest[:100]], (-1000, 400))
    assert (stats["clipped_below"], stats["clipped_above"], stats["clipped_slices"]) == (below, above, 2)
    shares = [stats["attention_class_token"], stats["attention_registers"], stats["attention_outside_body"]]
    assert all(0 <= share <= 1 for share in shares)
    assert sum(shares) < 1


@pytest.mark.parametrize("value", [AIR, TISSUE], ids=["all air", "all body"])
def test_a_slice_without_anything_to_see_is_drawn(backbone, value, tmp_path):
    stats = draw(backbone.train(), np.full((64, 64), value, np.int16), tmp_path, patch=[3, 0])
    assert stats["body_patches"] == (0 if value == AIR else 16)
    assert backbone.training  # left as it was
    assert (tmp_path / "pca.png").stat().st_size > 0


def yellow(path: Path) -> np.ndarray:
    """Centres (row, column) of the yellow marks in the left and in the right half of a picture."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    mark = (pixels[..., 0] > 230) & (pixels[..., 1] > 230) & (pixels[..., 2] < 40)
    half = mark.shape[1] // 2
    return np.array([np.argwhere(side).mean(axis=0) for side in (mark[:, :half], mark[:, half:])])


def test_the_patch_is_marked_in_slice_and_map_where_it_is(chest, tmp_path):
    scene = Scene(chest, whole_slice(chest, WindowConfig(), 32), (-1000, 400), (4, 4), "")
    marks = {}
    for patch in ((0, 0), (0, 3), (3, 3)):
        draw_similarity(scene, np.zeros((4, 4)), patch, tmp_path / "similarity.png")
        marks[patch] = yellow(tmp_path / "similarity.png")
    across, down = marks[0, 3] - marks[0, 0], marks[3, 3] - marks[0, 3]
    side = across[:, 1] / 3
    np.testing.assert_allclose(across, np.stack([0 * side, 3 * side], axis=1), atol=2)
    np.testing.assert_allclose(down, np.stack([3 * side, 0 * side], axis=1), atol=2)  # patches are square


def where(pixels: np.ndarray, grey: int) -> tuple[float, float] | None:
    """Middle (row, column) of the pixels of one grey, up to rounding, if they fill more than a mark."""
    found = np.argwhere((abs(pixels.astype(int) - grey) <= 1).all(axis=2))
    return tuple(np.median(found, axis=0)) if len(found) > 5000 else None


def test_the_grid_of_views_has_a_row_per_slice_and_global_crops_first(tmp_path):
    greys = 30 + 5 * np.arange(15).reshape(3, 5)  # two global crops and a local one, of five slices

    def crops(rows: np.ndarray, size: int) -> torch.Tensor:
        return torch.tensor(rows.ravel() / 255).float()[:, None, None, None].expand(-1, 1, size, size)

    masks = torch.zeros(10, 16, dtype=torch.bool)
    masks[1 * 5 + 2] = True  # the second global crop of the third slice
    batch = CropBatch(crops(greys[:2], 32), crops(greys[2:], 16), masks, None, None, torch.arange(5), list(range(5)))
    draw_views(batch, tmp_path / "new" / "views.png", "views")
    with Image.open(tmp_path / "new" / "views.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    tinted = np.median(np.argwhere(pixels[..., 0].astype(int) - pixels[..., 2] > 60), axis=0)
    assert where(pixels, greys[1, 2]) is None
    places = np.array([[where(pixels, grey) or tinted for grey in row] for row in greys[:, :4]])  # [views, slices, 2]
    assert np.ptp(places[..., 0], axis=0).max() <= 1  # the views of a slice stand in its row
    assert np.ptp(places[..., 1], axis=1).max() <= 1  # a view stands in its column
    assert (np.diff(places[:, 0, 1]) > 100).all()
    assert (np.diff(places[0, :, 0]) > 100).all()
    assert all(where(pixels, grey) is None for grey in greys[:, 4])  # four slices are enough


def test_views_without_local_crops_show_what_is_hidden_from_the_student(phantom_root, tmp_path):
    train, _, store, _ = open_split(DataConfig(root=str(phantom_root)))
    share = []
    for masks in (0.25, 0.75):
        ibot = IbotConfig(weight=1.0, mask_probability=1.0, mask_ratio=[masks, masks])
        data = SliceViews(train, store, ViewMaker(AugConfig(), SMALL, ibot), seed=0)
        draw_views(collate([data[0], data[1]]), tmp_path / "views.png", "views")
        with Image.open(tmp_path / "views.png") as picture:
            pixels = np.asarray(picture.convert("RGB")).astype(int)
        share.append((pixels[..., 0] - pixels[..., 2] > 60).mean())
    assert share[1] > 2 * share[0] > 0


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(phantom_root, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    crops = ["aug.local_crops=2", "aug.local_size=16", "monitor.every=2"]
    assert run("train", *TINY, *crops, f"data.root={phantom_root}", f"run_dir={folder}", "train.max_steps=2") == 0
    return folder


def test_training_and_the_command_draw_the_same(trained, workplace, phantom_root):
    """views.png is what the run was shown; the other pictures are those of the same weights and slice."""
    assert run("monitor", f"checkpoint={trained / 'checkpoint_00000002.pth'}", "out=look", "hardware=cpu") == 0
    assert (trained / "monitor" / "views.png").read_bytes() == (workplace / "look" / "views.png").read_bytes()
    during, behind = (
        json.loads((folder / "stats.json").read_text())
        for folder in (trained / "monitor" / "step_00000002", workplace / "look")
    )
    assert during.keys() == behind.keys()
    for name, value in during.items():
        a, b = np.array(value, float), np.array(behind[name], float)  # no registers: None, which becomes NaN
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6, err_msg=name)
    _, val, store, _ = open_split(DataConfig(root=str(phantom_root)))
    hu = read_slice(val, store, middle_slice(val))
    patch, grid = behind["similarity_patch"], int(behind["patches"] ** 0.5)
    assert tuple(patch) == default_patch(hu, (grid, grid))


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("patch=[99,99]", "patch=[99,99] is outside the"),
        ("patch=[0,-1]", "patch=[0,-1] is outside the"),
        ("patch=[1]", "patch must be two numbers"),
        ("patch=[a,b]", "patch"),
        ("slice_id=nobody", "slice_id=nobody is not in the validation split"),
    ],
)
def test_a_wrong_patch_or_slice_is_one_line_and_no_picture(trained, workplace, capfd, typed, says):
    assert run("monitor", f"checkpoint={trained / 'checkpoint_00000002.pth'}", "out=look", "hardware=cpu", typed) == 1
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert says in lines[0]
    assert not (workplace / "look").exists()
