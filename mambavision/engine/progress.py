"""Where a run stands: two numbers. Everything else (lr, epoch, order, mixup) is a function of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass
class TrainProgress:
    step: int = 0  # optimizer steps taken or skipped; also the position in the data
    samples_seen: int = 0

    def advance(self, global_batch_size: int) -> None:
        self.step += 1
        self.samples_seen += global_batch_size

    def move(self, before: dict[str, int], *, steps_per_epoch: int, batch: int) -> None:
        """The same place in the data under another batch size: as many whole epochs, and no sample twice."""
        if before == {"global_batch_size": batch, "steps_per_epoch": steps_per_epoch}:
            return
        epochs, steps = divmod(self.step, before["steps_per_epoch"])
        steps_in_epoch = -(-steps * before["global_batch_size"] // batch)
        self.step = epochs * steps_per_epoch + min(steps_in_epoch, steps_per_epoch)

    def state_dict(self) -> dict[str, int]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step, self.samples_seen = int(state["step"]), int(state["samples_seen"])
