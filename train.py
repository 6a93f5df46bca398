#!/usr/bin/env python
"""Train a MambaVision classifier, or continue one: the same command does both.

    python train.py model=mambavision_nano data=ffcv data.path=DIR
    torchrun --nproc_per_node=8 train.py model=mambavision_b data=ffcv data.path=DIR
    torchrun --nproc_per_node=8 train.py -m optimizer.lr=1e-3,5e-3          # a sweep, point after point

Settings are written group=choice or key=value; conf/ holds the groups, mambavision/config.py describes every key.
"""

from __future__ import annotations

import os
import sys

import hydra
from omegaconf import DictConfig

from mambavision.compose import CONF_DIR, check_overrides, typed_train_config
from mambavision.config import TrainConfig
from mambavision.config_checks import ConfigError

EXIT_CODES = {"finished": 0, "preempted": 75}  # 75: EX_TEMPFAIL, come back later


@hydra.main(config_path=str(CONF_DIR), config_name="train", version_base="1.3")
def job(composed: DictConfig) -> float | None:
    """One point: Hydra's sweepers optimise the returned Top-1."""
    from mambavision.engine.session import run

    status = run(typed_train_config(composed))
    if status["status"] == "preempted":
        raise SystemExit(EXIT_CODES["preempted"])
    return status.get("eval/ema_top1", status.get("eval/top1"))


def main() -> None:
    try:
        overrides = [a for a in sys.argv[1:] if not a.startswith("-")]
        checked = iter(check_overrides(overrides, TrainConfig))
        sys.argv[1:] = [a if a.startswith("-") else next(checked) for a in sys.argv[1:]]
        job()
    except ValueError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
