"""debug=profile: what a few training steps consist of, from torch.profiler, as a trace and as a table. Rank 0 only."""

from __future__ import annotations

from pathlib import Path

import torch

from mambavision.telemetry.sinks import Telemetry

_SKIP_STEPS = 10  # of a start: compilation, autotuning, filling caches
_STEPS = 5  # traced, after one with which the profiler warms up
_ROWS = 40


class StepProfile:
    """Watches the steps of one start and writes profile/step_N.{json.gz,txt} below the run directory after the last."""

    def __init__(self, directory: Path, device: torch.device, telemetry: Telemetry):
        self.directory, self.device, self.telemetry = directory / "profile", device, telemetry
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        schedule = torch.profiler.schedule(skip_first=_SKIP_STEPS, wait=0, warmup=1, active=_STEPS, repeat=1)
        self.step = 0
        self.profiler = torch.profiler.profile(activities=activities, schedule=schedule, on_trace_ready=self._write)

    def __enter__(self) -> StepProfile:
        self.profiler.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.profiler.stop()  # writes what there is, if the run ends among the traced steps
        if not self.directory.exists():
            message = f"debug=profile: this start ended before its step {_SKIP_STEPS + 2}, the first that is traced"
            self.telemetry.log("warning", message=message)

    def step_done(self, step: int) -> None:
        self.step = step
        self.profiler.step()

    def _write(self, profiler: torch.profiler.profile) -> None:
        name = self.directory / f"step_{self.step:08d}"
        order = f"self_{self.device.type}_time_total"
        table = profiler.key_averages().table(sort_by=order, row_limit=_ROWS, max_name_column_width=80)
        try:
            self.directory.mkdir(exist_ok=True)
            name.with_suffix(".txt").write_text(f"the steps before step {self.step}, {_STEPS} at most\n{table}\n")
            profiler.export_chrome_trace(f"{name}.json.gz")
        except OSError as error:
            self.telemetry.log("warning", message=f"the profile could not be written to {self.directory}: {error}")
            return
        self.telemetry.log("notice", message=f"profile: {name}.txt; {name}.json.gz opens in https://ui.perfetto.dev")
