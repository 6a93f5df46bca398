"""slurm/train.sbatch on a real controller: a run survives what a cluster does to it and ends with the same weights.

Equality is to the bit, with two ranks. With more, DDP lays its buckets out anew after the first step of every start, and
the sum over ranks then has another order in that step.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from virtual_cluster import VirtualCluster

from mambavision.engine.checkpoint import newest_valid
from mambavision.run_dir import RunDirectory
from mambavision.telemetry.sinks import read_events

ROOT = Path(__file__).resolve().parents[2]
SBATCH = ROOT / "slurm" / "train.sbatch"
SETTINGS = ["experiment=tiny", "logger=jsonl", "run_name=run"]
STEPS = 120
LONG = [
    "trainer.epochs=8",
    "trainer.eval_every_epochs=8",
    "data.synthetic_eval_samples=32",
    "trainer.agree_every_steps=5",
]
PATIENCE = 240  # seconds; a machine with two busy cores needs a quarter of it

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@dataclass
class Job:
    """A submitted run in its own working directory."""

    cluster: VirtualCluster
    id: str
    cwd: Path

    @property
    def run(self) -> RunDirectory:
        return RunDirectory(self.cwd / "runs" / "run")

    @property
    def output(self) -> str:
        return "".join(p.read_text(errors="replace") for p in sorted(self.cwd.glob("slurm-*.out")))

    def events(self, name: str) -> list[dict]:
        return [e for e in read_events(self.run.metrics) if e["event"] == name]

    @property
    def steps(self) -> int:
        """The newest logged step."""
        return max((e["step"] for e in self.events("train")), default=0)

    def wait_for_step(self, step: int) -> None:
        self.cluster.wait(lambda: self.steps >= step or self._is_over(), PATIENCE, f"step {step}\n{self.output}")
        assert self.steps >= step, self.output

    def wait_for_start(self, count: int) -> None:
        done = lambda: len(self.events("start")) >= count or self._is_over()  # noqa: E731
        self.cluster.wait(done, PATIENCE, f"start {count} of the run\n{self.output}")
        assert len(self.events("start")) >= count, self.output

    def _is_over(self) -> bool:
        return self.cluster.state(self.id) in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")

    def end(self) -> str:
        return self.cluster.wait_for_end(self.id, PATIENCE)

    def weights(self) -> dict[str, torch.Tensor]:
        path, _ = newest_valid(self.run.checkpoints)
        state = torch.load(path, weights_only=True)
        return {f"{part}.{key}": tensor for part in ("model", "ema") for key, tensor in state[part].items()}


def submit(
    cluster: VirtualCluster, cwd: Path, *settings: str, options: tuple[str, ...] = (), nproc: int = 1, **env: str
) -> Job:
    """On two nodes with `nproc` ranks each, from a directory that is not the repository's."""
    shape = ["--nodes=2", f"--gpus-per-node={nproc}", "--cpus-per-task=4", "--time=30"]
    env = {"NPROC_PER_NODE": str(nproc), "PREFLIGHT": "0", "PYTHON": sys.executable, **env}
    answer = cluster.run(
        ["sbatch", "--parsable", *shape, *options, str(SBATCH), *SETTINGS, *settings], cwd=cwd, env=env
    )
    return Job(cluster, answer, cwd)


