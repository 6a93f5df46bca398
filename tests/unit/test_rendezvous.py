"""Ranks that torchrun started together find each other, whatever earlier starts have left in the store."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from mambavision.rendezvous import fresh_store


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> dist.TCPStore:
    """The store that torchrun's agent keeps over all starts of a job."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    return store


def start(ranks: list[int], world_size: int, seconds: float = 30) -> list[dist.Store]:
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(lambda rank: fresh_store(rank, world_size, seconds), ranks))


def test_ranks_of_a_start_share_keys(server: dist.TCPStore) -> None:
    first, *others = start([0, 1, 2], 3)
    first.set("address", "here")
    assert [store.get("address") for store in others] == [b"here", b"here"]


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_start_sees_nothing_of_an_earlier_one(server: dist.TCPStore, world_size: int) -> None:
    start([0, 1], 2)[0].set("address", "of the dead")
    stores = start(list(range(world_size)), world_size)
    assert not any(store.check(["address"]) for store in stores)


@pytest.mark.slow
def test_a_rank_that_comes_first_waits_for_the_living_rank_0(server: dist.TCPStore) -> None:
    start([0, 1], 2)
    with ThreadPoolExecutor(1) as pool:
        early = pool.submit(fresh_store, 1, 2, 30)  # finds the token of the first start
        with pytest.raises(TimeoutError):
            early.result(timeout=1)
        fresh_store(0, 2, 30).set("address", "of the living")
        assert early.result(timeout=30).get("address") == b"of the living"


def test_a_missing_rank_is_named(server: dist.TCPStore) -> None:
    with pytest.raises(TimeoutError, match=r"rank 0 still waits for ranks \[1, 2\] of 3.*start_timeout_seconds=1800"):
        fresh_store(0, 3, 1)


@pytest.mark.parametrize("earlier_starts", [0, 1])
def test_a_missing_rank_0_is_named(server: dist.TCPStore, earlier_starts: int) -> None:
    for _ in range(earlier_starts):
        start([0, 1], 2)
    with pytest.raises(TimeoutError, match="rank 1 was not welcomed by rank 0"):
        fresh_store(1, 2, 1)
