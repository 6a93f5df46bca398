"""The pre-flight checks find what is planted, and say what to do about it."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data.manifest import manifest_path
from mambavision import distributed
from mambavision.cluster import doctor, doctor_device, sizing
from mambavision.cluster.doctor import Plan
from mambavision.compose import compose_train_config
from mambavision.models.variants import VARIANTS
from tests.unit.data_samples import make_betons, make_folder

ROOT = Path(__file__).resolve().parents[2]
TINY = ["experiment=tiny", "logger=jsonl"]


def test_an_error_without_a_message_is_told_by_its_type() -> None:
    assert doctor.first_line(RuntimeError()) == "RuntimeError"
    assert doctor.first_line(ValueError("no data\nat all")) == "no data"


def test_a_sound_run_has_no_errors(tmp_path: Path) -> None:
    cfg = compose_train_config([*TINY, f"output_dir={tmp_path}"])
    findings = [*doctor.check_run(cfg, Plan(1, 2)), *doctor_device.check_torch(cfg), *doctor_device.check_scan()]
    assert [f.line() for f in findings if f.level == "error"] == []
    looked_at = {f.name for f in findings}
    assert looked_at >= {"python", "packages", "data", "batch", "disk", "run directory", "wandb", "cuda", "scan"}
    assert not list(tmp_path.iterdir())  # the probe is gone


def test_missing_data_is_an_error_with_the_cure(tmp_path: Path) -> None:
    cfg = compose_train_config(["model=mambavision_nano", f"data.path={tmp_path / 'nowhere'}"])
    (finding,) = doctor.check_data(cfg)
    assert finding.level == "error" and "nowhere" in finding.message and "prepare_data" in finding.cure
    cfg = compose_train_config(["model=mambavision_nano", f"data.path={tmp_path}"])
    assert [f.level for f in doctor.check_data(cfg)] == ["error", "error"]  # neither train.beton nor val.beton
    (tmp_path / "train").mkdir()
    cfg = compose_train_config(["model=mambavision_nano", "data=folder", f"data.path={tmp_path}"])
    assert [f.level for f in doctor.check_data(cfg)] == ["ok", "error"]
    assert "has no val/ or validation/" in doctor.check_data(cfg)[1].message


def test_data_smaller_than_a_step_is_an_error_before_anything_is_submitted(tmp_path: Path) -> None:
    make_betons(make_folder(tmp_path / "folder"), tmp_path / "beton")
    small = [*TINY, "data=ffcv", "data.image_size=32", f"data.path={tmp_path / 'beton'}"]
    for batch, levels in ((8, ["ok", "ok"]), (32, ["error", "ok"])):
        words = [*small, f"trainer.global_batch_size={batch}", "trainer.micro_batch_size=4"]
        assert [f.level for f in doctor.check_data(compose_train_config(words))] == levels
    assert "24 images, 3 classes, fewer than one step's trainer.global_batch_size=32" in str(
        doctor.check_data(compose_train_config(words))[0]
    )


def test_a_val_file_that_numbers_its_classes_otherwise_is_an_error_before_anything_is_submitted(tmp_path: Path) -> None:
    make_betons(make_folder(tmp_path / "folder"), tmp_path)
    manifest = manifest_path(tmp_path / "val.beton")
    manifest.write_text(manifest.read_text().replace("class_0", "zebra"))
    batch = ["trainer.global_batch_size=8", "trainer.micro_batch_size=4"]
    findings = doctor.check_data(compose_train_config([*TINY, *batch, "data=ffcv", f"data.path={tmp_path}"]))
    assert [f.level for f in findings] == ["ok", "error"] and "class 0 was 'class_0', is 'zebra'" in str(findings[1])


@pytest.mark.parametrize("name", ["val", "validation", "valid", "test"])
def test_data_is_looked_for_where_the_loader_takes_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for split in ("train", name):
        (tmp_path / "set" / split).mkdir(parents=True)
    for word in ("data.path=~/set", "data.path='~/set'"):  # as an unquoted word reaches us, and as a quoted one stays
        cfg = compose_train_config(["model=mambavision_nano", "data=folder", word])
        assert [f.level for f in doctor.check_data(cfg)] == ["ok", "ok"]
        assert str(tmp_path / "set" / name) in doctor.check_data(cfg)[1].message


def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = ["data=synthetic", "data.num_classes=10"]
    cfg = compose_train_config(["model=mambavision_l", *data, f"output_dir={tmp_path}"])
    size, count = doctor.planned_checkpoint_bytes(cfg)
    assert size == 16 * VARIANTS["mambavision_l"].params and count == 4  # two newest, the best, the one being written
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size * count - 1))
    assert doctor.check_disk(cfg).level == "error"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size * count + 1))
    assert doctor.check_disk(cfg).level == "warning"


def test_a_directory_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    finding = doctor.check_writing(tmp_path / "file")
    assert finding.level == "error" and "output_dir=DIR" in finding.cure


def test_a_world_that_does_not_divide_the_batch_is_an_error() -> None:
    finding = doctor.check_batch(compose_train_config(TINY), Plan(4, 8))
    assert finding.level == "error" and "nearest" in finding.message


def test_time_is_told_against_the_limit(tmp_path: Path) -> None:
    cfg = compose_train_config(["model=mambavision_t", f"data.path={tmp_path}"])
    told = doctor.check_time(cfg, Plan(4, 8, limit_seconds=3600)).message
    hours = 300 * sizing.IMAGENET_TRAIN_IMAGES / (32 * 6298 / 3) / 3600
    assert f"at least {hours:.1f} h" in told and f"at least {int(hours) + 1} allocations" in told
    given = doctor.check_time(cfg, Plan(4, 8, limit_seconds=3600), img_per_sec=32 * 6298 / 3).message
    assert f"about {hours:.1f} h" in given and "as given" in given
    assert doctor.check_time(cfg, Plan(1, 1, limit_seconds=60)).level == "warning"


def test_wandb_online_without_a_key_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    cfg = compose_train_config(["experiment=tiny", "logger.wandb=online"])
    assert doctor.check_wandb(cfg).level == "warning" and "wandb login" in doctor.check_wandb(cfg).cure
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password " + "x" * 40)
    (tmp_path / ".netrc").chmod(0o600)
    assert doctor.check_wandb(cfg).level == "ok"


def test_a_broken_scan_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = doctor_device.selective_scan_tokens

    def wrong(*args, backend: str):
        return honest(*args, backend=backend) * (1.0 if backend == "reference" else 1.2)

    monkeypatch.setattr(doctor_device, "selective_scan_tokens", wrong)
    levels = {f.name: f.level for f in doctor_device.check_scan()}
    assert levels["scan triton" if torch.cuda.is_available() else "scan cpu"] == "error"


# scripts/doctor.py on two hosts, where the second one's rank has found a GPU.
ON_TWO_HOSTS = """
import os
import sys
from dataclasses import replace

