from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from virtual_cluster import VirtualCluster, why_unavailable


@pytest.fixture(scope="session")
def cluster() -> Iterator[VirtualCluster]:
    """One SLURM for the whole test run: a controller and four nodes of 8 GPUs, taken down at the end."""
    reason = why_unavailable()
    if reason is not None:
        pytest.skip(reason)
    directory = Path(tempfile.mkdtemp(prefix="slurm-"))  # a short path: a socket's may have 107 bytes
    try:
        with VirtualCluster(directory / "cluster") as running:
            yield running
    finally:
        shutil.rmtree(directory, ignore_errors=True)
