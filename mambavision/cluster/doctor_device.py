"""Pre-flight checks that compute: the device, the scan backends against the reference, all-reduce, the loader."""

from __future__ import annotations

import os
import time
from collections import Counter
from contextlib import closing

import torch
import torch.distributed as dist

import data
from mambavision import distributed
from mambavision.batch_plan import batch_plan
from mambavision.cluster import sizing
from mambavision.cluster.doctor import Finding, Plan, first_line, has_error, host
from mambavision.config import TrainConfig
from mambavision.distributed import World
from mambavision.engine.compilation import has_c_compiler
from mambavision.ops.selective_scan import choose_backend, selective_scan_tokens

_SCAN_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # of the largest value
_REDUCE_MIB = 64  # about MambaVision-T's gradients in bf16
_LOADER_SECONDS = 10.0


def check_torch(cfg: TrainConfig) -> list[Finding]:
    wants_cuda = cfg.trainer.device == "cuda" or (cfg.trainer.device == "auto" and cfg.trainer.expected_gpus)
    if cfg.trainer.device == "cpu" or not torch.cuda.is_available():
        if torch.version.cuda is None:
            cure = "this torch is built without CUDA: see requirements-gpu.txt"
        else:
            cure = "does nvidia-smi see one? In a container: --gpus all (docker), --nv (apptainer)"
        if wants_cuda:
            level = "error" if cfg.trainer.device == "cuda" else "warning"
            return [Finding(level, "cuda", "torch sees no CUDA device", f"{cure}; without one: trainer=cpu", host())]
        return [Finding("ok", "cuda", f"not asked for; {torch.get_num_threads()} CPU threads", host=host())]
    findings = []
    count = torch.cuda.device_count()
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if ranks > count:
        told = f"{ranks} ranks here, but only {count} CUDA devices"
        cure = f"does nvidia-smi see them all? If so, {count} ranks a node (NPROC_PER_NODE, --nproc_per_node)"
        findings.append(Finding("error", "cuda", told, cure, host()))
    for i in range(count):
        try:
            p = torch.cuda.get_device_properties(i)
            free, total = torch.cuda.mem_get_info(i)
        except RuntimeError as error:  # the driver lists a GPU that has failed
            told = f"{i}: does not answer ({first_line(error)})"
            findings.append(Finding("error", "cuda", told, "look at nvidia-smi and dmesg", host()))
            continue
        told = f"{i}: {p.name}, {total / sizing.GIB:.0f} GiB, {free / sizing.GIB:.0f} free"
        if free < 0.9 * total:
            findings.append(Finding("warning", "cuda", told, "somebody else uses it (nvidia-smi)", host()))
        else:
            findings.append(Finding("ok", "cuda", f"{told}, CUDA {torch.version.cuda}", host=host()))
    return findings if has_error(findings) else [*findings, *_compiler(cfg), *_memory(cfg)]


def check_same_device(world: World) -> list[Finding]:
    """Collective. One error for each host whose ranks compute on the CPU where others have CUDA; every rank gets all.

    After an error nothing may be exchanged between the devices: CPU and CUDA ranks would wait for each other for ever.
    """
    by_device = distributed.ranks_by_device(world, host())
    if len(by_device) == 1:
        return []
    ranks = sum(by_device.values(), Counter())
    findings = []
    for where, count in by_device["cpu"].items():
        told = f"{count} of {ranks[where]} ranks here have no CUDA device, while other ranks of the job have one"
        findings.append(Finding("error", "device", told, "look at nvidia-smi there, and keep the host out", where))
    return findings


def _compiler(cfg: TrainConfig) -> list[Finding]:
    if cfg.trainer.compile is False or has_c_compiler():
        return []
    told = "no C compiler: steps cannot be compiled, and Triton's scan does not start"
    return [Finding("warning", "compiler", told, "install gcc, or name one in CC", host())]


def _memory(cfg: TrainConfig) -> list[Finding]:
    if cfg.model.name not in sizing.SIZES:
        return []
    micro = cfg.trainer.micro_batch_size
    needed = sizing.gpu_memory_gib(cfg.model.name, micro, cfg.trainer.precision)
    total = torch.cuda.get_device_properties(0).total_memory / sizing.GIB
    told = f"{cfg.model.name} with micro-batches of {micro} needs about {needed:.0f} GiB of {total:.0f} (formula)"
    if needed <= total:
        return [Finding("ok", "memory", told)]
    cure = f"trainer.micro_batch_size={micro // 2} halves it, at other BatchNorm groups than the recipe's"
    return [Finding("warning", "memory", told, cure)]


