"""Writers of .beton files that meet, are stopped or are killed: what carries the final name is always whole."""

import contextlib
import errno
import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data.beton import JPG, MIN_PAGE_SIZE, BetonWriter, EncodedImage, open_beton
from data.conversion import WriteSettings, write_beton
from data.manifest import verify
from scripts.prepare_data import main
from tests.unit.data_samples import make_split

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc; workers die with their parent there")


class Grey:
    """Forty small images; the worker that comes to number 20 says who it is and sleeps, if it is told where."""

    def __init__(self, told: Path | None = None):
        self.told = told
        self.names = [str(n) for n in range(40)]
        self.labels = np.zeros(40, dtype=np.int64)
        self.classes = ["a"]
        self.origin = "a test"

    def read(self, index):
        if index == 20 and self.told is not None:
            self.told.write_text(str(os.getpid()))
            time.sleep(60)
        return np.full((4, 4, 3), index, dtype=np.uint8)


def wait_until(condition, seconds: float = 120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def test_of_two_writers_without_locks_the_last_to_publish_wins_whole(tmp_path):
    path = tmp_path / "train.beton"
    first, second = (BetonWriter(path, max_samples=9) for _ in range(2))
    for number in range(9):
        first.add(EncodedImage(JPG, 8, 8, bytes([number]) * 500_000), 0)
        second.add(EncodedImage(JPG, 8, 8, bytes([100 + number]) * 700_000), 1)
    first.complete()
    first.publish()
    published = open_beton(path)
    second.complete()
    assert published.data_hash() == first.data_hash.hexdigest() and published.stored(8).data[0] == 8
    second.publish()
    assert open_beton(path).data_hash() == second.data_hash.hexdigest()
    assert [file.name for file in tmp_path.iterdir()] == ["train.beton"]


def test_a_filesystem_without_locks_is_written_to_all_the_same(tmp_path, monkeypatch):
    def no_locks(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    other = tmp_path / "train.beton.elsewhere-0a1b2c3d.partial"
    other.touch()
    assert write_beton(Grey(), tmp_path / "train.beton", WriteSettings(), num_workers=1).num_samples == 40
    assert other.exists(), "it may be another's, at work"


@pytest.fixture
def writer_at_work(tmp_path):
    """Another process in the middle of writing out/train.beton, and its worker's number."""
    writing = {
        "target": write_beton,
        "args": (Grey(tmp_path / "worker"), tmp_path / "out" / "train.beton", WriteSettings()),
    }
    process = multiprocessing.get_context("fork").Process(**writing, kwargs={"num_workers": 1})
    process.start()
    wait_until(lambda: (tmp_path / "worker").exists() and (tmp_path / "worker").read_text())
    worker = int((tmp_path / "worker").read_text())
    yield process, worker
    process.kill()
    process.join()
    if runs(worker):
        os.kill(worker, signal.SIGKILL)


def test_a_second_writer_is_refused_and_told_who_is_writing(writer_at_work, tmp_path):
    path, (process, _) = tmp_path / "out" / "train.beton", writer_at_work
    before = sorted(path.parent.iterdir())
    with pytest.raises(RuntimeError, match=f"by process {process.pid} on .*another --out"):
        write_beton(Grey(), path, WriteSettings(), num_workers=1)
    assert sorted(path.parent.iterdir()) == before and process.is_alive()


@linux
def test_a_killed_writer_takes_its_workers_along_and_the_next_one_clears_up(writer_at_work, tmp_path):
    path, (process, worker) = tmp_path / "out" / "train.beton", writer_at_work
    assert runs(worker)
    process.kill()
    process.join()
    wait_until(lambda: not runs(worker))
    assert len(list(path.parent.glob("*.partial"))) == 1 and not path.exists()
    write_beton(Grey(), path, WriteSettings(), num_workers=1)
    verify(open_beton(path), checksum=True)
    assert sorted(file.name for file in path.parent.iterdir()) == [
        path.name,
        f"{path.name}.json",
        f"{path.name}.names.txt",
    ]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def open_once_read(pipe: Path) -> int:
    """The writing end, when somebody waits at the other."""
    opened: list[int] = []

    def try_to_open() -> bool:
        with contextlib.suppress(OSError):  # no reader yet
            opened.append(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
        return bool(opened)

    wait_until(try_to_open)
    return opened[0]


@pytest.mark.slow
@linux
@pytest.mark.parametrize(
    ("number", "send"),
    [(signal.SIGINT, os.kill), (signal.SIGTERM, os.kill), (signal.SIGTERM, os.killpg)],
    ids=["Ctrl-C", "SIGTERM", "SIGTERM to all of its processes"],
)
def test_a_stopped_command_leaves_nothing_and_a_second_one_finishes(number, send, tmp_path):
    endless = make_split(tmp_path / "in", "train", 9) / "class_0" / "endless.jpg"
    make_split(tmp_path / "in", "val", 9)
    os.mkfifo(endless)  # who reads it waits, as for a file server that does not answer
    arguments = ["folder", "--source", str(tmp_path / "in"), "--out", str(tmp_path), "--num-workers", "1"]
    command = [sys.executable, "scripts/prepare_data.py", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    try:
        pipe = open_once_read(endless)
        (worker,) = children(process.pid)
        send(process.pid, number)
        os.close(pipe)
        assert process.wait(120) == 130
        assert not runs(worker) and [p.name for p in tmp_path.glob("train.beton*")] == []
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    endless.unlink()
    assert main(arguments) == 0
    assert open_beton(tmp_path / "train.beton").data_start % MIN_PAGE_SIZE == 0
