"""The card of a start: which code, with which changes. On real clones."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from mambavision import provenance

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


def git(root: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=A", "-c", "user.email=a@example.org")
    return subprocess.run(
        ["git", "-C", str(root), *identity, *arguments], check=True, capture_output=True, text=True
    ).stdout


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    root = tmp_path / "clone"
    (root / "mambavision").mkdir(parents=True)
    (root / "mambavision" / "__init__.py").write_text("one = 1\n")
    git(tmp_path, "init", "-q", str(root))
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "first")
    return root


def test_a_clean_clone_is_its_revision(clone: Path):
    assert provenance.code_state(clone) == (git(clone, "rev-parse", "HEAD").strip(), b"")


def test_the_diff_brings_a_clean_clone_to_the_code_that_ran_new_files_included(clone: Path, tmp_path: Path):
    (clone / "mambavision" / "__init__.py").write_text("one = 2\n")
    (clone / "mambavision" / "idea.py").write_bytes(b"new = True\r\n")
    (clone / "images.bin").write_bytes(b"no code" * 100)
    (clone / "experiments").mkdir()
    (clone / "experiments" / "config.yaml").write_text("of: a run\n")
    git(clone, "config", "diff.noprefix", "true")
    status = git(clone, "status", "--porcelain")

    _, diff = provenance.code_state(clone)

    (tmp_path / "changes.diff").write_bytes(diff)
    git(tmp_path, "clone", "-q", str(clone), "again")
    git(tmp_path / "again", "apply", str(tmp_path / "changes.diff"))
    assert (tmp_path / "again" / "mambavision" / "__init__.py").read_text() == "one = 2\n"
    assert (tmp_path / "again" / "mambavision" / "idea.py").read_bytes() == b"new = True\r\n"
    assert b"images.bin" not in diff and b"config.yaml" not in diff
    assert git(clone, "status", "--porcelain") == status, "the user's index stays as it was"


def test_a_change_of_equal_size_in_the_second_of_the_commit_is_seen(clone: Path):
    """Git takes a file for unchanged by its size and time, unless the index is not newer than the file."""
    file, second = clone / "mambavision" / "__init__.py", (1_700_000_000, 1_700_000_000)
    git(clone, "config", "core.trustctime", "false")  # that time cannot be set
    os.utime(file, second)
    git(clone, "update-index", "--refresh")
    os.utime(clone / ".git" / "index", second)
    file.write_text("one = 2\n")
    os.utime(file, second)

    assert b"+one = 2" in provenance.code_state(clone)[1]


def test_code_that_lies_in_somebody_elses_clone_has_no_revision(clone: Path):
    package = clone / ".venv" / "site-packages"
    package.mkdir(parents=True)
    assert provenance.code_state(package) == (None, b"")


def test_changes_that_cannot_be_told_do_not_end_a_start_and_are_not_taken_for_none(
    clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(provenance, "_ROOT", clone)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "away"))  # as a full /tmp, which Python does not use then
    assert provenance.record(tmp_path)["uncommitted"] == "changes that were not kept"


def test_the_uncommitted_changes_are_kept_with_the_run(clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(provenance, "_ROOT", clone)
    assert provenance.record(tmp_path)["uncommitted"] is None
    (clone / "mambavision" / "__init__.py").write_text("one = 2\n")

    card = provenance.record(tmp_path)

    assert "+one = 2" in (tmp_path / card["uncommitted"]).read_text()
    assert provenance.record(tmp_path)["uncommitted"] == card["uncommitted"], "the same changes, the same file"


def test_what_changed_between_two_starts_is_told():
    before = {"code": "a" * 40, "uncommitted": None, "python": "3.11.2", "packages": {"torch": "2.10", "ffcv": "1.0"}}
    after = {"code": "a" * 40, "uncommitted": "code/0.diff", "python": "3.11.2", "packages": {"torch": "2.11"}}

    assert provenance.differences(before, before | {"command": "other"}) == []
    assert provenance.differences(before, after) == [
        f"code {'a' * 10} -> {'a' * 10} with code/0.diff",
        "ffcv 1.0 -> absent",
        "torch 2.10 -> 2.11",
    ]
