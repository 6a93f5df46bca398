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

    def state_dict(self) -> dict[str, int]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step, self.samples_seen = int(state["step"]), int(state["samples_seen"])
