"""W&B with its real client: online against a server on this machine, without any server, and synced afterwards."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mambavision.telemetry.sinks import read_events
from tests.integration.torchrun import ROOT
from tests.wandb_server import WandbServer

pytestmark = pytest.mark.slow


def train(directory: Path, *settings: str, **environment: str) -> subprocess.CompletedProcess:
    words = ["experiment=tiny", "run_name=run", "logger.console=lines", f"output_dir={directory}", *settings]
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *words],
        cwd=directory,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_requeued_run_is_one_wandb_run_and_its_offline_part_is_synced_into_it(tmp_path: Path) -> None:
    settings = ["logger.group=sweep-1", "logger.tags=[a,b]"]
    with WandbServer() as server:
        for steps in (20, 40):  # the second start is what a requeue does
            done = train(tmp_path, *settings, f"trainer.max_steps={steps}", WANDB_MODE="online", **server.environment)
            assert done.returncode == 0 and "warning" not in done.stderr, done.stdout + done.stderr
        (name,) = server.runs
        run = server.runs[name]
        assert (tmp_path / "run" / "wandb_run_id").read_text().strip() == name
        assert (run.settings["groupName"], run.settings["tags"]) == ("sweep-1", ["a", "b"])
        logged = [line["step"] for line in run.history if "train/loss" in line]
        assert logged == list(range(5, 45, 5))  # in order, none twice
        assert run.summary["best/ema_top1"] > 0 and run.summary["speed/img_per_sec"] > 0

        done = train(tmp_path, *settings, "trainer.max_steps=60", WANDB_MODE="offline", WANDB_API_KEY="")
        assert done.returncode == 0, done.stderr
        (part,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
        wandb = [str(Path(sys.executable).with_name("wandb")), "sync", str(part)]
        synced = subprocess.run(
            wandb, env={**os.environ, **server.environment}, capture_output=True, text=True, timeout=120
        )
        assert synced.returncode == 0, synced.stdout + synced.stderr
        assert list(server.runs) == [name]
        assert [line["step"] for line in run.history if "train/loss" in line] == list(range(5, 65, 5))


def test_the_best_and_the_last_checkpoint_become_artifacts_if_wanted(tmp_path: Path) -> None:
    words = ("logger.artifacts=true", "trainer.max_steps=20", "checkpoint.keep_last=1")
    done = train(tmp_path, *words, WANDB_MODE="offline", WANDB_API_KEY="", WANDB_DATA_DIR=str(tmp_path))
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    (log,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    sent = log.read_bytes()
    run_id = (tmp_path / "run" / "wandb_run_id").read_text()
    assert f"checkpoint-{run_id}".encode() in sent and b"best" in sent and b"last" in sent
    newest = sorted((tmp_path / "run" / "checkpoints").glob("*.pt"))[-1]
    staged = [path for path in tmp_path.rglob("artifacts/**/*") if path.is_file()]
    assert newest.stat().st_size in {path.stat().st_size for path in staged}


def test_without_a_network_training_starts_at_once_and_finishes_with_one_warning(tmp_path: Path) -> None:
    with socket.socket() as closed:  # bound, so that nobody else takes the port; not listening, so that it refuses
        closed.bind(("127.0.0.1", 0))
        nowhere = {"WANDB_BASE_URL": f"http://127.0.0.1:{closed.getsockname()[1]}", "WANDB_API_KEY": "0" * 40}
        done = train(tmp_path, "logger.init_timeout_seconds=5", WANDB_MODE="online", **nowhere)
    assert done.returncode == 0, done.stderr
    events = read_events(tmp_path / "run" / "metrics.jsonl")
    launched, began, first_step = (
        next(e["time"] for e in events if e["event"] == kind) for kind in ("launch", "start", "train")
    )
    # A few seconds each on a machine with nothing else to do; W&B left to itself would wait for 90.
    assert began - launched < 60 and first_step - began < 60
    assert next(e["status"] for e in events if e["event"] == "stop") == "finished"
    warnings = [e for e in events if e["event"] == "warning"]
    assert len(warnings) == 1 and "out of reach" in warnings[0]["message"]
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))  # it has gone on offline