def check_scan() -> list[Finding]:
    """Every backend that this device offers, forward and backward, against the plain PyTorch reference."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    findings = []
    for backend in ("triton", "mamba_ssm") if device == "cuda" else ("cpu",):
        try:
            error = max(_scan_error(backend, device, dtype) / tol for dtype, tol in _SCAN_TOLERANCE.items())
        except (ImportError, RuntimeError, ValueError) as problem:
            needed = backend == choose_backend(device, torch.float32)
            cure = "pip install -r requirements-gpu.txt" if backend == "mamba_ssm" else "see docs/performance.md"
            level = "warning" if needed or backend != "mamba_ssm" else "ok"
            findings.append(Finding(level, f"scan {backend}", f"unavailable: {first_line(problem)}", cure))
            continue
        told = f"{error:.0%} of the allowed difference from the reference, forward and backward, fp32 and bf16"
        if error > 1:
            cure = f"do not train with it: model.scan_backend=reference, and remove the cache of {backend} kernels"
            findings.append(Finding("error", f"scan {backend}", told, cure, host()))
        else:
            findings.append(Finding("ok", f"scan {backend}", told))
    return [*findings, Finding("ok", "scan", f"auto takes {choose_backend(device, torch.float32)}")]


def _scan_error(backend: str, device: str, dtype: torch.dtype) -> float:
    """Largest difference over output and gradients, relative to the largest value of each."""
    torch.manual_seed(0)
    batch, length, width, state = 2, 49, 16, 8
    inputs = [torch.randn(batch, length, n, device=device).to(dtype) for n in (width, width, state, state)]
    a = -torch.rand(width, state, device=device) - 0.1
    d, bias = torch.ones(width, device=device), torch.zeros(width, device=device)
    results = []
    for name in (backend, "reference"):
        u, delta, b, c = (x.clone().requires_grad_() for x in inputs)
        y = selective_scan_tokens(u, delta, a, b, c, d, bias, backend=name)
        y.float().square().mean().backward()
        results.append([t.detach().float() for t in (y, u.grad, delta.grad, b.grad, c.grad)])
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in zip(*results))


def check_all_reduce(world: World) -> Finding:
    """Collective. Every rank must call it; each learns the same time."""
    if not distributed.is_distributed():
        return Finding("ok", "all-reduce", "one process, nothing to reduce")
    tensor = torch.full((_REDUCE_MIB * 2**18,), float(world.rank), device=world.device)
    dist.all_reduce(tensor)  # the first one connects the ranks
    expected = world.world_size * (world.world_size - 1) / 2
    correct = distributed.agree(int(float(tensor[0]) != expected)) == 0
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    dist.all_reduce(tensor)
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = max(distributed.gather_objects(time.perf_counter() - start))
    rate = 2 * (world.world_size - 1) / world.world_size * _REDUCE_MIB / 1024 / seconds
    nccl = f", NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}" if world.device.type == "cuda" else ", gloo"
    told = f"{world.world_size} ranks, {_REDUCE_MIB} MiB in {1000 * seconds:.1f} ms, {rate:.1f} GiB/s each way{nccl}"
    if not correct:
        return Finding("error", "all-reduce", f"wrong sum; {told}", "a broken link or GPU: find it with fewer nodes")
    if world.device.type == "cuda" and world.world_size > 8 and rate < 2:
        cure = "on the management network? NCCL_SOCKET_IFNAME or NCCL_IB_HCA in slurm/env.sh; NCCL_DEBUG=INFO tells"
        return Finding("warning", "all-reduce", told, cure)
    return Finding("ok", "all-reduce", told)


def check_loader(cfg: TrainConfig, world: World, plan: Plan, needed_img_per_sec: float | None) -> Finding:
    """This rank's loader, alone, for some seconds. needed_img_per_sec: of one rank."""
    try:
        batches = batch_plan(cfg.trainer.global_batch_size, cfg.trainer.micro_batch_size, plan.world_size)
        loader = data.build_train_loader(
            cfg.data,
            cfg.augment,
            seed=cfg.seed,
            global_batch_size=batches.global_batch_size,
            micro_batch_size=batches.micro_batch_size,
            rank=world.rank,
            world_size=plan.world_size,
        )
    except (ValueError, RuntimeError) as error:
        return Finding("error", "loader", first_line(error), "", host())
    images, start = 0, time.perf_counter()
    with closing(loader):
        for number, batch in enumerate(loader.epoch(0)):
            if number == 0:  # compiling, opening files
                images, start = 0, time.perf_counter()
                continue
            images += len(batch.images)
            if time.perf_counter() - start > _LOADER_SECONDS:
                break
        rate = images / max(time.perf_counter() - start, 1e-9)
    if needed_img_per_sec is None:
        return Finding("ok", "loader", f"{rate:.0f} img/s a rank; how many are needed here is not known")
    told = f"{rate:.0f} img/s a rank, {needed_img_per_sec:.0f} needed"
    if rate >= 1.2 * needed_img_per_sec:
        return Finding("ok", "loader", told)
    cure = "more cores (--cpus-per-task), a data set with smaller images, or a faster disk; docs/data.md"
    return Finding("warning", "loader", f"{told}: training will wait for images", cure, host())
