"""FFCV pipelines for the image field: the native keyed decoder, or FFCV's own operations ("stock").

What the loader asks of `data.native_decoder` (which needs a C++ compiler at first use):

    KeyedDecoder(plan, *, num_samples, corrupt="skip" | "stop")   an ffcv Operation, first and only one of the image
        pipeline. `plan` is an AugmentPlan (training) or an EvalPlan (evaluation). Output: (B, S, S, 3) uint8.
        Raises NativeUnavailable (a RuntimeError naming the reason) where it cannot be built.
    .set_epoch(epoch)            keys of the samples decoded from now on; training plans only
    .take_failures() -> list[Failure]
        samples whose image could not be read since the last call, each complete before its batch is handed out.
        skip: (sample + 1) % num_samples, then + 2, ... was decoded in its place with the key of `sample`;
        in evaluation, and with stop, nothing was: `replacement` is -1 and the output is zero.

Sample numbers at or above num_samples are repetitions (data.order): image sample % num_samples, keyed by the whole number.
"""

from __future__ import annotations

from typing import NamedTuple


class Failure(NamedTuple):
    sample: int  # as in the order, repetitions included
    replacement: int  # image decoded instead, in [0, num_samples); -1: none
    reason: str
