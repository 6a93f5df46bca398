"""What a data set of more than a million images takes in memory, on one that is smaller but large enough to tell."""

import gc
import multiprocessing
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from data.datasets import FolderSource
from data.names import Names
from scripts.check_data import look_at_all


def test_names_are_those_that_were_given():
    given = ["class_0/0001.jpg", "", "klaß/übung.png", "class_2/\udcff.jpg", "日本/一.jpg"]
    names = Names(given)
    assert list(names) == given and names == given and len(names) == 5
    assert names[-1] == given[-1] and "klaß/übung.png" in names and list(Names([])) == []
    with pytest.raises(IndexError):
        names[5]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_forked_worker_does_not_copy_the_names_of_all_images():
    count = 200_000
    given = [f"class_{number % 1000:04d}/image_{number:08d}.JPEG" for number in range(count)]
    source = FolderSource(Path("/data"), given, np.zeros(count, dtype=np.int64), ["a"])
    del given
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    worker = context.Process(target=_read_all_names, args=(source, answers))
    worker.start()
    worker.join()
    assert answers.get() < 4 * 2**20, "as a list it is about 16 MB"


def _read_all_names(source, answers):
    gc.disable()
    before = _own_bytes()
    for index in range(len(source.names)):
        source.names[index].endswith(".jpg")
    answers.put(_own_bytes() - before)


def _own_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean", "Private_Dirty")))


def test_looking_at_all_images_does_not_put_all_of_them_into_the_pool_at_once():
    def read(index: int) -> bytes:
        raise OSError(f"no image {index}")

    count = 4000
    look_at_all(read, 1, 2, "test", set())  # what is loaded once, and kept, is not counted
    tracemalloc.start()
    try:
        looked = look_at_all(read, count, 2, "test", set())
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [item.error for item in looked] == [f"OSError: no image {index}" for index in range(count)]
    assert peak - kept < 250 * count, "waiting in the pool takes about 1.6 kB an image"
