"""The named variants: what shapes each network, and how the published weights of it are scored. No torch in here.

Source: arXiv 2407.08083, table 1 and appendix; published Top-1 and evaluation crops. `nano` and `micro` are ours, for
images of 32 to 64 px.
"""

from __future__ import annotations

from dataclasses import dataclass

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Variant:
    """One network: the keywords of its architecture, then how to feed and score it."""

    depths: tuple[int, int, int, int]  # blocks of each stage; the first half of stages 3, 4 are mixers
    dim: int  # width of stage 1; each stage doubles it
    in_dim: int  # width between the two convolutions of the stem
    num_heads: tuple[int, int, int, int]  # attention heads of each stage; those of stages 1, 2 are unused
    window_size: tuple[int, int] = (14, 7)  # side of the windows of stages 3 and 4, in tokens
    drop_path: float = 0.2  # stochastic depth of the last block, rising linearly from 0
    layer_scale: float | None = None  # initial value of the per-channel scales of stages 3, 4; None: no scales
    stem_stride: int = 4  # the map entering stage 1 is this many times smaller than the image: 4, 2 or 1
    image_size: int = 224  # side of the square it is trained on, px
    crop_pct: float = 1.0  # evaluation: the centre crop is this share of the resized image
    crop_mode: str = "center"  # center | squash (resize both sides, no crop)
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    params: int = 0  # parameters with 1000 classes, exact
    published_top1: float | None = None  # ImageNet-1K, %


ARCHITECTURE_FIELDS = ("depths", "dim", "in_dim", "num_heads", "window_size", "drop_path", "layer_scale", "stem_stride")

_T = {"depths": (1, 3, 8, 4), "dim": 80, "in_dim": 32, "num_heads": (2, 4, 8, 16)}
_S = {"depths": (3, 3, 7, 5), "dim": 96, "in_dim": 64, "num_heads": (2, 4, 8, 16)}
_B = {
    **{"depths": (3, 3, 10, 5), "dim": 128, "in_dim": 64, "num_heads": (2, 4, 8, 16)},
    **{"drop_path": 0.3, "layer_scale": 1e-5, "params": 97_685_288},
}
_L = {
    **{"depths": (3, 3, 10, 5), "dim": 196, "in_dim": 64, "num_heads": (4, 8, 16, 32)},
    **{"drop_path": 0.3, "layer_scale": 1e-5, "params": 227_961_048},
}
_L2 = {**_L, "depths": (3, 3, 12, 5), "params": 241_554_824}
_L3 = {
    **{"depths": (3, 3, 20, 10), "dim": 256, "in_dim": 64, "num_heads": (4, 8, 16, 32)},
    **{"drop_path": 0.5, "layer_scale": 1e-5, "params": 739_570_472},
}
_AT_512 = {"window_size": (32, 16), "image_size": 512, "crop_pct": 0.93, "crop_mode": "squash"}

VARIANTS: dict[str, Variant] = {
    "mambavision_t": Variant(**_T, params=31_794_248, published_top1=82.3),
    "mambavision_t2": Variant(**{**_T, "depths": (1, 3, 11, 4)}, crop_pct=0.98, params=35_104_008, published_top1=82.7),
    "mambavision_s": Variant(**_S, crop_pct=0.93, params=50_140_584, published_top1=83.3),
    "mambavision_b": Variant(**_B, published_top1=84.2),
    "mambavision_l": Variant(**_L, published_top1=85.0),
    "mambavision_l2": Variant(**_L2, published_top1=85.3),
    "mambavision_b_21k": Variant(**_B, published_top1=84.9),
    "mambavision_l_21k": Variant(**_L, published_top1=86.1),
    "mambavision_l2_512_21k": Variant(**_L2, **_AT_512, published_top1=87.3),
    "mambavision_l3_256_21k": Variant(**_L3, window_size=(16, 8), image_size=256, published_top1=87.3),
    "mambavision_l3_512_21k": Variant(**_L3, **_AT_512, published_top1=88.1),
    "mambavision_nano": Variant(
        **{"depths": (2, 2, 2, 1), "dim": 32, "in_dim": 32, "num_heads": (1, 2, 2, 4), "window_size": (4, 2)},
        **{"stem_stride": 2, "drop_path": 0.0, "image_size": 32, "params": 1_872_456},
    ),
    "mambavision_micro": Variant(
        **{"depths": (2, 2, 4, 2), "dim": 48, "in_dim": 32, "num_heads": (1, 2, 3, 6), "window_size": (8, 4)},
        **{"stem_stride": 2, "drop_path": 0.1, "image_size": 64, "params": 6_597_032},
    ),
}
