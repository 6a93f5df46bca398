#!/usr/bin/env python
"""Train a MambaVision classifier, or continue one: the same command does both.

    python train.py model=mambavision_nano data=ffcv data.path=DIR
    torchrun --standalone --nproc_per_node=8 train.py model=mambavision_b data=ffcv data.path=DIR
    torchrun --standalone --nproc_per_node=8 train.py -m optimizer.lr=1e-3,5e-3          # a sweep, point after point
    python train.py --run-dir model=mambavision_nano ...                    # print the run directory, train nothing

Settings are written group=choice or key=value; conf/ holds the groups, mambavision/config.py describes every key.
"""

from __future__ import annotations

import os
import sys

# Threads that wait for each other give the core up soon: loader threads and other ranks want it. Read by libgomp once.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from mambavision.cluster import points
from mambavision.compose import CONF_DIR, check_command_line, refuse, typed_train_config
from mambavision.config import TrainConfig
from mambavision.config_checks import ConfigError
from mambavision.run_dir import run_directory
from mambavision.world_end import world_left_at_end

EXIT_CODES = {"finished": 0, "preempted": 75}  # 75: EX_TEMPFAIL, come back later


@hydra.main(config_path=str(CONF_DIR), config_name="train", version_base="1.3")
def job(composed: DictConfig) -> float | None:
    """One point: Hydra's sweepers optimise the returned Top-1."""
    from mambavision.engine.session import run

    try:
        status = run(placed(typed_train_config(composed)))
    except ValueError as error:
        refuse(error)
    if status["status"] == "preempted":
        raise SystemExit(EXIT_CODES["preempted"])
    return status.get("eval/ema_top1", status.get("eval/top1"))


def placed(cfg: TrainConfig) -> TrainConfig:
    """In a sweep each point has its own directory, also below an explicit run_name."""
    hydra_cfg = HydraConfig.get()
    if hydra_cfg.mode != RunMode.MULTIRUN:
        return cfg
    sweeper_keys = list(hydra_cfg.sweeper.get("params") or {})
    point = points.place_in_multirun(cfg, sys.argv[1:], hydra_cfg.overrides.task, sweeper_keys)
    if cfg.logger.console != "off" and os.environ.get("RANK", "0") == "0":
        print(f"point     {hydra_cfg.job.num + 1}: {', '.join(point.logger.tags[len(cfg.logger.tags) :])}", flush=True)
    return point


def print_run_directories(arguments: list[str]) -> None:
    """One line for each run that this command line describes."""
    is_sweep, overrides = points.split_multirun(arguments)
    for point in points.expand(overrides) if is_sweep else [points.single(overrides)]:
        print(run_directory(point.cfg))


def main() -> None:
    try:
        if "--run-dir" in sys.argv:
            return print_run_directories([a for a in sys.argv[1:] if a != "--run-dir"])
        sys.argv[1:] = check_command_line(sys.argv[1:], TrainConfig)
        if not points.split_multirun(sys.argv[1:])[0]:
            points.refuse_sweep_file(sys.argv[1:])
    except ConfigError as error:
        refuse(error)
    with world_left_at_end(agreed_exit_codes=(EXIT_CODES["preempted"],)):
        job()


if __name__ == "__main__":
    main()
