"""Model FLOPs utilisation: the operations that training an image takes, over what the processor can do.

Counted are the products (linear layers, convolutions, attention), forward once and backward twice, as in PaLM
(arXiv 2204.02311, appendix B); the scan's few operations and MESA's extra forward pass are not.
"""

from __future__ import annotations

import re

import torch
from torch import nn
from torch.func import functional_call

# Dense bfloat16 (float16 where there is none) products with float32 sums, TFLOP/s, by NVIDIA's data sheets. The first
# name whose words occur in torch.cuda.get_device_name() counts: an RTX A4000 is no A40.
_PEAK_TFLOPS = {
    "B200": 2250.0,
    "GB200": 2500.0,
    "GH200": 989.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "A40": 149.7,
    "A10G": 70.0,
    "A10": 125.0,
    "RTX A6000": 154.8,
    "RTX 6000 Ada": 364.2,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
    "V100": 125.0,
    "T4": 65.0,
}


def peak_flops(device_name: str, precision: str) -> float | None:
    """FLOP/s of the processor's data sheet; None for one that is not listed, for a slice of one (MIG), and for fp32."""
    if precision not in ("bf16", "fp16") or " MIG " in device_name:
        return None
    return next((1e12 * peak for name, peak in _PEAK_TFLOPS.items() if re.search(rf"\b{name}\b", device_name)), None)


@torch.no_grad()
def training_flops(model: nn.Module, image_size: int) -> float:
    """Operations of training one image of image_size x image_size px (a product and its sum are two).

    Shapes alone decide, so it runs on the meta device and touches neither the model's tensors nor its statistics.
    """
    from torch.utils.flop_counter import FlopCounterMode  # a sixth of a second to import

    shapes = {name: torch.empty_like(t, device="meta") for name, t in model.state_dict(keep_vars=True).items()}
    image = torch.empty(1, 3, image_size, image_size, device="meta")
    was_training = model.training
    model.eval()
    try:
        with FlopCounterMode(display=False) as counter:
            functional_call(model, shapes, (image,))
    finally:
        model.train(was_training)
    # Forward, and gradients of activations and of weights; behind a frozen backbone there are next to none.
    return (3.0 if all(p.requires_grad for p in model.parameters()) else 1.0) * counter.get_total_flops()
