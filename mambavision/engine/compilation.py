"""torch.compile for training steps: which mode, and what CUDA graphs ask of the loop."""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import os
import shutil
import signal
from collections.abc import Callable
from functools import cache

import torch
from torch import nn

from data.batch import workers_per_rank
from mambavision.config import TrainConfig
from mambavision.distributed import World
from mambavision.engine.stop import NOTICES
from mambavision.ops.selective_scan import ENVIRONMENT_OVERRIDE

_WITH_GRAPHS = ("reduce-overhead", "max-autotune")  # these modes capture CUDA graphs
_MOST_COMPILATIONS = 256  # of the model in one process


def compile_mode(cfg: TrainConfig, world: World) -> str | None:
    """The mode for torch.compile; None: steps run eagerly.

    On CUDA steps are compiled unless somebody wants to see or repeat the single operators, and on one GPU captured in CUDA
    graphs: launching MambaVision's many small kernels one by one takes a processor longer than a fast GPU needs to run
    them. On several GPUs graphs have not been tried beside DDP's exchange, so they are for who asks for them.
    """
    on_cuda = world.device.type == "cuda"
    wanted = cfg.trainer.compile
    if wanted is None:
        operators_matter = cfg.debug == "nan" or cfg.trainer.deterministic or cfg.trainer.grad_checkpointing
        # The reference scan is a loop over tokens, each turn of which would be compiled.
        is_loop = "reference" in (cfg.model.scan_backend, os.environ.get(ENVIRONMENT_OVERRIDE))
        can_be = has_c_compiler() and importlib.util.find_spec("triton") is not None
        wanted = on_cuda and can_be and not operators_matter and not is_loop
    if not wanted:
        return None
    if cfg.trainer.compile_mode != "auto":
        return cfg.trainer.compile_mode
    return "reduce-overhead" if on_cuda and world.world_size == 1 else "default"


def has_c_compiler() -> bool:
    """Triton, which torch.compile's CUDA kernels are written in, builds its launchers with one."""
    return any(shutil.which(name) for name in (os.environ.get("CC"), "gcc", "clang", "cc") if name)


def compiled(model: nn.Module, mode: str | None) -> tuple[nn.Module, Callable[[], None]]:
    """The model as training steps call it, and what to call before each forward pass. mode: None leaves it as it is.

    Evaluation calls `model` itself: its batches have another size, for which everything would be compiled again.
    """
    if mode is None:
        return model, _nothing
    start_compilers()
    _raise_limit()
    fast = torch.compile(model, mode=mode, dynamic=False)  # a ramp of image sizes has few of them
    if mode not in _WITH_GRAPHS:
        return fast, _nothing
    # A replay overwrites what the one before gave. Autograd would take the first gradients as they are for .grad; into
    # gradients that exist it adds.
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    return fast, torch.compiler.cudagraph_mark_step_begin


def _raise_limit() -> None:
    """How often one function is compiled in a process: once for each image size of a ramp and each point of a sweep.

    Beyond 8, torch's own limit, it would run uncompiled from then on.
    """
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, _MOST_COMPILATIONS)


@cache  # once a process: the points of a sweep share them
def start_compilers() -> None:
    """Torch's processes that compile Triton kernels: a rank's share of the cores, and deaf to notices.

    Schedulers send their notices to every process of a job. Without its compilers a step would wait for ever (torch before
    2.14) or fail, where it is to be finished and saved. Signals that are held back here stay so in the processes started
    meanwhile; they end with this one.
    """
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(min(workers_per_rank(None), 32)))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, NOTICES)
    try:
        from torch._inductor.async_compile import AsyncCompile  # starts them, or does so when it is asked to

        AsyncCompile.warm_pool()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    atexit.register(_let_idle_compilers_go)  # before torch's own, which came with the import


def _let_idle_compilers_go() -> None:
    """From torch 2.14 on they are ended by SIGTERM, which these do not hear: the process would wait for ten seconds."""
    from torch._inductor import async_compile

    for pool in async_compile._pool_set:
        if hasattr(pool, "quiesce") and not pool.pending_futures:
            with contextlib.suppress(OSError, RuntimeError):  # they are gone, or the pool is closed
                pool.quiesce()


def _nothing() -> None:
    pass