def assert_same_weights(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    different = [k for k in ours if not torch.equal(ours[k], theirs[k])]
    assert not different, f"{len(different)} of {len(ours)} tensors differ: {different[:5]}"


@pytest.fixture(scope="module")
def started(cluster: VirtualCluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """Jobs that several tests look at, or that need no attention, side by side on the four nodes."""
    crash = {"MAMBAVISION_FAULT": "kill@4:1", "MAX_RESTARTS": "1"}
    return {
        "uninterrupted": submit(cluster, tmp_path_factory.mktemp("uninterrupted"), *LONG),
        "crashing": submit(cluster, tmp_path_factory.mktemp("crashing"), **crash),
        "refused": submit(cluster, tmp_path_factory.mktemp("refused"), "optimizer.lrr=1"),
        "short": submit(
            cluster,
            tmp_path_factory.mktemp("short"),
            options=("--time=1", "--signal=B:USR1@60"),
            MAX_RESTARTS="0",
        ),
    }


@pytest.fixture(scope="module")
def uninterrupted(started: dict[str, Job]) -> Job:
    job = started["uninterrupted"]
    assert job.end() == "COMPLETED", job.output
    return job


def test_two_nodes_of_two_ranks_check_themselves_train_and_finish(cluster: VirtualCluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "trainer.max_steps=20", nproc=2, PREFLIGHT="1")
    assert job.end() == "COMPLETED", job.output
    assert job.run.status()["status"] == "finished" and job.run.status()["step"] == 20
    assert [e["world_size"] for e in job.events("start")] == [4]
    assert "all-reduce        4 ranks" in job.output  # the pre-flight check
    logs = list((job.run.path / "logs").glob("job*/train/node*/*/attempt_0/*/stderr.log"))
    assert len(logs) == 4  # one for each rank
    assert not job.run.stop_file.exists()


def test_a_run_stopped_by_its_time_limit_goes_on_and_ends_with_the_same_weights(
    cluster: VirtualCluster, started: dict[str, Job], uninterrupted: Job, tmp_path: Path
) -> None:
    for other in started.values():  # they would delay the first step beyond the notice
        other.end()
    # SLURM looks every 30 s, and 30 s ahead: the notice comes 20 to 50 s after the start, the end after 60 to 90.
    slow = "sleep1@0-40:0"
    env = {"MAMBAVISION_FAULT": slow, "SIGNAL_AFTER_SECONDS": "0"}  # the STOP file and, at once, the signal as well
    job = submit(cluster, tmp_path, *LONG, options=("--time=1", "--signal=B:USR1@10"), **env)
    cluster.wait(lambda: "back to the queue" in job.output, PATIENCE, "the job to go back to the queue")
    cluster.run(["scontrol", "update", f"JobId={job.id}", "TimeLimit=30"])
    assert job.end() == "COMPLETED", job.output
    assert "notice (USR1)" in job.output and "back to the queue" in job.output
    stopped = job.events("stop")[0]
    assert stopped["status"] == "preempted" and 0 < stopped["step"] < STEPS
    assert job.events("start")[1]["step"] == stopped["step"]  # not one step is repeated
    assert_same_weights(job.weights(), uninterrupted.weights())


def test_a_run_survives_signals_requeue_node_loss_and_preemption_with_the_same_weights(
    cluster: VirtualCluster, uninterrupted: Job, tmp_path: Path
) -> None:
    job = submit(cluster, tmp_path, *LONG, options=("-w", "n1,n2"), MAMBAVISION_FAULT="sleep0.2@0-1000:0")

    def progress() -> None:
        """The newest start has done ten steps of its own."""
        job.wait_for_step(job.events("start")[-1]["step"] + 10)

    # To every process of the step, also to torchrun.
    job.wait_for_start(1)
    progress()
    cluster.run(["scancel", "--signal=USR1", job.id])
    job.wait_for_start(2)
    assert job.events("stop")[-1]["status"] == "preempted"

    # From outside, without a word to the run.
    progress()
    cluster.run(["scontrol", "requeue", job.id])
    job.wait_for_start(3)

    # A node without power: its daemon and its ranks die at once, the others notice.
    progress()
    cluster.kill_node("n2")
    cluster.start_node("n2")
    job.wait_for_start(4)

    # Something more important wants the nodes.
    progress()
    urgent = cluster.run(
        ["sbatch", "--parsable", "-p", "high", "-w", "n1,n2", "-N2", "--exclusive", "-o/dev/null", "--wrap=sleep 1"]
    )
    job.wait_for_start(5)
    assert cluster.state(urgent) == "COMPLETED"
    assert job.events("stop")[-1]["status"] == "preempted"  # on notice, within the partition's grace time

    assert job.end() == "COMPLETED", job.output
    assert job.run.status()["status"] == "finished"
    assert_same_weights(job.weights(), uninterrupted.weights())


def test_a_crash_loop_ends_and_says_so(started: dict[str, Job]) -> None:
    job = started["crashing"]
    assert job.end() == "FAILED", job.output
    assert "2 faults in a row without a new checkpoint" in job.output
    assert job.cluster.job(job.id)["Restarts"] == "1"


def test_a_limit_too_short_for_its_notice_does_not_go_round_for_ever(started: dict[str, Job]) -> None:
    job = started["short"]
    assert job.end() == "FAILED", job.output
    assert "Is the time limit well above the notice" in job.output


def test_a_cancelled_job_stays_cancelled(cluster: VirtualCluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, *LONG, MAMBAVISION_FAULT="sleep0.2@0-1000:0")
    job.wait_for_step(5)
    cluster.run(["scancel", job.id])
    assert job.end() == "CANCELLED"
    assert job.run.status()["status"] == "preempted"  # the work is kept all the same


def test_a_second_job_for_the_same_run_is_refused_and_does_not_come_back(
    cluster: VirtualCluster, tmp_path: Path
) -> None:
    """Requeued, it would hold its nodes again and again for as long as the first makes progress."""
    endless = ["trainer.epochs=4000", "trainer.eval_every_epochs=4000"]
    first = submit(cluster, tmp_path, *endless, options=("--nodes=1",))
    first.wait_for_step(1)
    second = submit(cluster, tmp_path, *endless, options=("--nodes=1",))
    assert second.end() == "FAILED"
    assert f"error: job {first.id} is training in runs/run: scancel one" in second.output
    (tmp_path / "runs" / "run" / "slurm_job").unlink()  # as it is for two that start at once: the lock decides
    third = submit(cluster, tmp_path, *endless, options=("--nodes=1",))
    assert third.end() == "FAILED"
    assert re.search(r"^\[batch .*\] error: runs/run is in use by another training", third.output, re.MULTILINE)
    (tmp_path / "runs" / "run" / "STOP").touch()
    assert first.end() == "FAILED" and "stopped by the STOP file" in first.output
    assert "restart 1 of it" not in first.output  # which is that of all three


def test_wrong_settings_are_refused_before_anything_starts(started: dict[str, Job]) -> None:
    job = started["refused"]
    assert job.end() == "FAILED"
    assert "did you mean optimizer.lr" in job.output and job.cluster.job(job.id)["ExitCode"] == "2:0"
    assert not job.run.path.exists()
