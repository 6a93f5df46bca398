"""Which number format is taken on which processor, and what a user hears who asks for one that it lacks."""

from __future__ import annotations

import warnings

import pytest
import torch

from mambavision.distributed import World
from mambavision.engine.precision import hardware_has_bf16, resolve_precision

CPU = World(rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu"))


def processor_with(monkeypatch, **capabilities):
    """Lets PyTorch report a processor with these instructions, both by the new name and by the old ones."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    has_avx512, has_amx = capabilities.get("avx512_bf16", False), capabilities.get("amx_bf16", False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)


@pytest.mark.parametrize("instructions", ["avx512_bf16", "amx_bf16"])
def test_auto_takes_bf16_where_the_processor_computes_in_it(monkeypatch, instructions):
    processor_with(monkeypatch, **{instructions: True})
    assert hardware_has_bf16(CPU.device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_precision("auto", CPU) == "bf16"
        assert resolve_precision("bf16", CPU) == "bf16"


def test_auto_takes_fp32_where_bf16_would_be_emulated(monkeypatch):
    processor_with(monkeypatch, avx2=True)
    assert resolve_precision("auto", CPU) == "fp32"


def test_asking_for_emulated_bf16_is_answered_with_what_to_type_instead(monkeypatch):
    processor_with(monkeypatch, avx2=True)
    with pytest.warns(RuntimeWarning, match=r"no bfloat16 instructions.*Type trainer.precision=auto"):
        assert resolve_precision("bf16", CPU) == "bf16"


def test_fp16_on_a_cpu_is_refused_with_what_to_type_instead():
    with pytest.raises(ValueError, match="type trainer.precision=bf16 .eval.py: precision=bf16., fp32 or auto"):
        resolve_precision("fp16", CPU)
