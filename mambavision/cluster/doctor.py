"""Pre-flight checks that need no device and no data loader: what is installed, what is on disk, whether it can fit.

Each check returns findings; one is ok, a warning (the run will work, but) or an error (it will not), with the cure.
`doctor_device` holds the checks that compute. scripts/doctor.py runs and prints them all.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mambavision.batch_plan import batch_plan
from mambavision.cluster import sizing
from mambavision.config import TrainConfig
from mambavision.config_checks import ConfigError
from mambavision.models.variants import VARIANTS
from mambavision.run_dir import run_directory
from mambavision.telemetry.wandb_mode import wandb_mode


@dataclass(frozen=True)
class Finding:
    level: str  # ok | warning | error
    name: str  # what was looked at
    message: str  # what was found
    cure: str = ""  # what to do about it
    host: str = ""  # where, if it concerns one node

    def line(self) -> str:
        where = f" [{self.host}]" if self.host else ""
        return f"{self.level:<8}{self.name:<18}{self}{where}"

    def __str__(self) -> str:
        return f"{self.message}; {self.cure}" if self.cure else self.message


def has_error(findings: Iterable[Finding]) -> bool:
    return any(f.level == "error" for f in findings)


@dataclass(frozen=True)
class Plan:
    """The job that a run is checked for."""

    nodes: int = 1
    nproc_per_node: int = 1
    limit_seconds: float | None = None  # of the job; None: no limit known

    @property
    def world_size(self) -> int:
        return self.nodes * self.nproc_per_node


def before_submission(cfgs: Sequence[TrainConfig]) -> list[Finding]:
    """What can be told on a login node, for all points of a sweep at once; each finding once."""
    findings = []
    for cfg in cfgs:
        findings += [*check_data(cfg), check_disk(cfg), check_writing(Path(cfg.output_dir)), check_wandb(cfg)]
    return list(dict.fromkeys(findings))


def check_run(cfg: TrainConfig, plan: Plan) -> list[Finding]:
    """What can be told on the machine that is to run it, but for what computes: `doctor_device` has that."""
    return [
        check_python(),
        *check_packages(),
        check_ffcv(cfg),
        *check_data(cfg),
        check_batch(cfg, plan),
        check_disk(cfg),
        check_writing(Path(run_directory(cfg))),
        check_wandb(cfg),
    ]


def check_python() -> Finding:
    return Finding("ok", "python", f"{platform.python_version()} on {platform.machine()}, {sys.prefix}")


_NEEDED = ("torch", "timm", "hydra-core", "omegaconf")
_WANTED = ("torchvision", "wandb", "ffcv", "numba")


def check_packages() -> list[Finding]:
    found, missing = [], []
    for package in (*_NEEDED, *_WANTED):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            level = "error" if package in _NEEDED else "warning"
            missing.append(Finding(level, "packages", f"no {package}", "run scripts/setup.sh"))
    return [*missing, Finding("ok", "packages", ", ".join(found))]


def check_ffcv(cfg: TrainConfig) -> Finding:
    if cfg.data.source != "ffcv":
        return Finding("ok", "ffcv", f"not needed: data={cfg.data.source}")
    try:
        import ffcv  # noqa: F401
        from ffcv import libffcv  # noqa: F401
    except (ImportError, OSError) as error:
        cure = "run scripts/setup.sh, which builds it, or use data=folder"
        return Finding("error", "ffcv", f"does not load ({first_line(error)})", cure)
    if cfg.data.decoder == "stock":
        return Finding("warning", "ffcv", "data.decoder=stock is not reproducible", "data.decoder=native is")
    from data.native_library import NativeUnavailable, load_library

    try:
        load_library()
    except NativeUnavailable as error:
        return Finding("warning", "ffcv", f"loads without its keyed decoder: {first_line(error)}", "see docs/data.md")
    return Finding("ok", "ffcv", "loads, keyed decoder built")


def check_data(cfg: TrainConfig) -> list[Finding]:
    """The files are there and are those of their manifest (index only; scripts/check_data.py decodes every sample)."""
    data = cfg.data
    if data.source == "synthetic":
        return [Finding("ok", "data", "synthetic")]
    root = _data_directory(cfg)
    if not root.is_dir():
        cure = "scripts/prepare_data.py writes one"
        return [Finding("error", "data", f"data.path={root} is no directory here", cure)]
    if data.source == "folder":
        return [_check_split_folder(root, split) for split in ("train", "val")]
    from data.beton import open_beton
    from data.manifest import check_numbering, verify

    findings = []
    for split in ("train", "val"):
        path = root / f"{split}.beton"
        try:
            manifest = verify(open_beton(path))
            check_numbering(path, manifest)
        except (ValueError, OSError) as error:
            findings.append(Finding("error", "data", first_line(error), "write it again with scripts/prepare_data.py"))
            continue
        told = f"{path}: {manifest.num_samples:,} images, {len(manifest.classes)} classes"
        batch = cfg.trainer.global_batch_size
        if split == "train" and manifest.num_samples < batch:
            told = f"{told}, fewer than one step's trainer.global_batch_size={batch}"
            findings.append(Finding("error", "data", told, "take a smaller one, and a learning rate for it"))
            continue
        findings.append(Finding("ok", "data", told))
    return findings


def _check_split_folder(root: Path, split: str) -> Finding:
    from data.datasets import find_split

    try:
        return Finding("ok", "data", f"{find_split(root, split)} for {split}")
    except ValueError as error:
        return Finding("error", "data", str(error), "give the directory above the splits")


def _data_directory(cfg: TrainConfig) -> Path:
    return Path(cfg.data.path or "").expanduser()


def planned_checkpoint_bytes(cfg: TrainConfig) -> tuple[int, int]:
    """(bytes of one checkpoint, how many are held at the peak: those kept, the best, and the one being written)."""
    params = VARIANTS[cfg.model.name].params if cfg.model.name in VARIANTS else 50_000_000
    t, c = cfg.trainer, cfg.checkpoint
    kept_for_ever = (t.epochs + cfg.schedule.cooldown_epochs) // c.keep_every_epochs if c.keep_every_epochs else 0
    return sizing.checkpoint_bytes(params), c.keep_last + int(c.keep_best) + kept_for_ever + 1


def check_disk(cfg: TrainConfig) -> Finding:
    directory = _existing_parent(Path(cfg.output_dir))
    size, count = planned_checkpoint_bytes(cfg)
    free, needed = shutil.disk_usage(directory).free, size * count
    told = f"{needed / sizing.GIB:.1f} GiB for {count} checkpoints; {free / sizing.GIB:.1f} GiB free in {directory}"
    if free < needed:
        return Finding("error", "disk", told, "free space, give another output_dir=DIR, or checkpoint.keep_last=1")
    if free < 2 * needed:
        return Finding("warning", "disk", told, "that is little; other users' quota may end the run")
    return Finding("ok", "disk", told)


def check_writing(directory: Path) -> Finding:
    """Write, fsync, rename and read back, as a checkpoint does."""
    existing = _existing_parent(directory)
    start = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory(dir=existing, prefix=".doctor-") as temporary:
            path = Path(temporary) / "probe.tmp"
            with open(path, "wb") as file:
                file.write(os.urandom(1 << 20))
                file.flush()
                os.fsync(file.fileno())
            os.replace(path, path.with_suffix(".pt"))
            if path.with_suffix(".pt").stat().st_size != 1 << 20:
                told = f"{existing} does not keep what is written"
                return Finding("error", "run directory", told, "use another file system")
    except OSError as error:
        told = f"cannot write in {existing}: {error.strerror}"
        return Finding("error", "run directory", told, "give another: output_dir=DIR")
    seconds = time.perf_counter() - start
    if seconds > 5:
        told = f"1 MiB took {seconds:.1f} s in {existing}"
        return Finding("warning", "run directory", told, "put output_dir on a faster disk")
    return Finding("ok", "run directory", f"write, fsync, rename in {existing}: {1000 * seconds:.0f} ms")


def check_batch(cfg: TrainConfig, plan: Plan) -> Finding:
    t = cfg.trainer
    try:
        return Finding("ok", "batch", str(batch_plan(t.global_batch_size, t.micro_batch_size, plan.world_size)))
    except ConfigError as error:
        return Finding("error", "batch", str(error))


def check_time(cfg: TrainConfig, plan: Plan, img_per_sec: float | None = None) -> Finding:
    """Expected duration, a lower bound unless img_per_sec (of the whole job) is known, against the job's limit."""
    rate = img_per_sec or (sizing.expected_train_img_per_sec(cfg.model.name) or 0) * plan.world_size
    on_cpu = cfg.trainer.device == "cpu" and not img_per_sec
    if on_cpu or not rate or cfg.data.source == "synthetic":
        return Finding("ok", "time", "no expectation for this model on this device; the log's eta tells")
    images = train_images(cfg)
    total = sizing.hours((cfg.trainer.epochs + cfg.schedule.cooldown_epochs) * images, rate)
    if img_per_sec:
        about, source = "about", "as given"
    else:  # docs/cluster.md, "How large, how long"
        about, source = "at least", "a third of the published inference rate; plan with one and a half times the hours"
    told = f"{about} {total:.1f} h at {rate:.0f} img/s ({source})"
    if plan.limit_seconds is None:
        return Finding("ok", "time", told)
    allocations = total * 3600 / max(plan.limit_seconds, 1)
    told += f"; the limit is {plan.limit_seconds / 3600:.1f} h"
    if allocations > 1:
        told += f", so {about} {int(allocations) + 1} allocations, each continuing the last"
    if allocations <= 20:
        return Finding("ok", "time", told)
    return Finding("warning", "time", told, "ask for a longer limit or more nodes")


