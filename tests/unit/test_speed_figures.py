"""The figures that explain a run's speed: utilisation of the processor, and steps told from what lies between them."""

from __future__ import annotations

import time

import pytest
import torch

from mambavision import create_model
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
