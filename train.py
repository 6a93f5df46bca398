#!/usr/bin/env python
"""Train a MambaVision classifier, or continue one: the same command does both.

    python train.py model=mambavision_nano data=ffcv data.path=DIR
    torchrun --nproc_per_node=8 train.py model=mambavision_b data=ffcv data.path=DIR
    torchrun --nproc_per_node=8 train.py -m optimizer.lr=1e-3,5e-3          # a sweep, point after point

Settings are written group=choice or key=value; conf/ holds the groups, mambavision/config.py describes every key.
"""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from mambavision.compose import CONF_DIR, check_command_line, refuse, typed_train_config
from mambavision.config import TrainConfig
from mambavision.config_checks import ConfigError

EXIT_CODES = {"finished": 0, "preempted": 75}  # 75: EX_TEMPFAIL, come back later


@hydra.main(config_path=str(CONF_DIR), config_name="train", version_base="1.3")
def job(composed: DictConfig) -> float | None:
    """One point: Hydra's sweepers optimise the returned Top-1."""
    from mambavision.engine.session import run

    try:
        status = run(typed_train_config(composed))
    except ValueError as error:
        refuse(error)
    if status["status"] == "preempted":
        raise SystemExit(EXIT_CODES["preempted"])
    return status.get("eval/ema_top1", status.get("eval/top1"))


def main() -> None:
    try:
        sys.argv[1:] = check_command_line(sys.argv[1:], TrainConfig)
    except ConfigError as error:
        refuse(error)
    job()


if __name__ == "__main__":
    main()
