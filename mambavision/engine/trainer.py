"""The training loop. `fit` runs epochs, `train_epoch` steps; `train_step` is the gradient step, whole and in order."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data import keyed_random
from data.batch import Batch
from mambavision import distributed, optim
from mambavision.batch_plan import BatchPlan
from mambavision.config import TrainConfig
from mambavision.distributed import BatchNormAverager, World
from mambavision.engine import checkpoint, compilation, faults, recovery, reporting
from mambavision.engine.checkpointer import Checkpointer
from mambavision.engine.debug_nan import name_first_not_finite
from mambavision.engine.evaluate import evaluate
from mambavision.engine.guard import Guard
from mambavision.engine.losses import TrainingLoss
from mambavision.engine.precision import autocast_context
from mambavision.engine.profile import StepProfile
from mambavision.engine.progress import TrainProgress
from mambavision.engine.stop import Decision, Meetings, StopNotice
from mambavision.engine.watchdog import Watchdog
from mambavision.optim.schedule import LearningRate
from mambavision.telemetry.meters import StepMeters
from mambavision.telemetry.sinks import Telemetry


class Trainer:
    """Everything one rank needs to train; `state_dict` is everything that must survive a kill."""

    def __init__(
        self,
        cfg: TrainConfig,
        *,
        world: World,
        plan: BatchPlan,
        precision: str,
        model: nn.Module,
        train_loader: Any,
        eval_loader: Any,
        transform: Any,
        telemetry: Telemetry,
        checkpointer: Checkpointer | None,
        stop: StopNotice,
        watchdog: Watchdog,
        directory: Path,
        origin: dict[str, Any],
        profile: StepProfile | None = None,
    ):
        """model: on world.device; checkpointer: on rank 0 only; directory: the run's; origin: kept with the state."""
        self.cfg, self.world, self.plan, self.precision = cfg, world, plan, precision
        self.train_loader, self.eval_loader, self.transform = train_loader, eval_loader, transform
        self.telemetry, self.checkpointer, self.stop, self.watchdog = telemetry, checkpointer, stop, watchdog
        self.directory, self.origin, self.profile = directory, origin, profile
        self.steps_per_epoch = train_loader.steps_per_epoch
        self.raw_model, self.parameters = model, list(model.parameters())
        decay = cfg.trainer.ema_decay
        self.ema = optim.ModelEma(model, decay, warmup=cfg.trainer.ema_warmup) if decay else None
        self.utilization = reporting.Utilization(model, world, precision, cfg.data.image_size)
        self.batch_norm = BatchNormAverager(model)
        if cfg.debug == "nan":
            name_first_not_finite(model)
        stepped, self.begin_forward = compilation.compiled(model, compilation.compile_mode(cfg, world))
        self.model = distributed.data_parallel(stepped, world)
        o = cfg.optimizer
        groups = optim.build_param_groups(model, o.weight_decay, o.decay_rule, o.layer_decay)
        self.optimizer = optim.build_optimizer(o, groups)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=precision == "fp16")
        self.autocast = autocast_context(precision, world.device)
        self.criterion = TrainingLoss(cfg.trainer.loss, cfg.trainer.bce_threshold, cfg.trainer.mesa, plan.accum_steps)
        self.lr = LearningRate(cfg.schedule, cfg.optimizer.lr, cfg.trainer.epochs, self.steps_per_epoch)
        self.progress = TrainProgress()
        self.last_eval: dict[str, Any] = {}
        self.meters = StepMeters(world.device)
        self.guard = Guard(
            cfg.guard,
            device=world.device,
            capacity=cfg.trainer.agree_every_steps,
            num_classes=transform.num_classes,
            loss=cfg.trainer.loss,
            fp16=precision == "fp16",
        )
        self.meetings = Meetings(cfg.trainer.agree_every_steps)
        self.has_stepped = False  # this process, whatever step the run is at
        self.evaluation_seconds: float | None = None  # what the last evaluation held training up, its checkpoints too

    # ---- position, all derived from progress -------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        return self.progress.step // self.steps_per_epoch

    @property
    def epoch_done(self) -> int:
        """The epoch that the last step done belongs to: `epoch` in events and in the records of checkpoints."""
        return max(self.progress.step - 1, 0) // self.steps_per_epoch

    @property
    def at_epoch_end(self) -> bool:
        return self.progress.step > 0 and self.progress.step % self.steps_per_epoch == 0

    @property
    def last_step(self) -> int:
        return min(self.lr.total_steps, self.cfg.trainer.max_steps or self.lr.total_steps)

    @property
    def mesa_is_on(self) -> bool:
        mesa = self.cfg.trainer.mesa
        return mesa.weight > 0 and self.epoch / self.cfg.trainer.epochs > mesa.start_fraction

    # ---- the loop ----------------------------------------------------------------------------------------------------

    def fit(self) -> str:
        """Train to the last step, or until all ranks have agreed to stop. Returns finished or preempted."""
        ended = self.at_epoch_end or self.progress.step >= self.last_step
        if ended and self.last_eval.get("step") != self.progress.step:
            self.finish_epoch()  # a run that was stopped before its evaluation makes up for it
        while self.progress.step < self.last_step:
            if self.stop.agreed() is Decision.STOP or self.train_epoch() is Decision.STOP:
                self.save(wait=True)
                return "preempted"
            self.finish_epoch()
        self.save(wait=True)
        return "finished"

    def train_epoch(self) -> Decision:
        """Steps from wherever the run stands to the end of the epoch; STOP if the ranks agreed to stop before it."""
        batches = self.train_loader.epoch(self.epoch, first_step=self.progress.step % self.steps_per_epoch)
        end = min((self.epoch + 1) * self.steps_per_epoch, self.last_step)
        self.raw_model.train()
        self.meters.reset()
        with contextlib.closing(batches) if hasattr(batches, "close") else contextlib.nullcontext():
            while self.progress.step < end:
                self.train_step(batches)
                if not self.has_stepped:
                    self.after_first_step()
                if self.profile is not None:
                    self.profile.step_done(self.progress.step)
                step, at_end = self.progress.step, self.progress.step == end
                if step % self.cfg.trainer.log_every_steps == 0 or at_end:
                    recovery.watch_for_collapse(self, reporting.log_training(self))
                is_meeting = self.meetings.due(step) or self.guard.full or at_end
                if is_meeting and recovery.meet(self) is Decision.STOP and step < self.last_step:
                    return Decision.STOP
                if self.checkpointer is not None and not at_end and self.checkpointer.due(step):
                    self.save()
        return Decision.CONTINUE

    def train_step(self, batches: Iterator[Batch]) -> None:
        """One optimizer step over this rank's micro-batches of the global batch."""
        self.watchdog.beat(self.progress.step, "step")
        self.meters.begin_step()
        self.batch_norm.begin_step()
        faults.at("step", self.progress.step)
        lr = self.lr(self.progress.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        for index, batch in enumerate(self.micro_batches(batches)):
            images, targets = self.transform(batch, self.epoch, self.progress.step, self.global_micro_index(index))
            self.seed_stochastic_depth(index)
            self.batch_norm.begin_micro_batch(index)
            self.begin_forward()
            with self.sync_gradients_on_last(index):
                with self.autocast():
                    logits = faults.spoil(self.model(images), self.progress.step)
                    ema = self.ema.module if self.mesa_is_on else None
                    loss, mesa = self.criterion(logits, targets, images, ema)
                self.meters.add_loss(loss, mesa)
                self.scaler.scale(loss).backward()
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        # Equal on every rank, as the gradients are. Where it is not finite, optimizer, EMA and BatchNorm refuse the
        # step by themselves, on the device, so nothing here waits for it.
        grad_norm = optim.global_grad_norm(self.parameters)
        self.guard.observe(self.progress.step, self.meters.step_loss, grad_norm)
        self.batch_norm.finish_step(self.plan.accum_steps, grad_norm)
        self.optimizer.step(grad_norm=grad_norm, clip=self.cfg.optimizer.clip_grad)
        if self.ema is not None:
            self.ema.update(self.raw_model, self.progress.step, grad_norm=grad_norm)
        if self.scaler.is_enabled():
            self.scaler.update()
        optim.clear_gradients(self.parameters, keep_memory=self.plan.accum_steps > 1)
        self.meters.add_step(grad_norm, self.plan.global_batch_size)
        self.progress.advance(self.plan.global_batch_size)

    def micro_batches(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for _ in range(self.plan.accum_steps):
            start = time.perf_counter()
            self.watchdog.beat(self.progress.step, "data")
            faults.at("data", self.progress.step)
            batch = next(batches)
            self.watchdog.beat(self.progress.step, "step")
            self.meters.data_seconds += time.perf_counter() - start
            yield batch.to(self.world.device)

    def global_micro_index(self, index: int) -> int:
        """The number of this rank's micro-batch among all of the step's: the same images bear it at any world size."""
        return self.world.rank * self.plan.accum_steps + index

    def seed_stochastic_depth(self, index: int) -> None:
        """Dropped paths are a function of (seed, step, micro-batch), so a resumed run drops the same ones."""
        key = keyed_random.step_key(self.cfg.seed, self.progress.step, self.global_micro_index(index))
        torch.manual_seed(keyed_random.fold(key, keyed_random.DROP_PATH) >> 1)

    def sync_gradients_on_last(self, index: int) -> contextlib.AbstractContextManager:
        last = index == self.plan.accum_steps - 1
        return contextlib.nullcontext() if last or not distributed.is_distributed() else self.model.no_sync()

    def finish_epoch(self) -> None:
        """Evaluate where it is due, then keep the state together with the score.

        It is kept before as well: an evaluation may outlast the time that launchers give after their notice.
        """
        start = time.monotonic()
        last = self.progress.step >= self.last_step
        due = last or (self.at_epoch_end and self.epoch % self.cfg.trainer.eval_every_epochs == 0)
        if due:
            self.save()
            self.evaluate()
        self.save(again=due)
        if due:
            self.evaluation_seconds = time.monotonic() - start

    def evaluate(self) -> None:
        self.watchdog.beat(self.progress.step, "evaluate")
        faults.at("evaluate", self.progress.step)
        models = {"": self.raw_model} | ({"ema_": self.ema.module} if self.ema is not None else {})
        batches = self.watchdog.while_iterating(self.eval_loader, self.progress.step, "evaluate")
        result = evaluate(models, batches, prepare=self.transform.normalise, autocast=self.autocast, world=self.world)
        self.last_eval = {"step": self.progress.step, **{f"eval/{k}": v for k, v in result.items()}}
        self.telemetry.log("eval", epoch=self.epoch_done, samples_seen=self.progress.samples_seen, **self.last_eval)

    def after_first_step(self) -> None:
        """What takes long (data, compilation) is over, so from now on a silent rank is a broken one."""
        self.has_stepped = True
        self.watchdog.arm()
        distributed.set_timeout(self.cfg.watchdog.step_timeout_seconds)
        if self.checkpointer is not None:
            self.checkpointer.prepare(self.state_dict())

    # ---- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.raw_model.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": self.progress.state_dict(),
            "guard": self.guard.state_dict(),
            "plan": {"global_batch_size": self.plan.global_batch_size, "steps_per_epoch": self.steps_per_epoch},
            "eval": self.last_eval,
            **self.origin,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError where the state is that of another model or optimizer, naming what differs."""
        self.load_weights(state)
        self.guard.load_state_dict(state["guard"])
        self.progress.load_state_dict(state["progress"])
        self.progress.move(state["plan"], steps_per_epoch=self.steps_per_epoch, batch=self.plan.global_batch_size)
        self.last_eval = dict(state["eval"])

    def load_weights(self, state: dict[str, Any]) -> None:
        checkpoint.check_same_tensors(self.raw_model.state_dict(), state["model"])
        self.raw_model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"] if state["ema"] is not None else state["model"])
        optim.load_optimizer_state(self.optimizer, state["optimizer"])
        if state["scaler"]:  # empty unless the precision was fp16
            self.scaler.load_state_dict(state["scaler"])

    def save(self, *, wait: bool = False, again: bool = False) -> None:
        """Rank 0 writes; with `wait` every rank returns only when the checkpoint is on disk. again: even if it is."""
        self.watchdog.beat(self.progress.step, "checkpoint")
        if self.checkpointer is not None:
            current = self.last_eval if self.last_eval.get("step") == self.progress.step else {}
            record = {
                "samples_seen": self.progress.samples_seen,
                "epoch": self.epoch_done,
                "epoch_finished": self.epoch if self.at_epoch_end else None,
                "score": current.get("eval/ema_top1", current.get("eval/top1")),
                "metrics": current,
            }
            self.checkpointer.save(self.state_dict(), step=self.progress.step, record=record, wait=wait, again=again)
        if wait:
            distributed.barrier()
