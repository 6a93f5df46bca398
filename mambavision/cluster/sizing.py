"""How large a run is before it runs: memory of a GPU, steps, hours. Formulas, and where each number in them is from."""

from __future__ import annotations

from dataclasses import dataclass

from mambavision.models.variants import VARIANTS

IMAGENET_TRAIN_IMAGES = 1_281_167
GIB = 2**30

# Per parameter, bytes: fp32 weights 4, gradients 4, LAMB's two moments 8, EMA 4. Autocast's bf16 copies of the weights
# that a forward pass uses live until its backward pass: 2.
_STATE_BYTES = {"weights": 4, "gradients": 4, "moments": 8, "ema": 4}
_AUTOCAST_BYTES = 2
_CHECKPOINT_BYTES = 16  # weights, EMA and moments
# CUDA context, cuDNN and NCCL work space, and what the allocator holds beyond what is asked for.
_CUDA_FIXED_BYTES = 2 * GIB
_ALLOCATOR_SLACK = 1.10


@dataclass(frozen=True)
class Size:
    """What is known of one model at its own resolution, beside its parameters."""

    saved_mib: float  # an image, what the forward pass keeps for the backward pass in bf16; by `saved_mib_per_image`
    published_img_per_sec: int | None  # A100, inference, batch 128 (arXiv 2407.08083); None: not published


SIZES = {
    "mambavision_t": Size(31.8, 6298),
    "mambavision_t2": Size(38.5, 5990),
    "mambavision_s": Size(42.9, 4700),
    "mambavision_b": Size(71.0, 3670),
    "mambavision_l": Size(108.3, 2190),
    "mambavision_l2": Size(120.5, 1021),
    "mambavision_l3_256_21k": Size(311.2, None),
}
_FP32_FACTOR = 2.0  # measured 1.99 for T, S, B, L, L2


def gpu_memory_gib(name: str, micro_batch_size: int, precision: str = "bf16") -> float:
    """Expected peak of one GPU: state + saved activations x images + work space."""
    size, params = SIZES[name], VARIANTS[name].params
    saved = size.saved_mib * (_FP32_FACTOR if precision == "fp32" else 1)
    autocast = 0 if precision == "fp32" else _AUTOCAST_BYTES
    state = params * (sum(_STATE_BYTES.values()) + autocast)
    return (_ALLOCATOR_SLACK * (state + micro_batch_size * saved * 2**20) + _CUDA_FIXED_BYTES) / GIB


def expected_train_img_per_sec(name: str) -> float | None:
    """Of one A100, at most: a third of the published inference rate, as a backward pass costs two forward passes."""
    published = SIZES[name].published_img_per_sec if name in SIZES else None
    return None if published is None else published / 3


def hours(images: float, img_per_sec: float) -> float:
    return images / img_per_sec / 3600


def checkpoint_bytes(params: int) -> int:
    return params * _CHECKPOINT_BYTES


def saved_mib_per_image(name: str, precision: str) -> float:
    """Measure what a forward pass keeps for the backward pass, by watching autograd on the CPU.

    The difference between three images and two, so that whatever does not grow with the batch (parameters, their bf16
    copies) falls out.
    """
    import torch

    from mambavision import VARIANTS, create_model

    model = create_model(name).train()
    side = VARIANTS[name].image_size

    def saved_bytes(batch: int) -> int:
        storages: dict[int, torch.UntypedStorage] = {}  # kept, so that no address is given out twice

        def watch(tensor: torch.Tensor) -> torch.Tensor:
            storages.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage())
            return tensor

        images = torch.randn(batch, 3, side, side).to(memory_format=torch.channels_last)
        with (
            torch.autograd.graph.saved_tensors_hooks(watch, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32"),
        ):
            model(images)
        return sum(storage.nbytes() for storage in storages.values())

    return (saved_bytes(3) - saved_bytes(2)) / 2**20
