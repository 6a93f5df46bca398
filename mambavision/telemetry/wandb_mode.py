"""Whether and how a run is logged to W&B. Imports nothing heavy: the pre-flight asks before torch is there."""

from __future__ import annotations

import os

from mambavision.config import LoggerConfig


def wandb_mode(cfg: LoggerConfig) -> str:
    """auto, online, offline or off: what the configuration says, and where that is auto, what W&B's variables say."""
    if cfg.wandb != "auto":
        return cfg.wandb
    if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on"):
        return "off"
    wanted = os.environ.get("WANDB_MODE", "").lower()
    return {"disabled": "off", "dryrun": "offline", "offline": "offline", "online": "online"}.get(wanted, "auto")
