"""Two hosts without a scheduler: torchrun starts all ranks again when one dies, and the run goes on where it was."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mambavision.run_dir import RunDirectory
from mambavision.telemetry.sinks import read_events
from tests.integration.torchrun import ROOT

pytestmark = pytest.mark.slow
SECONDS, RESTART_SECONDS = 240, 120


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_a_run_over_two_agents_survives_the_death_of_a_rank(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--max-restarts=3"]
    rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=elastic"]
    settings = ["experiment=tiny", "logger=jsonl", "run_name=run", f"output_dir={tmp_path}"]
    # Slow enough to be killed in the middle, whatever the machine.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MAMBAVISION_FAULT": "sleep0.1@0-1000"}
    command = [*torchrun, *rendezvous, str(ROOT / "train.py"), *settings]
    agents = []
    try:
        for host in range(2):
            with open(tmp_path / f"host{host}.out", "w") as out:
                agents.append(subprocess.Popen(command, stdout=out, stderr=out, env=environment))
        run = RunDirectory(tmp_path / "run")
        deadline = time.monotonic() + SECONDS
        while not any(e["event"] == "train" and e["step"] >= 15 for e in read_events(run.metrics)):
            assert time.monotonic() < deadline, "no step 15"
            time.sleep(0.2)
        (victim,) = [c for c in psutil.Process(agents[1].pid).children() if "train.py" in " ".join(c.cmdline())]
        victim.send_signal(signal.SIGKILL)
        deadline = time.monotonic() + RESTART_SECONDS
        while len(starts := [e for e in read_events(run.metrics) if e["event"] == "start"]) < 2:
            assert time.monotonic() < deadline, "the ranks were not started again"
            time.sleep(0.2)
        codes = [agent.wait(SECONDS) for agent in agents]
    finally:
        for agent in agents:
            if agent.poll() is None:
                for child in psutil.Process(agent.pid).children(recursive=True):
                    child.kill()
                agent.kill()
    output = "".join((tmp_path / f"host{host}.out").read_text() for host in range(2))
    assert codes == [0, 0], output
    assert run.status()["status"] == "finished" and run.status()["step"] == 60
    assert len(starts) >= 2 and starts[1]["step"] >= 10, output  # the newest checkpoint before the kill
