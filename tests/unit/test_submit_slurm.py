"""What sbatch is told, and that a point's settings reach train.py unharmed by two shells."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mambavision.cluster import points, slurm
from scripts import submit as submit_script

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
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and told in done.stderr, done.stderr


@pytest.mark.parametrize("place", ["plain", "a slurm/of mine", "my space/mv repo"])
def test_the_script_finds_its_repository_wherever_that_is(place: str, tmp_path: Path) -> None:
    repository = tmp_path / place
    (repository / "mambavision").mkdir(parents=True)
    (repository / "train.py").touch()
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(
        f"#!/bin/bash\necho '   Command={repository}/slurm/train.sbatch data.path=/a/slurm/b run_name=a b'\n"
    )
    scontrol.chmod(0o755)
    function = f'eval "$(sed -n "/^find_root() {{/,/^}}/p" {slurm.BATCH_SCRIPT})"; find_root'
    environment = {"PATH": f"{scontrol.parent}:/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", function], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == str(repository), done.stderr


@pytest.mark.parametrize(
    ("words", "env", "ranks"),
    [
        ([], {}, 8),
        (["--gpus-per-node=4"], {}, 4),
        (["--gpus-per-node=a100:2"], {}, 2),
        (["--gpus-per-node=4"], {"NPROC_PER_NODE": "3"}, 3),
        (["--nproc-per-node=5"], {"NPROC_PER_NODE": "3"}, 5),
    ],
)
def test_a_job_is_checked_for_the_ranks_it_will_have(
    words: list[str], env: dict[str, str], ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NPROC_PER_NODE", raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    args, options = submit_script.parse(words)
    assert submit_script.ranks_per_node(args, options) == ranks


def test_the_scripts_own_numbers_are_read_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (slurm.script_default("nodes"), slurm.script_default("gpus-per-node")) == ("4", "8")
    monkeypatch.setattr(slurm, "BATCH_SCRIPT", tmp_path / "mine.sbatch")
    slurm.BATCH_SCRIPT.write_text("#!/bin/bash\n#SBATCH --nodes=2 # ours has two\n")
    assert slurm.script_default("nodes") == "2"
    with pytest.raises(ValueError, match="has no line #SBATCH --gpus-per-node=N; give --gpus-per-node=N"):
        slurm.script_default("gpus-per-node")


@pytest.mark.slow
def test_another_clones_code_is_not_submitted_without_a_word(tmp_path: Path) -> None:
    script = tmp_path / "scripts" / "submit.py"
    script.parent.mkdir()
    script.write_text((slurm.ROOT / "scripts" / "submit.py").read_text())
    environment = os.environ | {"PYTHONPATH": str(slurm.ROOT)}
    command = [sys.executable, str(script), "experiment=tiny", "--local", "--check"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and f"imports is that of {slurm.ROOT}; use the .venv of {tmp_path}" in done.stderr
