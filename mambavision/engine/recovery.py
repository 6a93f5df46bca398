"""What the ranks do together when steps are refused or the model collapses: tell, roll back, or give up.

The trainer asks at step boundaries; whether something is wrong is the guard's to say.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from data.order import EpochPlan
from mambavision import distributed
from mambavision.engine import checkpoint
from mambavision.engine.checkpointer import is_good
from mambavision.engine.guard import Refused, TrainingFailed
from mambavision.engine.stop import Decision
from mambavision.run_dir import write_atomically

if TYPE_CHECKING:
    from mambavision.engine.trainer import Trainer


def meet(trainer: Trainer) -> Decision:
    """The ranks report refused steps, undo too many of them, and agree on what to do next. Collective."""
    refused = trainer.guard.read()
    trainer.meetings.held(trainer.progress.step)
    if refused.steps:
        report(trainer, refused)
    wish = Decision.ROLL_BACK if trainer.guard.wants_rollback(refused) else Decision.CONTINUE
    decision = trainer.stop.agreed(wish)
    if decision is Decision.ROLL_BACK:
        first = refused.steps[-1] - refused.in_a_row + 1
        cause = f"{refused.in_a_row} steps in a row, from step {first} on, had a loss or gradient that is not finite"
        roll_back(trainer, cause, before=first)
        decision = trainer.stop.agreed()
    return decision


def report(trainer: Trainer, refused: Refused) -> None:
    """Name the refused steps, the ranks whose loss was not finite in them, and the samples they held. Collective."""
    by_rank = distributed.gather_objects(refused.mine)
    trainer.telemetry.log(
        "refused",
        step=trainer.progress.step,
        steps=refused.steps,
        ranks=[rank for rank, steps in enumerate(by_rank) if steps],
        in_a_row=refused.in_a_row,
    )
    if trainer.world.is_main:
        for step in refused.steps:
            write_refused_samples(trainer, step, [rank for rank, steps in enumerate(by_rank) if step in steps])


def write_refused_samples(trainer: Trainer, step: int, ranks: list[int]) -> None:
    """nonfinite/step_<n>.json: the sample numbers of a refused step; of `ranks` alone, where those are known."""
    loader, plan = trainer.train_loader, trainer.plan
    epoch, first_step = divmod(step, trainer.steps_per_epoch)
    samples = {}
    for rank in ranks or range(plan.world_size):
        order = EpochPlan(
            loader.num_samples,
            plan.global_batch_size,
            plan.micro_batch_size,
            rank=rank,
            world_size=plan.world_size,
            repeats=trainer.cfg.data.repeated_augmentation,
        ).rank_order(trainer.cfg.seed, epoch, first_step)
        samples[rank] = order[: plan.global_batch_size // plan.world_size].tolist()
    directory = trainer.directory / "nonfinite"
    record = {"step": step, "epoch": epoch, "ranks": ranks, "samples_by_rank": samples}
    with contextlib.suppress(OSError):  # the log has the step, from which the samples follow
        directory.mkdir(exist_ok=True)
        write_atomically(directory / f"step_{step:08d}.json", json.dumps(record) + "\n")


def watch_for_collapse(trainer: Trainer, loss: float) -> None:
    """loss: mean cross-entropy of a log interval. Does what guard.collapse_policy says: stop raises TrainingFailed."""
    guard, policy = trainer.guard, trainer.cfg.guard.collapse_policy
    if not guard.collapsed(loss, trainer.progress.step):
        return
    cause = f"the model has collapsed: loss {loss:#.5g} is that of a blind guess, after {guard.lowest_loss:#.5g}"
    if policy == "stop":
        raise TrainingFailed(f"{cause}; lower optimizer.lr, or set guard.collapse_policy=rollback")
    if policy == "rollback":
        roll_back(trainer, cause, before=guard.collapse_began - trainer.cfg.trainer.log_every_steps)
    else:
        trainer.telemetry.log("warning", message=cause)


def roll_back(trainer: Trainer, cause: str, *, before: int) -> None:
    """Weights, EMA and optimizer as the newest good checkpoint up to step `before` has them; the data goes on.

    Collective. Raises TrainingFailed when there have been enough rollbacks, or there is nothing to go back to.
    """
    trainer.guard.roll_back(cause)
    path = distributed.on_main(trainer.world, lambda: good_checkpoint(trainer, before))
    if path is None:
        raise TrainingFailed(f"{cause}, and there is no good checkpoint from before to go back to")
    trainer.load_weights(checkpoint.load(path))
    trainer.telemetry.log("rollback", step=trainer.progress.step, to=path.name, cause=cause)
    trainer.save(wait=True, again=True)  # so that a kill from here on does not meet the same steps again


def good_checkpoint(trainer: Trainer, before: int) -> Path | None:
    trainer.checkpointer.finish()
    accept = lambda record: record["step"] <= before and is_good(record)  # noqa: E731
    return checkpoint.newest_valid(trainer.directory / "checkpoints", accept=accept)[0]
