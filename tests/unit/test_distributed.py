"""How commands leave the process group."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from mambavision.distributed import World, check_same_devices, close_world, init_world, join_group
from mambavision.world_end import world_left_at_end

TASKS = Path("/proc/self/task")
needs_list_of_threads = pytest.mark.skipif(not TASKS.exists(), reason=f"{sys.platform} has no {TASKS}")


def threads() -> set[str]:
    return {task.name for task in TASKS.iterdir()} if TASKS.exists() else set()


def comes_true(condition: Callable[[], bool]) -> bool:
    """Threads are listed for a moment after they were joined."""
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """The threads that came with the group."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    before = threads()
    join_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield threads() - before
    finally:
        close_world()  # where it is closed already, nothing


def train_one_step() -> None:
    model = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
    model(torch.ones(1, 2)).sum().backward()
    cycle: list[object] = [model]
    cycle.append(cycle)  # as a trainer and its parts may be; with it the model holds the group


@needs_list_of_threads
def test_no_thread_outlives_a_closed_group(group: set[str]) -> None:
    train_one_step()
    close_world()
    assert group and comes_true(lambda: not group & threads()) and not dist.is_initialized()


@needs_list_of_threads
@pytest.mark.parametrize("exit_code", [None, 75])
def test_a_command_that_ends_well_leaves_the_group(group: set[str], exit_code: int | None) -> None:
    def command() -> None:
        with world_left_at_end(agreed_exit_codes=(75,)):
            train_one_step()
            if exit_code is not None:
                raise SystemExit(exit_code)

    if exit_code is None:
        command()
    else:
        with pytest.raises(SystemExit, match="75"):
            command()
    assert group and comes_true(lambda: not group & threads()) and not dist.is_initialized()


@pytest.mark.slow
@pytest.mark.parametrize("failure", [SystemExit(1), RuntimeError("a rank is gone")])
def test_a_command_that_fails_does_not_wait_for_the_groups_threads(group: set[str], failure: BaseException) -> None:
    with pytest.raises(type(failure)), world_left_at_end():
        raise failure
    assert dist.is_initialized()


@pytest.mark.parametrize("local_rank", [0, 1])
def test_more_ranks_than_gpus_is_answered_on_every_rank(local_rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first rank of a node is heard, and it has a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": 2, "RANK": local_rank, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ValueError, match="2 processes on this node, but only 1 CUDA devices; type --nproc_per_node=1"):
        init_world("auto")


def test_a_node_that_has_lost_its_gpus_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(0, 4, 0, 2, torch.device("cuda", 0))
    seen = [("cuda", "n1"), ("cuda", "n2"), ("cuda", "n2"), ("cuda", "n1")]
    monkeypatch.setattr("mambavision.distributed.gather_objects", lambda mine: seen)
    check_same_devices(world)
    seen += [("cpu", "n7"), ("cpu", "n7")]
    with pytest.raises(
        ValueError, match="ranks on n7 have no CUDA device, other ranks of the job have one: .*--exclude"
    ):
        check_same_devices(world)


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set, but not RANK, MASTER_ADDR, MASTER_PORT: type torchrun"),
        (
            {"RANK": "0", "WORLD_SIZE": "2"},
            "RANK=0 WORLD_SIZE=2 is set, but not MASTER_ADDR, MASTER_PORT: type torchrun",
        ),
    ],
)
def test_half_of_a_launchers_variables_are_refused(
    given: dict[str, str], missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With WORLD_SIZE=2 alone one process trained on every other micro-batch, scored half of the images, and finished."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=missing):
        init_world("cpu")


def test_a_world_of_one_needs_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert init_world("cpu") == World(0, 1, 0, 1, torch.device("cpu"))
