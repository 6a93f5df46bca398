from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from data import keyed_random
from tests.faults.harness import FAST, ROOT, Prefork, Trainer, Training, state_hash


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


@pytest.fixture(scope="session")
def fashion_mnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fashion-MNIST as .beton files: those that scripts/prepare_data.py has written before, else written now."""
    known = Path(os.environ.get("MAMBAVISION_DEMO_DATA", "~/.cache/mambavision/fashion_mnist")).expanduser()
    if (known / "train.beton").exists() and (known / "val.beton").exists():
        return known
    directory = tmp_path_factory.mktemp("fashion_mnist")
    command = [sys.executable, "scripts/prepare_data.py", "fashion_mnist", "--out", str(directory)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"Fashion-MNIST cannot be had here: {(done.stdout + done.stderr).strip()[-300:]}")
    return directory


@pytest.fixture(scope="session")
def prefork_ffcv() -> Iterator[Prefork]:
    """ffcv takes seconds to import, so only tests that read .beton files pay for it."""
    pytest.importorskip("ffcv")
    server = Prefork(
        *FAST, "numba", "cv2", "numba.core.typed_passes"
    )  # ffcv's own library starts a thread: not forkable
    yield server
    server.close()


@pytest.fixture
def train_ffcv(prefork_ffcv: Prefork, tmp_path: Path) -> Iterator[Trainer]:
    trainer = Trainer(prefork_ffcv, tmp_path)
    yield trainer
    trainer.close()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Class folders of JPEG files: 132 to train on, 18 to evaluate."""
    for split, count in (("train", 66), ("val", 9)):
        for label in range(2):
            directory = tmp_path / "images" / split / f"class{label}"
            directory.mkdir(parents=True)
            for index in range(count):
                key = keyed_random.fold(label * 1000 + index, 1)
                pixels = bytes((key >> (i % 56)) & 0xFF for i in range(24 * 24 * 3))
                Image.frombytes("RGB", (24, 24), pixels).save(directory / f"{index:03d}.jpg", quality=90)
    return tmp_path / "images"
