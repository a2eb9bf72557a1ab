"""HU to views: the lung survives, geometry is known, the same seed gives the same view."""

import numpy as np
import pytest

from dinoct.config import AugConfig, IbotConfig, ModelConfig, ProbeConfig, WindowConfig
from dinoct.data.views import ViewMaker, block_mask, letterbox, probe_spec, render_view, sample_view, window

MODEL = ModelConfig(img_size=64, patch=16)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def body(size: int = 256) -> np.ndarray:
    """An ellipse of soft tissue with a dark lung, and air around."""
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    hu = np.where((x / 0.8) ** 2 + (y / 0.5) ** 2 < 1, 40, -1000)
    return np.where(((x - 0.3) / 0.2) ** 2 + (y / 0.3) ** 2 < 1, -850, hu).astype(np.int16)


@pytest.mark.parametrize("seed", range(20))
def test_a_lung_ramp_keeps_its_grey_levels(seed):
    """-1000 to -400 HU, through the default augmentation: a loader that clips HU to [0, 1] first has one level left."""
    ramp = np.tile(np.linspace(-1000, -400, 601).round().astype(np.int16), (601, 1))
    spec = ViewMaker(
        AugConfig(global_scale=[1.0, 1.0], ratio=[1.0, 1.0], min_body=0.0), ModelConfig(img_size=608), IbotConfig()
    )
    view = spec(ramp, rng(seed))["global"][0]
    assert len(np.unique(view.round(4))) > 200
    assert view.min() >= 0
    assert view.max() <= 1


def test_window_maps_its_ends_to_0_and_1():
    assert window(np.array([-2000, -1000, -300, 400, 3000], np.int16), -1000.0, 400.0).tolist() == [0, 0, 0.5, 1, 1]


def test_views_depend_on_the_generator_alone():
    make = ViewMaker(AugConfig(local_crops=2, local_size=32, blur=0.5, noise=0.5), MODEL, IbotConfig(weight=1.0))
    one, same, other = make(body(), rng(1)), make(body(), rng(1)), make(body(), rng(2))
    assert one["global"].shape == (2, 64, 64)
    assert one["local"].shape == (2, 32, 32)
    assert one["masks"].shape == (2, 16)
    for key in one:
        assert np.array_equal(one[key], same[key])
    assert not np.array_equal(one["global"], other["global"])
    assert not np.array_equal(one["global"][0], one["global"][1])


def test_intensity_only_moves_no_pixel():
    """Its two views differ by the window alone: where both are unclipped they are a linear map of each other."""
    aug = AugConfig(global_scale=[1.0, 1.0], ratio=[1.0, 1.0], flip=0.0)
    a, b = ViewMaker(aug, MODEL, IbotConfig())(body(), rng(3))["global"]
    inside = (a > 0) & (a < 1) & (b > 0) & (b < 1)
    assert inside.sum() > 20
    assert abs(np.corrcoef(a[inside], b[inside])[0, 1]) > 0.999999
    assert not np.allclose(a, b)


def test_crops_without_body_are_drawn_again():
    hu = np.full((256, 256), -1000, np.int16)
    hu[100:156, 100:156] = 40
    spec = dict(scale=(0.02, 0.05), ratio=(0.75, 1.33), flip=0.5, window=WindowConfig(), size=32)

    def air_share(min_body: float) -> float:
        from dinoct.data.views import ViewSpec

        views = [sample_view(rng(i), ViewSpec(**spec, min_body=min_body), hu) for i in range(300)]
        crops = [hu[v.top : v.top + v.height, v.left : v.left + v.width] for v in views]
        return float(np.mean([(c > -500).mean() < 0.1 for c in crops]))

    assert air_share(0.0) > 0.5
    assert air_share(0.1) < 0.3


def test_flip_is_a_mirror():
    from dataclasses import replace

    view = sample_view(rng(0), probe_spec(ProbeConfig(), 64), body())
    plain, mirrored = (render_view(body(), replace(view, flip=flip), 64) for flip in (False, True))
    assert np.array_equal(plain, mirrored[:, ::-1])


def test_letterbox_keeps_proportions():
    tall = np.full((100, 50), 40, np.int16)
    boxed = letterbox(tall)
    assert boxed.shape == (100, 100)
    assert (boxed == 40).sum() == 100 * 50
    wide_pixels = letterbox(np.full((100, 50), 40, np.int16), (1.0, 2.0))
    assert wide_pixels.shape == (100, 100)
    assert (wide_pixels == 40).all()


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_block_masks_hit_their_share(share):
    shares = [block_mask(rng(i), 14, share).mean() for i in range(50)]
    assert np.mean(shares) == pytest.approx(share, abs=0.06)


def test_probe_views_do_not_follow_the_augmentation():
    spec = probe_spec(ProbeConfig(), 224)
    assert (spec.scale, spec.flip, spec.blur, spec.min_body) == ((0.5, 1.0), 0.5, 0.0, 0.0)


@pytest.mark.parametrize("mm_per_pixel", [0.5, 0.8])
def test_crops_in_millimetres_have_one_size_on_all_scanners(mm_per_pixel):
    make = ViewMaker(AugConfig(global_mm=[100.0, 100.0], min_body=0.0), MODEL, IbotConfig())
    views = [sample_view(rng(i), make.global_spec, body(512), mm_per_pixel) for i in range(50)]
    sides = [(view.height * view.width) ** 0.5 * mm_per_pixel for view in views]
    assert np.allclose(sides, 100.0, atol=1.0)
    assert len({view.top for view in views}) > 10


def test_a_crop_larger_than_the_slice_is_the_slice():
    make = ViewMaker(AugConfig(global_mm=[900.0, 900.0], ratio=[1.0, 1.0]), MODEL, IbotConfig())
    view = sample_view(rng(0), make.global_spec, body(256), 0.7)
    assert (view.height, view.width) == (256, 256)


def test_the_gram_teacher_gets_the_same_crop_in_more_pixels():
    aug = AugConfig(noise=1.0, blur=1.0)
    make = ViewMaker(aug, MODEL, IbotConfig(), gram_px=128)
    got, plain = make(body(), rng(4)), ViewMaker(aug, MODEL, IbotConfig())(body(), rng(4))
    assert got["gram"].shape == (2, 128, 128)
    assert np.array_equal(got["global"], plain["global"])  # it draws nothing of its own
    assert plain["gram"].size == 0
    small = got["gram"].reshape(2, 64, 2, 64, 2).mean(axis=(2, 4))
    assert np.abs(small - got["global"]).mean() < 0.05
    assert not np.allclose(small, got["global"], atol=0.02)  # the student's noise and blur are not in it
