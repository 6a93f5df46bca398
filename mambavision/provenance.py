"""Where weights come from besides their settings: the code's revision with what was not committed, versions, command.

The card goes into every checkpoint and every `start` event. Uncommitted changes lie in the run directory as a file that
`git apply` takes. Where there is no git, or the code is no clone, the revision is None: training needs neither.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mambavision.run_dir import write_atomically

_ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("torch", "torchvision", "timm", "numpy", "hydra-core", "ffcv", "triton", "mamba-ssm")
# Data and runs, each with its config.yaml, may lie in a clone too.
_CODE = ("*.py", "conf/*.yaml", "*.toml", "*.cpp", "*.h", "*.cu", "*.sh", "*.sbatch")
_GIT_SECONDS = 20.0  # for each command; a clone on a network file system may take some
_LARGEST_DIFF = 4 << 20  # bytes; more is no change of code


def record(run_directory: Path) -> dict[str, Any]:
    """The card of this start; writes code/<hash>.diff below the run directory where there are uncommitted changes.

    Keys: command, code (the revision's 40 digits or None), uncommitted (that file's path in the run directory, None
    without changes), python, packages (name -> version, of those that are installed).
    """
    revision, diff = code_state(_ROOT)
    uncommitted = "changes that were not kept" if diff is None else None
    if diff:
        uncommitted = f"code/{hashlib.sha256(diff).hexdigest()[:12]}.diff"
        _keep(run_directory / uncommitted, diff)
    return {
        "command": shlex.join(sys.argv),
        "code": revision,
        "uncommitted": uncommitted,
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
    }


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Between two cards, for a reader: "torch 2.10.0 -> 2.11.0". The command may differ, config.yaml compares that."""
    changes = []
    code = [_code_name(card) for card in (before, after)]
    if before.get("code") and after.get("code") and code[0] != code[1]:
        changes.append(f"code {code[0]} -> {code[1]}")
    versions = [{"python": card.get("python"), **card.get("packages", {})} for card in (before, after)]
    for name in sorted({*versions[0], *versions[1]}):
        old, new = (v.get(name) for v in versions)
        if old != new:
            changes.append(f"{name} {old or 'absent'} -> {new or 'absent'}")
    return changes


def code_state(root: Path) -> tuple[str | None, bytes | None]:
    """The revision that is checked out at `root`, and the working tree's code as a difference from it.

    (None, b"") where the code is not under git's eyes: a package installed within somebody else's clone, for instance.
    The difference is None where git does not give it or it is too large.
    """
    if _git(root, "ls-files", "--error-unmatch", "mambavision/__init__.py") is None:
        return None, b""
    revision, index = _git(root, "rev-parse", "HEAD"), _git(root, "rev-parse", "--git-path", "index")
    if revision is None or index is None:
        return None, b""
    try:
        diff = _difference(root, root / os.fsdecode(index.strip()))
    except OSError:  # a full /tmp must not end a training
        diff = None
    return revision.strip().decode(), diff if diff is None or len(diff) <= _LARGEST_DIFF else None


def _difference(root: Path, index: Path) -> bytes | None:
    """New files belong to it; they are announced in a copy of the index, the clone's own stays as it is."""
    with tempfile.TemporaryDirectory() as scratch:
        # With its time (copy2), by which git knows the files that changed in the second in which the index was written.
        with_new_files = os.environ | {"GIT_INDEX_FILE": str(shutil.copy2(index, scratch))}
        listed = _git(root, "ls-files", "--others", "--exclude-standard", "-z", "--", *_CODE) or b""
        if new_files := [os.fsdecode(name) for name in listed.split(b"\0") if name]:
            _git(root, "add", "--intent-to-add", "--", *new_files, env=with_new_files)
        form = ("--no-color", "--no-ext-diff", "--src-prefix=a/", "--dst-prefix=b/")  # whatever the user's git says
        return _git(root, "diff", "HEAD", *form, "--", *_CODE, env=with_new_files)


def _git(root: Path, *arguments: str, env: dict[str, str] | None = None) -> bytes | None:
    """Its output, or None where it failed, took too long or is not there."""
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_GIT_SECONDS, env=env)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _keep(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            write_atomically(path, content)
    except OSError as error:
        print(f"warning   {path} cannot be written: {error.strerror}", file=sys.stderr, flush=True)


def _code_name(card: dict[str, Any]) -> str:
    revision = str(card.get("code"))[:10]
    return f"{revision} with {card['uncommitted']}" if card.get("uncommitted") else revision


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
