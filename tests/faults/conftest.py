from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import FAST, Prefork, Trainer, Training, state_hash


@pytest.fixture(scope="session")
def prefork() -> Iterator[Prefork]:
    server = Prefork(*FAST)
    yield server
    server.close()


@pytest.fixture
def train(prefork: Prefork, tmp_path: Path) -> Iterator[Trainer]:
    trainer = Trainer(prefork, tmp_path)
    yield trainer
    trainer.close()


@pytest.fixture(scope="session")
def uninterrupted(prefork: Prefork, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """The run that every other one is compared with: two ranks, never disturbed."""
    training = Trainer(prefork, tmp_path_factory.mktemp("uninterrupted")).run("run")
    assert training.code == 0, training.output
    return training


@pytest.fixture(scope="session")
def reference(uninterrupted: Training) -> str:
    """Every bit of what the undisturbed run arrives at."""
    return state_hash(uninterrupted.directory)
