"""The figures that explain a run's speed: utilisation of the processor, and steps told from what lies between them."""

from __future__ import annotations

import time

import pytest
import torch

from mambavision import create_model
from mambavision.ops.selective_scan import BACKENDS
from mambavision.telemetry.flops import peak_flops, training_flops
from mambavision.telemetry.meters import StepMeters


@pytest.mark.slow
def test_operations_are_three_times_the_papers_macs_twice() -> None:
    """Table 1 of the paper: 4.4 GMACs for T at 224 px; attention's products and the scan are not in its count alike."""
    model = create_model("mambavision_t").train()
    statistics = model.state_dict()["patch_embed.conv_down.1.running_mean"].clone()

    assert training_flops(model, 224) == pytest.approx(3 * 2 * 4.4e9, rel=0.05)

    assert model.training
    assert torch.equal(model.state_dict()["patch_embed.conv_down.1.running_mean"], statistics)


def test_the_peak_is_the_data_sheets_and_unknown_elsewhere() -> None:
    assert peak_flops("NVIDIA A100-SXM4-80GB", "bf16") == 312e12
    assert peak_flops("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "fp16") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "fp32") is None
    assert peak_flops("Some GPU of 2030", "bf16") is None
    assert peak_flops("NVIDIA A40", "bf16") == 149.7e12
    assert peak_flops("NVIDIA RTX A4000", "bf16") is None, "no A40"
    assert peak_flops("NVIDIA RTX A1000", "bf16") is None, "no A100"
    assert peak_flops("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16") is None, "a seventh of one"


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "auto"])
def test_operations_are_counted_whatever_scan_is_asked_for(backend: str) -> None:
    """They are counted on the meta device; a GPU's scan asked for by name ended rank 0's start there."""
    settings = dict(num_classes=10, dim=16, in_dim=8, depths=(1, 1, 2, 2), num_heads=(1, 1, 2, 2))
    model = create_model("mambavision_nano", scan_backend=backend, **settings)
    assert training_flops(model, 32) > 1e6


def test_a_slow_step_is_told_from_time_between_steps() -> None:
    meters = StepMeters(torch.device("cpu"))
    for seconds in (0.0, 0.0, 0.0, 0.1):
        meters.begin_step()
        time.sleep(seconds)
        meters.add_loss(torch.zeros(()))
        meters.add_step(torch.zeros(()), 8)
    time.sleep(0.2)

    figures = meters.flush()

    interval = 4 * figures["speed/step_seconds"]
    assert figures["speed/step_seconds_median"] < 0.1 <= figures["speed/step_seconds_max"] <= interval - 0.2
