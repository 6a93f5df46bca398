"""What is drawn for a sample, and what the drawn operations do to pixels."""

import math

import numpy as np
import pytest
import timm.data.auto_augment as timm_ops
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize
from torchvision.transforms import functional as F

from data import augment, keyed_random
from data.augment import BILINEAR, AugmentPlan, Box, Operation, RandAugment, parse_policy, random_resized_box
from data.pixels import EvalPlan, apply, augmented, center_cropped, read_image
from mambavision.config import AugmentConfig
from tests.unit.data_samples import smooth_image

MEAN = (0.485, 0.456, 0.406)
FILL = (124, 116, 104)


def plan(**config) -> AugmentPlan:
    return AugmentPlan.create(AugmentConfig(**config), image_size=32, seed=0, mean=MEAN)


def test_policies_are_read_in_timms_notation():
    assert parse_policy("rand-m9-mstd0.5-inc1") == RandAugment(magnitude=9, magnitude_std=0.5, increasing=True)
    assert parse_policy("rand-m7-n3-p0.8-mmax15") == RandAugment(7, 3, 0.8, magnitude_max=15)
    assert parse_policy("trivial") == "trivial"
    assert parse_policy("none") is None


@pytest.mark.parametrize("text", ["rand-m9-k4", "augmix-m3", "rand-m", "randm9"])
def test_an_unknown_policy_is_answered_with_a_known_one(text):
    with pytest.raises(ValueError, match="rand-m9"):
        parse_policy(text)


def test_a_crop_is_inside_and_has_the_area_and_ratio_asked_for():
    for index in range(300):
        top, left, height, width = random_resized_box(
            keyed_random.sample_key(0, 0, index), 300, 400, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)
        )
        assert 0 <= top <= 300 - height and 0 <= left <= 400 - width
        assert 0.07 < height * width / (300 * 400) <= 1.0
        assert 0.72 < width / height < 1.38


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 500), (500, 1), (3, 10_000)])
def test_a_crop_of_an_extreme_image_is_central_and_not_empty(height, width):
    box = random_resized_box(5, height, width, scale=(0.99, 1.0), ratio=(3 / 4, 4 / 3))
    assert 1 <= box.height <= height and 1 <= box.width <= width
    if height != width:
        assert box == Box((height - box.height) // 2, (width - box.width) // 2, box.height, box.width)


def test_turning_a_decision_off_does_not_shift_the_others():
    full, bare = plan(), plan(hflip=0.0, interpolation="bicubic", auto_augment="none")
    keys = [keyed_random.sample_key(0, 3, index) for index in range(50)]
    assert [full.box(key, 90, 70) for key in keys] == [bare.box(key, 90, 70) for key in keys]


def test_the_same_sample_differs_between_epochs_and_seeds():
    image = smooth_image(0, 64, 48)
    keys = {keyed_random.sample_key(seed, epoch, 7) for seed in range(3) for epoch in range(3)}
    assert len({augmented(image, key, plan()).tobytes() for key in keys}) == 9


TIMM_NAMES = {
    "autocontrast": "AutoContrast",
    "equalize": "Equalize",
    "invert": "Invert",
    "rotate": "Rotate",
    "posterize": "PosterizeIncreasing",
    "solarize": "SolarizeIncreasing",
    "solarize_add": "SolarizeAdd",
    "color": "ColorIncreasing",
    "contrast": "ContrastIncreasing",
    "brightness": "BrightnessIncreasing",
    "sharpness": "SharpnessIncreasing",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateXRel",
    "translate_y": "TranslateYRel",
}


@pytest.mark.parametrize("level", [0.0, 2.7, 9.0, 9.9])
@pytest.mark.parametrize("name", augment.RAND_AUGMENT_OPERATIONS)
def test_each_operation_equals_timms_at_the_same_level_and_sign(name, level, monkeypatch):
    image = smooth_image(3, 32, 32)
    for sign in (1.0, -1.0):
        monkeypatch.setattr(timm_ops.random, "random", lambda sign=sign: 0.9 if sign < 0 else 0.1)
        level_to_argument = timm_ops.LEVEL_TO_ARG[TIMM_NAMES[name]]
        arguments = level_to_argument(level, {}) if level_to_argument else ()
        theirs = timm_ops.NAME_TO_OP[TIMM_NAMES[name]](image, *arguments, fillcolor=FILL, resample=Image.BILINEAR)
        ours = augment._argument(name, level / 10.0, sign, 32, increasing=True)
        np.testing.assert_array_equal(apply(image, Operation(name, ours, BILINEAR), FILL), theirs)


def test_full_magnitude_posterises_to_black():
    """Pillow refuses 0 bits; timm asks for them at magnitude 10."""
    assert not np.asarray(apply(smooth_image(0, 8, 8), Operation("posterize", 0.0), FILL)).any()


def test_trivial_augment_equals_torchvisions_operations():
    image = smooth_image(4, 32, 32)
    nearest = InterpolationMode.NEAREST
    cases = [
        (
            Operation("shear_x", 0.4),
            F.affine(image, 0, [0, 0], 1, [math.degrees(math.atan(0.4)), 0], nearest, center=[0, 0]),
        ),
        (Operation("translate_y", -7.0), F.affine(image, 0, [0, 7], 1, [0, 0], nearest)),
        (Operation("rotate", 33.0), F.rotate(image, 33.0, nearest)),
        (Operation("sharpness", 1.7), F.adjust_sharpness(image, 1.7)),
        (Operation("posterize", 3.0), F.posterize(image, 3)),
        (Operation("solarize", 100.5), F.solarize(image, 100.5)),
    ]
    for operation, theirs in cases:
        np.testing.assert_array_equal(apply(image, operation, (0, 0, 0)), theirs, err_msg=operation.name)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("crop_pct", "crop_mode"), [(1.0, "center"), (0.875, "center"), (0.9, "squash")])
