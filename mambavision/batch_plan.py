"""How the global batch is spread over ranks and accumulated micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

from mambavision.config_checks import ConfigError


@dataclass(frozen=True)
class BatchPlan:
    """Each rank takes `accum_steps` micro-batches of every step; the same images share one at any world size."""

    global_batch_size: int
    micro_batch_size: int
    world_size: int

    @property
    def accum_steps(self) -> int:
        return self.global_batch_size // (self.micro_batch_size * self.world_size)

    def __str__(self) -> str:
        return (
            f"global batch {self.global_batch_size} = {self.micro_batch_size} images x {self.world_size} ranks "
            f"x {self.accum_steps} accumulated micro-batches"
        )


def batch_plan(global_batch_size: int, micro_batch_size: int, world_size: int) -> BatchPlan:
    """The plan for so many ranks.

    Raises:
        ConfigError: the global batch cannot be cut into micro-batches for them; names the nearest that can.
    """
    unit = micro_batch_size * world_size
    if global_batch_size % unit == 0:
        return BatchPlan(global_batch_size, micro_batch_size, world_size)
    below, above = global_batch_size // unit * unit, (global_batch_size // unit + 1) * unit
    nearest = above if below == 0 or above - global_batch_size < global_batch_size - below else below
    fitting = [m for m in range(1, global_batch_size + 1) if global_batch_size % (m * world_size) == 0]
    same_global = ""
    if fitting:
        micro = min(fitting, key=lambda m: abs(m - micro_batch_size))
        advice = "BatchNorm then sees other groups, which changes results"
        same_global = f", or keep it with trainer.micro_batch_size={micro} ({advice})"
    raise ConfigError(
        f"trainer.global_batch_size={global_batch_size} cannot be cut into micro-batches of "
        f"trainer.micro_batch_size={micro_batch_size} on {world_size} rank{'s' * (world_size > 1)}; nearest: "
        f"trainer.global_batch_size={nearest}{same_global}"
    )
