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
_CODE = ("*.py", "*.yaml", "*.yml", "*.toml", "*.cpp", "*.h", "*.cu", "*.sh", "*.sbatch")  # data may lie in a clone too
_GIT_SECONDS = 20.0  # for each command; a clone on a network file system may take some
_LARGEST_DIFF = 4 << 20  # bytes; more is no change of code


def record(run_directory: Path) -> dict[str, Any]:
    """The card of this start; writes code/<hash>.diff below the run directory where there are uncommitted changes.

    Keys: command, code (the revision's 40 digits or None), uncommitted (that file's path in the run directory or
    None), python, packages (name -> version, of those that are installed).
    """
    revision, diff = code_state(_ROOT)
    uncommitted = None
    if diff:
        uncommitted = f"code/{hashlib.sha256(diff.encode()).hexdigest()[:12]}.diff"
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


def code_state(root: Path) -> tuple[str | None, str]:
    """The revision that is checked out at `root`, and the difference of the working tree's code from it.

    (None, "") where the code is not under git's eyes: a package installed within somebody else's clone, for instance.
    """
    if _git(root, "ls-files", "--error-unmatch", "mambavision/__init__.py") is None:
        return None, ""
    revision = (_git(root, "rev-parse", "HEAD") or "").strip() or None
    index = _git(root, "rev-parse", "--git-path", "index")
    if revision is None or index is None:
        return revision, ""
    with tempfile.TemporaryDirectory() as scratch:
        # New files belong to the changes; they are announced in a copy of the index, the clone's own stays as it is.
        copy = Path(shutil.copy(root / index.strip(), scratch))
        with_new_files = os.environ | {"GIT_INDEX_FILE": str(copy)}
        new_files = (_git(root, "ls-files", "--others", "--exclude-standard", "-z", "--", *_CODE) or "").split("\0")[
            :-1
        ]
        if new_files:
            _git(root, "add", "--intent-to-add", "--", *new_files, env=with_new_files)
        diff = _git(root, "diff", "HEAD", "--no-color", "--no-ext-diff", "--", *_CODE, env=with_new_files)
    return revision, diff if diff and len(diff) <= _LARGEST_DIFF else ""


def _git(root: Path, *arguments: str, env: dict[str, str] | None = None) -> str | None:
    """Its output, or None where it failed, took too long or is not there."""
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_GIT_SECONDS, env=env)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _keep(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            write_atomically(path, text)
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
