"""The table of a sweep: what run directories and the queue say, as one word a point; what is to be started again."""

from __future__ import annotations

import csv
import errno
import fcntl
import json
import os
from pathlib import Path

import pytest

from mambavision.cluster import points
from mambavision.cluster.sweep import Sweep, problems_before_start, record_job, text_table
from mambavision.run_dir import RunDirectory, run_directory

pytestmark = pytest.mark.slow  # each composes several configurations
TINY = ["experiment=tiny", "logger=jsonl", "run_name=s"]


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return Sweep(tmp_path / "s", points.expand([*TINY, f"output_dir={tmp_path}", "seed=0,1,2,3"]))


def run_of(sweep: Sweep, index: int) -> RunDirectory:
    cfg = sweep.points[index].cfg
    run = RunDirectory(Path(run_directory(cfg)))
    run.create()
    run.write_config(cfg)
    return run


def statuses(sweep: Sweep, queue: dict[str, str] | None = None) -> list[str]:
    return [r.status for r in sweep.rows(queue or {})]


def test_a_fresh_sweep_is_missing_altogether(sweep: Sweep) -> None:
    assert statuses(sweep) == ["missing"] * 4 and all(r.is_wanting for r in sweep.rows({}))


def test_run_directories_tell_how_points_ended(sweep: Sweep) -> None:
    for index, status in enumerate(("finished", "failed", "preempted")):
        run_of(sweep, index).write_status(status, step=5, cause="it broke" if status == "failed" else None)
    assert statuses(sweep) == ["finished", "failed", "preempted", "missing"]
    assert [r.is_wanting for r in sweep.rows({})] == [False, True, True, True]
    assert "failed: it broke" in text_table(sweep.rows({}))


def test_a_point_whose_config_says_nothing_is_wanting_and_the_table_goes_on(sweep: Sweep) -> None:
    run = run_of(sweep, 0)
    run.write_status("finished", step=5)
    run.config_file.write_text("")
    assert statuses(sweep) == ["failed", "missing", "missing", "missing"]


def test_the_queue_tells_which_points_are_on_their_way(sweep: Sweep) -> None:
    for index in range(4):
        record_job(run_directory(sweep.points[index].cfg), f"7_{index}")
    queue = {"7_0": "PENDING", "7_1": "RUNNING", "7_2": "REQUEUED"}
    assert statuses(sweep, queue) == ["queued", "running", "queued", "failed"]  # the last is gone without a word
    assert [r.is_wanting for r in sweep.rows(queue)] == [False, False, False, True]


def test_running_without_a_job_means_a_living_process_or_a_lost_one(sweep: Sweep) -> None:
    run = run_of(sweep, 0)
    run.write_status("running", step=5)
    assert statuses(sweep)[0] == "running"
    record = json.loads(run.status_file.read_text())
    run.status_file.write_text(json.dumps({**record, "pid": 2**22 + 1}))
    assert statuses(sweep)[0] == "lost"
    run.status_file.write_text(json.dumps({**record, "host": "elsewhere", "pid": os.getpid()}))
    assert statuses(sweep)[0] == "lost"


def test_a_finished_run_that_is_to_be_longer_is_not_finished(sweep: Sweep, tmp_path: Path) -> None:
    run_of(sweep, 0).write_status("finished", step=5)
    words = [*TINY, f"output_dir={tmp_path}", "trainer.max_steps=100", "seed=0,1"]
    assert statuses(Sweep(tmp_path / "s", points.expand(words)))[0] == "preempted"


def test_the_table_is_written_for_people_and_programs(sweep: Sweep) -> None:
    run = run_of(sweep, 0)
    events = [{"event": "train", "step": s, "total_steps": 60, "speed/img_per_sec": 100.0 + s} for s in (5, 10, 15)]
    events += [{"event": "eval", "step": 15, "eval/top1": 40.0, "eval/ema_top1": 41.5}, {"event": "notice"}]
    run.metrics.write_text("".join(json.dumps(e) + "\n" for e in events) + '{"event": "tra')  # a kill cut the last line
    run.write_status("finished", step=15)
    sweep.write_table(sweep.rows({}))
    first = json.loads((sweep.directory / "table.json").read_text())[0]
    assert (first["top1"], first["img_per_sec"], first["step"], first["status"]) == (41.5, 110.0, 15, "finished")
    assert next(csv.DictReader((sweep.directory / "table.csv").open()))["point"] == "seed=0"
    assert "| seed=0 | finished | 15/60 | 41.50 | 110 |" in (sweep.directory / "table.md").read_text()


def test_a_second_submission_at_the_same_time_is_refused(sweep: Sweep) -> None:
    second = Sweep(sweep.directory, sweep.points)
    with sweep.locked(), pytest.raises(RuntimeError, match="another scripts/submit"), second.locked():
        pass


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_a_warning(
    number: int, sweep: Sweep, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with sweep.locked():
        told = capsys.readouterr().err
    assert told.count("warning") == 1 and os.strerror(number) in told


def test_what_would_be_refused_is_found_before_anything_starts(tmp_path: Path) -> None:
    chosen = points.expand([*TINY, f"output_dir={tmp_path}", "trainer.micro_batch_size=8,12", "trainer.epochs=4"])
    stored = points.expand([*TINY, f"output_dir={tmp_path}", "trainer.micro_batch_size=8,12", "trainer.epochs=5"])[0]
    run = RunDirectory(Path(run_directory(stored.cfg)))
    run.create()
    run.write_config(stored.cfg)
    (run.checkpoints / "step_00000010.pt").touch()
    problems = problems_before_start(chosen, world_size=2)
    assert len(problems) == 2
    assert "trainer.micro_batch_size=8: this run was started with other settings" in problems[0]
    assert "trainer.micro_batch_size=12: trainer.global_batch_size=32 cannot be cut" in problems[1]


def test_the_same_run_twice_is_refused(tmp_path: Path) -> None:
    twice = points.expand(["experiment=tiny", f"output_dir={tmp_path}", "optimizer.lr=1e-3,0.001"])
    assert "the same run as optimizer.lr=0.001" in problems_before_start(twice, world_size=1)[0]
