"""What rank 0 says of a failure that began on another rank."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mambavision.distributed import World
from mambavision.engine.failure import first_cause, leave_note

RANK0 = World(rank=0, world_size=2, local_rank=0, local_world_size=2, device=torch.device("cpu"))
RANK1 = replace(RANK0, rank=1, local_rank=1)


@pytest.mark.parametrize("refused", [True, False])
def test_where_another_rank_refuses_the_job_is_not_started_again(
    tmp_path: Path, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mambavision.engine.failure._WAIT_SECONDS", 0.0)
    since = time.time()
    leave_note(tmp_path, RANK1, ValueError("4 images of this epoch could not be read"), 7, refused=refused)
    consequence = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")

    cause, said = first_cause(tmp_path, RANK0, consequence, since, refused=False, silent_seconds=30.0)

    assert "rank 1" in cause and "at step 7" in cause and "4 images" in cause
    assert said is refused
