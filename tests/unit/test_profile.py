"""debug=profile leaves a trace and a table of some steps."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from mambavision.engine.profile import StepProfile
from mambavision.telemetry.sinks import JsonlSink, Telemetry, read_events


def steps(directory: Path, count: int) -> list[dict]:
    telemetry = Telemetry([JsonlSink(directory / "metrics.jsonl")])
    with StepProfile(directory, torch.device("cpu"), telemetry) as profile:
        for step in range(1, count + 1):
            torch.ones(8, 8) @ torch.ones(8, 8)
            profile.step_done(step)
    telemetry.close()
    return read_events(directory / "metrics.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("count, last", [(30, 16), (13, 13)])
def test_a_trace_and_a_table_of_some_steps(tmp_path: Path, count: int, last: int) -> None:
    (event,) = steps(tmp_path, count)

    name = tmp_path / "profile" / f"step_{last:08d}"
    assert f"{name}.txt" in event["message"]
    assert "aten::mm" in name.with_suffix(".txt").read_text()
    with gzip.open(f"{name}.json.gz") as file:
        traced = json.load(file)["traceEvents"]
    assert sum(e["name"] == "aten::mm" for e in traced) == last - 11


@pytest.mark.slow
def test_a_start_that_is_too_short_says_so(tmp_path: Path) -> None:
    (event,) = steps(tmp_path, 3)
    assert event["event"] == "warning"
    assert "ended before its step 12" in event["message"]
