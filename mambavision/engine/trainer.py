"""The training loop. `fit` runs epochs, `train_epoch` runs steps, `train_step` is the gradient step, whole and in order."""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data import keyed_random
from data.batch import Batch
from mambavision import distributed
from mambavision.config import TrainConfig
from mambavision.config_checks import BatchPlan
from mambavision.distributed import BatchNormAverager, World
from mambavision.engine.checkpoint import Checkpointer
from mambavision.engine.evaluate import evaluate
from mambavision.engine.losses import mesa_loss, soft_target_cross_entropy
from mambavision.engine.precision import autocast_context
from mambavision.engine.progress import TrainProgress
from mambavision.engine.stop import StopNotice
from mambavision.optim import ModelEma, build_optimizer, build_param_groups, global_grad_norm
from mambavision.optim.schedule import LearningRate
from mambavision.run_dir import plain
from mambavision.telemetry.meters import StepMeters, peak_memory_gib
from mambavision.telemetry.sinks import Telemetry

DROP_PATH = 19  # the purpose of a step key's draws that decides stochastic depth; data/keyed_random.py lists the others

# torch 2.13 renamed the argument.
_SYNC = "forward_sync_buffers"
NO_BUFFER_SYNC = {_SYNC if _SYNC in inspect.signature(DistributedDataParallel).parameters else "broadcast_buffers": False}


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
    ):
        """model: on world.device; checkpointer: on rank 0 only."""
        self.cfg, self.world, self.plan, self.precision = cfg, world, plan, precision
        self.train_loader, self.eval_loader, self.transform = train_loader, eval_loader, transform
        self.telemetry, self.checkpointer, self.stop = telemetry, checkpointer, stop

        self.raw_model = model
        self.ema = ModelEma(model, cfg.trainer.ema_decay, warmup=cfg.trainer.ema_warmup) if cfg.trainer.ema_decay else None
        self.batch_norm = BatchNormAverager(model)
        if cfg.trainer.compile:
            model.compile()
        self.model = self._data_parallel(model)
        groups = build_param_groups(model, cfg.optimizer.weight_decay, cfg.optimizer.decay_rule)
        self.optimizer = build_optimizer(cfg.optimizer, groups)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=precision == "fp16")
        self.autocast = autocast_context(precision, world.device)
        self.lr = LearningRate(cfg.schedule, cfg.optimizer.lr, cfg.trainer.epochs, train_loader.steps_per_epoch)
        self.progress = TrainProgress()
        self.last_eval: dict[str, Any] = {}
        self.config = plain(asdict(cfg)) | {"num_classes": train_loader.num_classes}
        self.meters = StepMeters(world.device)

    def _data_parallel(self, model: nn.Module) -> nn.Module:
        if not distributed.is_distributed():
            return model
        device_ids = [self.world.device.index] if self.world.device.type == "cuda" else None
        # Buffers: BatchNormAverager keeps them equal. Bucket views: gradients are reduced where they lie, without a copy.
        return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True, **NO_BUFFER_SYNC)

    # ---- position, all derived from progress -------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        return self.progress.step // self.train_loader.steps_per_epoch

    @property
    def at_epoch_end(self) -> bool:
        return self.progress.step > 0 and self.progress.step % self.train_loader.steps_per_epoch == 0

    @property
    def last_step(self) -> int:
        return min(self.lr.total_steps, self.cfg.trainer.max_steps or self.lr.total_steps)

    @property
    def mesa_is_on(self) -> bool:
        mesa = self.cfg.trainer.mesa
        return mesa.weight > 0 and self.epoch / self.cfg.trainer.epochs > mesa.start_fraction

    # ---- the loop ----------------------------------------------------------------------------------------------------

    def fit(self) -> str:
        """Train to the last step, or to the step at which all ranks have agreed to stop. Returns finished or preempted."""
        if self.at_epoch_end and self.last_eval.get("step") != self.progress.step:
            self.finish_epoch()  # a run killed in its evaluation makes up for it
        while self.progress.step < self.last_step:
            if self.train_epoch() == "stop":
                self.save(wait=True)
                return "preempted"
            if self.at_epoch_end or self.progress.step == self.last_step:
                self.finish_epoch()
        self.save(wait=True)
        return "finished"

    def train_epoch(self) -> str:
        """Steps from wherever the run stands to the end of the epoch; "stop" if the ranks agreed to stop before."""
        steps = self.train_loader.steps_per_epoch
        batches = self.train_loader.epoch(self.epoch, first_step=self.progress.step % steps)
        end = min((self.epoch + 1) * steps, self.last_step)
        self.raw_model.train()
        self.meters.reset()
        with contextlib.closing(batches) if hasattr(batches, "close") else contextlib.nullcontext():
            while self.progress.step < end:
                self.train_step(batches)
                if self.progress.step % self.cfg.trainer.log_every_steps == 0 or self.progress.step == end:
                    self.log_training()
                if self.progress.step == end:
                    break  # evaluation comes first, then the checkpoint and the stop
                if self.progress.step % self.cfg.trainer.agree_every_steps == 0 and self.stop.agreed():
                    return "stop"
                if self.checkpointer is not None and self.checkpointer.due(self.progress.step):
                    self.save()
        return "end"

    def train_step(self, batches: Iterator[Batch]) -> None:
        """One optimizer step over this rank's micro-batches of the global batch."""
        lr = self.lr(self.progress.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        for index, batch in enumerate(self.micro_batches(batches)):
            images, targets = self.transform(batch, self.epoch, self.progress.step, self.global_micro_index(index))
            self.seed_stochastic_depth(index)
            self.batch_norm.begin_micro_batch(index, self.plan.accum_steps)
            with self.sync_gradients_on_last(index):
                with self.autocast():
                    logits = self.model(images)
                    loss = self.loss(logits, images, targets) / self.plan.accum_steps
                self.scaler.scale(loss).backward()
            self.meters.add_loss(loss)
        self.batch_norm.finish_step(self.plan.accum_steps)
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        # Equal on every rank, as the gradients are; optimizer and EMA refuse a step whose norm is not finite by themselves,
        # on the device, so nothing here waits for it.
        grad_norm = global_grad_norm(self.raw_model.parameters())
        self.optimizer.step(grad_norm=grad_norm, clip=self.cfg.optimizer.clip_grad)
        if self.ema is not None:
            self.ema.update(self.raw_model, self.progress.step, grad_norm=grad_norm)
        if self.scaler.is_enabled():
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=False)
        self.meters.add_step(grad_norm, self.plan.global_batch_size)
        self.progress.advance(self.plan.global_batch_size)

    def loss(self, logits: Tensor, images: Tensor, targets: Tensor) -> Tensor:
        loss = soft_target_cross_entropy(logits, targets)
        if self.mesa_is_on:
            with torch.no_grad():
                ema_logits = self.ema.module(images)
            mesa = self.cfg.trainer.mesa
            loss = loss + mesa.weight * mesa_loss(logits, ema_logits, mesa.temperature)
        return loss

    def micro_batches(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for _ in range(self.plan.accum_steps):
            start = time.perf_counter()
            batch = next(batches)
            self.meters.data_seconds += time.perf_counter() - start
            yield batch.to(self.world.device)

    def global_micro_index(self, index: int) -> int:
        """The number of this rank's micro-batch among all of the step's: the same images bear it at any world size."""
        return self.world.rank * self.plan.accum_steps + index

    def seed_stochastic_depth(self, index: int) -> None:
        """Dropped paths are a function of (seed, step, micro-batch), so a resumed run drops the same ones."""
        key = keyed_random.step_key(self.cfg.seed, self.progress.step, self.global_micro_index(index))
        torch.manual_seed(keyed_random.fold(key, DROP_PATH) >> 1)

    def sync_gradients_on_last(self, index: int) -> contextlib.AbstractContextManager:
        last = index == self.plan.accum_steps - 1
        return contextlib.nullcontext() if last or not distributed.is_distributed() else self.model.no_sync()

    def finish_epoch(self) -> None:
        """Evaluate where it is due, then keep the state together with the score."""
        epochs_done = self.progress.step // self.train_loader.steps_per_epoch
        last = self.progress.step == self.last_step
        if last or (self.at_epoch_end and epochs_done % self.cfg.trainer.eval_every_epochs == 0):
            self.evaluate(epochs_done)
        self.save()

    def evaluate(self, epochs_done: int) -> None:
        models = {"": self.raw_model} | ({"ema_": self.ema.module} if self.ema is not None else {})
        result = evaluate(models, self.eval_loader, prepare=self.transform.evaluate, autocast=self.autocast, world=self.world)
        self.last_eval = {"step": self.progress.step, **{f"eval/{k}": v for k, v in result.items()}}
        self.telemetry.log("eval", epoch=epochs_done, **self.last_eval)

    def log_training(self) -> None:
        measured = self.meters.flush(self.world.world_size)
        remaining = (self.last_step - self.progress.step) * measured["speed/step_seconds"]
        self.telemetry.log(
            "train",
            epoch=(self.progress.step - 1) // self.train_loader.steps_per_epoch,
            step=self.progress.step,
            total_steps=self.last_step,
            samples_seen=self.progress.samples_seen,
            **{"optimizer.lr": self.lr(self.progress.step - 1)},
            **measured,
            **{"speed/memory_gib": peak_memory_gib(self.world.device), "eta_seconds": remaining},
        )

    # ---- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.raw_model.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": self.progress.state_dict(),
            "eval": self.last_eval,
            "config": self.config,  # not state: so that the file alone says what it is
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError where the state is that of another model or optimizer, naming what differs."""
        check_same_tensors(self.raw_model.state_dict(), state["model"])
        self.raw_model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"] if state["ema"] is not None else state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.progress.load_state_dict(state["progress"])
        self.last_eval = dict(state["eval"])

    def save(self, wait: bool = False) -> None:
        """Rank 0 writes; with `wait` every rank returns only when the checkpoint is on disk."""
        if self.checkpointer is not None:
            if self.checkpointer.last_saved_step != self.progress.step:
                current = self.last_eval if self.last_eval.get("step") == self.progress.step else {}
                record = {
                    "samples_seen": self.progress.samples_seen,
                    "epoch": self.epoch,
                    "epoch_finished": self.epoch if self.at_epoch_end else None,
                    "score": current.get("eval/ema_top1", current.get("eval/top1")),
                    "metrics": current,
                }
                self.checkpointer.save(self.state_dict(), step=self.progress.step, record=record, wait=wait)
            elif wait:
                self.checkpointer.finish()
        if wait:
            distributed.barrier()


def check_same_tensors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    problems = [f"  missing: {k}" for k in ours if k not in theirs] + [f"  unknown: {k}" for k in theirs if k not in ours]
    problems += [
        f"  {k}: the checkpoint has {tuple(theirs[k].shape)}, the model {tuple(v.shape)}"
        for k, v in ours.items()
        if k in theirs and theirs[k].shape != v.shape
    ]
    if problems:
        more = [f"  ... and {len(problems) - 10} more"] if len(problems) > 10 else []
        raise ValueError(
            "the checkpoint is of another model:\n" + "\n".join(problems[:10] + more) + "\nnothing was overwritten; give the "
            "settings the run was started with (config.yaml in the run directory), or start another with run_name=NAME"
        )
