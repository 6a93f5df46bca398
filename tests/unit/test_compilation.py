"""When training steps are compiled, and how."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch
from torch import nn

from mambavision.compose import compose_train_config
from mambavision.distributed import World
from mambavision.engine.compilation import compile_mode, compiled
from tests.unit.model_samples import micro


def world(device: str, size: int = 1) -> World:
    return World(rank=0, world_size=size, local_rank=0, local_world_size=size, device=torch.device(device))


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
        (["model.scan_backend=reference"], None, None),
    ],
)
def test_cuda_steps_are_compiled_unless_single_operators_matter(overrides, on_cuda, on_cpu) -> None:
    cfg = compose_train_config(["data=synthetic", *overrides])
    assert (compile_mode(cfg, world("cuda")), compile_mode(cfg, world("cpu"))) == (on_cuda, on_cpu)


def test_graphs_beside_other_ranks_are_for_who_asks_for_them() -> None:
    asked = ["trainer.compile_mode=reduce-overhead"]
    cfgs = [compose_train_config(["data=synthetic", *overrides]) for overrides in ([], asked)]
    assert [compile_mode(cfg, world("cuda", 8)) for cfg in cfgs] == ["default", "reduce-overhead"]


def test_nothing_is_compiled_by_itself_where_triton_has_no_c_compiler(monkeypatch, tmp_path) -> None:
    cfg = compose_train_config(["data=synthetic"])
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert compile_mode(cfg, world("cuda")) is None


def test_nothing_is_compiled_by_itself_without_triton(monkeypatch) -> None:
    cfg = compose_train_config(["data=synthetic"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert compile_mode(cfg, world("cuda")) is None


@pytest.mark.slow  # imports torch's compiler
def test_gradients_exist_before_a_replay_could_lend_its_own() -> None:
    model = micro()
    model.head.bias.requires_grad_(False)
    compiled(model, "reduce-overhead")
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)
    assert model.head.bias.grad is None


@pytest.mark.slow
def test_the_tenth_point_of_a_sweep_is_compiled_too() -> None:
    from torch._dynamo.testing import CompileCounter

    class Point(nn.Module):
        def __init__(self, depth: int) -> None:
            super().__init__()
            self.depth = depth

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(self.depth):
                x = x + 1
            return x

    compiled(micro(), "default")
    counter = CompileCounter()
    for depth in range(1, 11):
        torch.compile(Point(depth), backend=counter, dynamic=False)(torch.ones(3))
    assert counter.frame_count == 10


@pytest.mark.slow
def test_compilers_outlive_a_notice_to_all_processes_of_the_job() -> None:
    program = """
import atexit, os, signal, subprocess, sys, time
atexit.register(lambda: print(time.monotonic() - end))  # the first to be registered is the last to be called
from mambavision.engine.compilation import start_compilers
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "2"
start_compilers()
assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
from torch._inductor.async_compile import AsyncCompile
pool = AsyncCompile.process_pool()
assert pool.submit(len, "ready").result(120) == 5
slow = pool.submit(time.sleep, 2)
notices = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP
for number in notices:
    signal.signal(number, lambda *_: None)
    os.killpg(0, number)
slow.result(60)
print("finished")
end = time.monotonic()
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, start_new_session=True)
    finished, seconds = result.stdout.splitlines()
    assert finished == "finished" and float(seconds) < 6, result.stderr
