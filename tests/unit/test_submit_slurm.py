"""What sbatch is told, and that a point's settings reach train.py unharmed by two shells."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mambavision.cluster import points, slurm

WORDS = [
    "experiment=tiny",
    'run_name="it\'s a $HOME test"',
    "model.architecture.depths=[1,1,2,2],[1,1,1,1]",
    "data.path=/a b",
]


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for sbatch that notes its arguments and answers like one of a federation."""
    tool = tmp_path / "bin" / "sbatch"
    tool.parent.mkdir()
    tool.write_text(
        f'#!/bin/bash\nprintf "%s\\n" "$@" > {tmp_path}/arguments\n'
        f'echo "$NPROC_PER_NODE" > {tmp_path}/nproc\necho "17;west"\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin")
    return tmp_path


def submit(directory: Path, chosen: list[points.Point], limit: int | None = 2) -> list[str]:
    environment = {"NPROC_PER_NODE": "3"}
    return slurm.submit(chosen, options=["--time=5"], environment=environment, directory=directory, max_running=limit)


def test_a_sweep_becomes_one_array_with_a_limit(sbatch: Path) -> None:
    chosen = points.expand(WORDS)
    assert submit(sbatch / "sweep", chosen) == ["17_0", "17_1"]
    arguments = (sbatch / "arguments").read_text().splitlines()
    assert "--array=0-1%2" in arguments and "--time=5" in arguments and str(slurm.BATCH_SCRIPT) in arguments
    assert arguments[-2:] == ["--points", str(sbatch / "sweep" / "points-1.txt")]
    assert (sbatch / "nproc").read_text().strip() == "3"


def test_a_line_of_the_points_file_is_the_command_line_again_after_the_shell(sbatch: Path) -> None:
    chosen = points.expand(WORDS)
    submit(sbatch / "sweep", chosen)
    for index, point in enumerate(chosen):
        line = f'line=$(sed -n {index + 1}p {sbatch}/sweep/points-1.txt); eval "set -- $line"; printf "%s\\n" "$@"'
        words = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout.splitlines()
        assert words == list(point.overrides)
        assert points.single(words).cfg == point.cfg


def test_a_second_submission_leaves_the_first_ones_file_alone(sbatch: Path) -> None:
    chosen = points.expand(WORDS)
    submit(sbatch / "sweep", chosen)
    before = (sbatch / "sweep" / "points-1.txt").read_text()
    submit(sbatch / "sweep", chosen[1:], limit=None)
    assert (sbatch / "sweep" / "points-1.txt").read_text() == before
    assert len((sbatch / "sweep" / "points-2.txt").read_text().splitlines()) == 1
    assert "--array=0-0" in (sbatch / "arguments").read_text().splitlines()


def test_a_refusal_of_sbatch_is_passed_on(sbatch: Path) -> None:
    (sbatch / "bin" / "sbatch").write_text(
        "#!/bin/bash\necho 'sbatch: error: invalid partition specified: gpux' >&2; exit 1\n"
    )
    with pytest.raises(RuntimeError, match=r"sbatch refuses: .*invalid partition"):
        submit(sbatch / "sweep", points.expand(WORDS))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["-p", "gpu"], "-p: write sbatch's options by their long names, as --partition=gpu"),
        (["-t10"], "-t10: write sbatch's options by their long names"),
        (["--partition", "gpu"], "--partition gpu: write it as one word, --partition=gpu"),
        (["gpu"], "cannot read 'gpu'"),
        (["--exclusive", "-m", "seed=0,1", "--", "gpu"], "cannot read 'gpu'"),
    ],
)
def test_an_option_that_sbatch_would_not_get_is_answered_with_how_to_write_it(words: list[str], told: str) -> None:
    command = [sys.executable, str(slurm.ROOT / "scripts" / "submit.py"), "experiment=tiny", *words]
    environment = os.environ | {"PYTHONPATH": str(slurm.ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and told in done.stderr, done.stderr
