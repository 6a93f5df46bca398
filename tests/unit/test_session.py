"""What a start makes of its settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mambavision.compose import compose_train_config
from mambavision.distributed import World
from mambavision.engine import checkpoint
from mambavision.engine.build import build_model, initial_weights

WORLD = World(rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu"))
TINY = ["model=mambavision_nano", "data=synthetic"]


def test_gradient_checkpointing_reaches_every_stage_and_is_off_otherwise() -> None:
    for setting in (False, True):
        cfg = compose_train_config([*TINY, f"trainer.grad_checkpointing={str(setting).lower()}"])
        levels = build_model(cfg, 10, None, WORLD).levels
        assert [level.grad_checkpointing for level in levels] == [setting] * 4


def test_the_file_that_a_run_begins_from_is_the_one_its_start_names(tmp_path: Path) -> None:
    """model.checkpoint may be a directory whose best changes while others still look for it."""
    state = build_model(compose_train_config(TINY), 10, None, WORLD).state_dict()
    (tmp_path / "checkpoints").mkdir()
    torch.save({"model": state}, tmp_path / "checkpoints" / "step_00000003.pt")
    cfg = compose_train_config([*TINY, f"model.checkpoint={tmp_path}", "seed=1"])

    file = initial_weights(cfg)
    begun = build_model(cfg, 10, file, WORLD)

    assert file == str(tmp_path / "checkpoints" / "step_00000003.pt")
    assert all(torch.equal(value, state[name]) for name, value in begun.state_dict().items())


def test_weights_with_a_flipped_bit_are_not_begun_from(tmp_path: Path) -> None:
    path = tmp_path / "step_00000003.pt"
    checkpoint.write(path, {"model": {"weight": torch.ones(8)}}, {"step": 3})
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)

    with pytest.raises(ValueError, match=r"step_00000003.pt is damaged: its checksum does not match"):
        initial_weights(compose_train_config([*TINY, f"model.checkpoint={path}"]))