@pytest.mark.parametrize("size", [(64, 48), (33, 57), (31, 20), (224, 224)])
def test_evaluation_equals_torchvisions_resize_and_center_crop(size, crop_pct, crop_mode, interpolation):
    image = smooth_image(1, *size)
    side = math.floor(40 / crop_pct)
    mode = InterpolationMode(interpolation)
    theirs = Compose([Resize((side, side) if crop_mode == "squash" else side, mode), CenterCrop(40)])(image)
    np.testing.assert_array_equal(center_cropped(image, EvalPlan(40, crop_pct, crop_mode, interpolation)), theirs)


def test_small_images_are_padded_and_cropped_where_the_key_says():
    small = plan(random_crop=False, pad_crop=4, hflip=0.0, auto_augment="none", interpolation="bilinear")
    image = smooth_image(2, 32, 32)
    padded = np.pad(np.asarray(image), ((4, 4), (4, 4), (0, 0)))
    for index in range(20):
        key = keyed_random.sample_key(0, 0, index)
        top, left = small.pad_offset(key)
        np.testing.assert_array_equal(augmented(image, key, small), padded[top : top + 32, left : left + 32])
    assert len({small.pad_offset(keyed_random.sample_key(0, 0, index)) for index in range(50)}) > 20


def test_jitter_goes_with_three_augment_but_not_with_rand_augment():
    key = keyed_random.sample_key(0, 0, 0)
    assert len(plan(auto_augment="three", color_jitter=0.3).operations(key)) == 4
    assert plan(auto_augment="rand-p0", color_jitter=0.3).operations(key) == []
    assert {op.name for op in plan(auto_augment="none", color_jitter=0.3).operations(key)} == {
        "brightness",
        "contrast",
        "color",
    }


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16", "1", "LA"])
def test_every_kind_of_image_becomes_rgb(mode, tmp_path):
    path = tmp_path / f"image.{'tif' if mode == 'CMYK' else 'png'}"
    if mode == "I;16":
        Image.fromarray(np.full((9, 7), 300 * 256 // 2, dtype=np.uint16)).save(path)
    else:
        smooth_image(0, 7, 9).convert(mode if mode != "LA" else "L").convert(mode).save(path)
    image = read_image(str(path))
    assert image.mode == "RGB" and image.size == (7, 9)
    if mode == "I;16":
        assert image.getpixel((0, 0)) == (150, 150, 150), "16 bits are scaled, not clipped"
