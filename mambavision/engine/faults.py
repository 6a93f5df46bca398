"""Injects faults, so that tests can prove what happens: off unless MAMBAVISION_FAULT is set. Owns no recovery.

    MAMBAVISION_FAULT="kill@25:1"                 rank 1 dies by SIGKILL before step 25
    MAMBAVISION_FAULT="nan@12-17:0,kill@20/rename"  several, over several steps, at another place of the code

A fault is KIND@STEP[-LAST][:RANK][/PLACE]; step counts from 0 as progress.step does, without a rank all are meant.
"""

from __future__ import annotations

import os
import re
import signal
import time
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

_SYNTAX = re.compile(
    r"(?P<kind>[a-z_]+?)(?P<amount>\d+(\.\d+)?)?@(?P<first>\d+)(-(?P<last>\d+))?(:(?P<rank>\d+))?(/(?P<place>\w+))?$"
)


class Fault(Enum):
    """What can be ordered. A number after the kind is its amount: `sleep2.5@10`."""

    KILL = "kill"  # SIGKILL to this process
    RAISE = "raise"  # an exception
    MEMORY = "memory"  # PyTorch's exception where a GPU's memory is full
    EXIT = "exit"  # the process ends at once, with code 0
    FREEZE = "freeze"  # SIGSTOP: alive, but nothing moves
    SLEEP = "sleep"  # that many seconds
    USR1 = "usr"  # SIGUSR1, a notice that schedulers send; without its 1, which would be an amount
    TERM = "term"  # SIGTERM, the same
    NAN = "nan"  # the step's loss is nan
    INF = "inf"  # the loss is finite, its gradient is not
    COLLAPSE = "collapse"  # the model answers every image alike


PLACES = ("step", "data", "copy", "open", "payload", "fsync", "rename", "retain", "saved", "evaluate")


@dataclass(frozen=True)
class Order:
    fault: Fault
    amount: float
    first: int
    last: int
    rank: int | None
    place: str

    def strikes(self, place: str, step: int) -> bool:
        return (
            self.place == place
            and self.first <= step <= self.last
            and self.rank in (None, int(os.environ.get("RANK", 0)))
        )


def parse(text: str) -> list[Order]:
    """Raises ValueError for what cannot be understood."""
    orders = []
    for part in filter(None, text.split(",")):
        match = _SYNTAX.match(part)
        if match is None or match["kind"] not in {f.value for f in Fault} or (match["place"] or "step") not in PLACES:
            raise ValueError(f"MAMBAVISION_FAULT={part} is not KIND@STEP[-LAST][:RANK][/PLACE]; for instance kill@25:1")
        rank = None if match["rank"] is None else int(match["rank"])
        first = int(match["first"])
        last = first if match["last"] is None else int(match["last"])
        orders.append(
            Order(Fault(match["kind"]), float(match["amount"] or 0), first, last, rank, match["place"] or "step")
        )
    return orders


ORDERS = parse(os.environ.get("MAMBAVISION_FAULT", ""))


def at(place: str, step: int) -> None:
    """The hook: does what has been ordered for this place and step, nothing otherwise."""
    for order in ORDERS:
        if order.strikes(place, step):
            _strike(order, step)


def spoil(logits: Tensor, step: int) -> Tensor:
    """The model's answer as a broken model would give it; itself where nothing has been ordered."""
    for order in ORDERS:
        if order.strikes("step", step):
            if order.fault is Fault.NAN:
                logits = logits * torch.nan
            elif order.fault is Fault.INF:
                logits.register_hook(lambda gradient: gradient + torch.inf)
            elif order.fault is Fault.COLLAPSE:
                logits = logits * 0.0
    return logits


def _strike(order: Order, step: int) -> None:
    signals = {
        Fault.KILL: signal.SIGKILL,
        Fault.FREEZE: signal.SIGSTOP,
        Fault.USR1: signal.SIGUSR1,
        Fault.TERM: signal.SIGTERM,
    }
    if order.fault in signals:
        os.kill(os.getpid(), signals[order.fault])
    elif order.fault is Fault.EXIT:
        os._exit(0)
    elif order.fault is Fault.SLEEP:
        time.sleep(order.amount)
    elif order.fault is Fault.MEMORY:
        raise torch.OutOfMemoryError(f"ordered: out of memory at step {step} ({order.place})")
    elif order.fault is Fault.RAISE:
        raise RuntimeError(f"ordered fault at step {step} ({order.place})")
