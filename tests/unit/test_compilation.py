"""When training steps are compiled, and how."""

from __future__ import annotations

import pytest
import torch

from mambavision.compose import compose_train_config
from mambavision.engine.compilation import compile_mode, compiled
from tests.unit.model_samples import micro

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    ("overrides", "on_cuda", "on_cpu"),
    [
        ([], "reduce-overhead", None),
        (["trainer.compile=true"], "reduce-overhead", "default"),
        (["trainer.compile=false"], None, None),
        (["trainer.compile_mode=max-autotune"], "max-autotune", None),
        (["trainer.grad_checkpointing=true"], None, None),
        (["trainer.deterministic=true"], None, None),
        (["debug=nan"], None, None),
    ],
)
def test_cuda_steps_are_compiled_unless_single_operators_matter(overrides, on_cuda, on_cpu) -> None:
    cfg = compose_train_config(["data=synthetic", *overrides])
    assert (compile_mode(cfg, CUDA), compile_mode(cfg, CPU)) == (on_cuda, on_cpu)


def test_nothing_is_compiled_by_itself_where_triton_has_no_c_compiler(monkeypatch, tmp_path) -> None:
    cfg = compose_train_config(["data=synthetic"])
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert compile_mode(cfg, CUDA) is None


@pytest.mark.slow  # imports torch's compiler
def test_gradients_exist_before_a_replay_could_lend_its_own() -> None:
    model = micro()
    model.head.bias.requires_grad_(False)
    compiled(model, "reduce-overhead")
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)
    assert model.head.bias.grad is None