def train_images(cfg: TrainConfig) -> int:
    manifest = _data_directory(cfg) / "train.beton.json"
    if cfg.data.source == "ffcv" and manifest.is_file():
        return int(json.loads(manifest.read_text())["num_samples"])
    return cfg.data.synthetic_train_samples if cfg.data.source == "synthetic" else sizing.IMAGENET_TRAIN_IMAGES


def check_wandb(cfg: TrainConfig) -> Finding:
    mode = wandb_mode(cfg.logger)
    if mode == "off":
        return Finding("ok", "wandb", "off; metrics.jsonl has everything")
    if mode == "offline":
        return Finding("ok", "wandb", "offline; later: wandb sync RUN_DIRECTORY/wandb/offline-run-*")
    if os.environ.get("WANDB_API_KEY") or _has_netrc_entry(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")):
        return Finding("ok", "wandb", "a key is set; without a network the run logs offline")
    level = "warning" if mode == "online" else "ok"
    return Finding(level, "wandb", "no key: the run will log offline", "wandb login, or set WANDB_API_KEY")


def _has_netrc_entry(url: str) -> bool:
    import netrc
    from urllib.parse import urlparse

    try:
        return netrc.netrc().authenticators(urlparse(url).hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def job_limit_seconds() -> float | None:
    """Until the SLURM job that this process is part of reaches its limit."""
    end = os.environ.get("SLURM_JOB_END_TIME")
    return float(end) - time.time() if end else None


def host() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _existing_parent(directory: Path) -> Path:
    directory = directory.absolute()
    while not directory.exists():
        directory = directory.parent
    return directory


def first_line(error: Exception) -> str:
    """Of its message; its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
