"""A store of their own for ranks that torchrun started together.

torchrun (as of torch 2.14) hands the same TCPStore to every start of a job, and a process group always writes its
addresses under the same keys. After a restart, a rank may thus read the address of a dead peer, or a used NCCL id,
before the living one has written its own: it fails with "connection refused" or hangs. Counting restarts does not tell
the starts apart, since each agent counts its own. So rank 0 draws a token for this start and hands it to the others.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

import torch.distributed as dist

POLL_SECONDS = 0.05


def fresh_store(rank: int, world_size: int, timeout_seconds: float) -> dist.Store:
    """The store torchrun's variables (MASTER_ADDR, MASTER_PORT) name, under a prefix no earlier start has used.

    Raises:
        TimeoutError: not all ranks came within `timeout_seconds`.
    """
    timeout = timedelta(seconds=timeout_seconds)
    store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=timeout))
    deadline = time.monotonic() + timeout_seconds
    token = _welcome_all(store, world_size, deadline) if rank == 0 else _join(store, rank, deadline)
    return dist.PrefixStore(token, store)


def _welcome_all(store: dist.Store, world_size: int, deadline: float) -> str:
    token = uuid.uuid4().hex
    store.set("token", token)
    missing = set(range(1, world_size))
    while missing:
        for rank in [r for r in missing if store.check([f"{token}/joined/{r}"])]:
            name = store.get(f"{token}/joined/{rank}").decode()
            store.set(f"{token}/welcome/{name}", "")
            missing.remove(rank)
        if missing:
            _wait(deadline, f"rank 0 still waits for ranks {sorted(missing)} of {world_size}")
    return token


def _join(store: dist.Store, rank: int, deadline: float) -> str:
    # All ranks of an earlier start are dead before one of this start runs (an agent stops its own before it joins the
    # next rendezvous), so nobody answers a join under an old token: only the welcome shows that a token is alive.
    name, joined = uuid.uuid4().hex, None
    while True:
        if store.check(["token"]):
            token = store.get("token").decode()
            if token != joined:
                store.set(f"{token}/joined/{rank}", name)
                joined = token
            if store.check([f"{token}/welcome/{name}"]):
                return token
        _wait(deadline, f"rank {rank} was not welcomed by rank 0")


def _wait(deadline: float, what: str) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(
            f"{what}: these processes died at start or never came. Look for the first error in the output of every "
            "node; if they only start slowly, type watchdog.start_timeout_seconds=1800"
        )
    time.sleep(POLL_SECONDS)