import torch

from data.manifest import manifest_path
from mambavision import distributed
from scripts import doctor

join, os.environ["SLURMD_NODENAME"] = distributed.init_world, "n" + os.environ["RANK"]


def init_world(*args, **timeouts):
    world = join("cpu", **timeouts)
    return replace(world, device=torch.device("cuda", 0)) if world.rank == 1 else world


distributed.init_world = init_world
sys.exit(doctor.main())
"""


@pytest.mark.slow
def test_a_host_whose_gpus_are_gone_is_named_and_no_rank_waits_for_it(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
    command = [sys.executable, "-c", ON_TWO_HOSTS, "--ranks", *TINY, f"output_dir={tmp_path}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(command, env=environment | {"RANK": rank}, stdout=subprocess.PIPE, text=True) for rank in "01"
    ]
    try:
        output = [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [1, 1]
    assert "1 of 1 ranks here have no CUDA device" in output[0] and "hosts with errors: n0 (" in output[0], output[0]
    assert "all-reduce" not in output[0] and "loader" not in output[0]


@pytest.mark.parametrize(
    ("word", "told"),
    [("logger=jsonl", "error: WORLD_SIZE=2 is set, but not RANK"), ("x=1", "error: there is no setting")],
)
def test_what_cannot_start_is_said_without_a_traceback(
    word: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Some clusters set WORLD_SIZE for every program, also for a doctor that is started by hand."""
    from scripts.doctor import main

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["doctor.py", *TINY, word])
    with pytest.raises(SystemExit, match="^2$"):
        main()
    assert capsys.readouterr().err.startswith(told)


@pytest.mark.parametrize("ranks", [1, 2])
def test_more_ranks_than_gpus_or_a_dead_gpu_is_an_error(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def dead(_: int) -> None:
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nCompile with ...")

    for name, value in {"is_available": lambda: True, "device_count": lambda: 1, "get_device_properties": dead}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    cfg = compose_train_config([*TINY, "trainer.device=auto"])
    messages = [f.message for f in doctor_device.check_torch(cfg) if f.level == "error"]
    assert messages[-1] == "0: does not answer (CUDA error: uncorrectable ECC error encountered)"
    assert messages[:-1] == ["2 ranks here, but only 1 CUDA devices"] * (ranks - 1)


def test_the_loader_rate_is_compared_with_what_is_needed() -> None:
    cfg = compose_train_config(TINY)
    world = distributed.World(0, 1, 0, 1, torch.device("cpu"))
    for needed, level in ((1.0, "ok"), (1e9, "warning"), (None, "ok")):
        assert doctor_device.check_loader(cfg, world, Plan(1, 2), needed).level == level


def test_an_image_with_a_broken_ffcv_is_not_built(tmp_path: Path) -> None:
    steps = (ROOT / "Dockerfile").read_text().split("COPY . .\n")[1]
    (check,) = re.findall(r"^RUN ((?:.*\\\n)*.*)", steps, re.MULTILINE)
    (tmp_path / "ffcv.py").write_text("raise ImportError('libopencv_core.so: no such file')\n")
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "python").chmod(0o755)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    built = subprocess.run(
        ["bash", "-c", check], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert built.returncode != 0 and "libopencv_core.so" in built.stderr


@pytest.mark.slow
def test_the_sizing_table_is_what_the_model_keeps() -> None:
    size = sizing.SIZES["mambavision_t"]
    assert sizing.saved_mib_per_image("mambavision_t", "fp32") == pytest.approx(2 * size.saved_mib, rel=0.05)


def test_a_node_without_a_c_compiler_is_told_what_that_costs(monkeypatch, tmp_path: Path) -> None:
    cfg = compose_train_config(["data=synthetic"])
    assert doctor_device._compiler(cfg) == []
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    (finding,) = doctor_device._compiler(cfg)
    assert finding.level == "warning" and "no C compiler" in finding.message and "gcc" in finding.cure
