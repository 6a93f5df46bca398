"""Many faults over one run: whatever happens and however often, it arrives where the undisturbed run arrives."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from mambavision.run_history import starts
from tests.faults.harness import Trainer, state_hash, valid_steps

FAULTS = 30
# More epochs and checkpoints than the other tests have, so that thirty faults find a place.
SETTINGS = ("trainer.epochs=24", "checkpoint.every_steps=2", "max_restarts_without_progress=100")


def draw(random_: random.Random, start: int, total: int) -> str:
    """A fault that a run can go on after, at one of the next steps."""
    step = min(start + random_.randrange(0, 5), total - 1)
    rank = random_.randrange(2)
    saved = min((step + 1) // 2 * 2, total)
    fault = random_.choice(
        [
            f"kill@{step}:{rank}",
            f"kill@{step}",
            f"raise@{step}:{rank}",
            f"raise@{step}:{rank}/data",
            f"exit@{step}:{rank}",
            f"usr@{step}:{rank}",
            f"term@{step}",
            f"sleep0.3@{step}:{rank}",
            *(f"kill@{saved}:0/{place}" for place in ("copy", "open", "payload", "fsync", "rename", "retain", "saved")),
            f"kill@{(step // 8 + 1) * 8}:{rank}/evaluate",
        ]
    )
    # The kill is for faults that let the run go on, or that found nothing to strike.
    return f"{fault},kill@{min(step + 5, total - 1)}"


@pytest.mark.faults
@pytest.mark.slow
def test_thirty_random_faults_later_the_weights_are_the_same(train: Trainer, capsys: pytest.CaptureFixture) -> None:
    random_ = random.Random(2024)
    undisturbed = train.run("undisturbed", *SETTINGS)
    assert undisturbed.code == 0
    total = 24 * 8
    ordered = []
    start = 0
    while len(ordered) < FAULTS:
        fault = draw(random_, start, total)
        ordered.append(fault)
        training = train.start("run", *SETTINGS, fault=fault)
        if random_.random() < 0.2:  # some faults come from outside, at any instant
            time.sleep(random_.uniform(0.5, 3.0))
            if training.poll(0) is None:
                training.kill()
                training.wait_for_ranks()
                ordered[-1] = "kill from outside"
        code = training.wait()
        assert code in (0, 1, -signal.SIGKILL), f"{fault}: {code}\n{training.output[-3000:]}"
        before, start = start, max(valid_steps(training.directory), default=0)
        assert start >= before, f"{fault} has lost a checkpoint"
        assert training.status["status"] != "finished", "the run is too short for so many faults"
    final = train.run("run", *SETTINGS)
    assert final.code == 0
    assert state_hash(final.directory) == state_hash(undisturbed.directory)
    history = starts(final.directory)
    done = sum(s.last_step - s.step for s in history)
    with capsys.disabled():
        print(
            f"\n{len(ordered)} faults, {len(history)} starts, {done} steps done for {total}: "
            f"{100 * total / done:.0f} % useful"
        )


@pytest.mark.faults
@pytest.mark.slow
def test_fifty_kills_at_random_instants_over_real_images_lose_nothing(train_ffcv: Trainer, fashion_mnist) -> None:
    """SIGKILL to everything, at instants drawn in advance, checkpoint writes included; .beton files of
    Fashion-MNIST."""
    kills, steps = int(os.environ.get("MAMBAVISION_KILLS", "50")), 300
    settings = (
        "data=ffcv",
        "data.num_classes=null",
        f"data.path={fashion_mnist}",
        "augment=small_images",
        "trainer.epochs=1",
        f"trainer.max_steps={steps}",
        "trainer.global_batch_size=32",
        "trainer.micro_batch_size=16",
        "trainer.eval_batch_size=500",
        "checkpoint.every_steps=2",
        "checkpoint.keep_last=3",
        "max_restarts_without_progress=100",
    )
    random_ = random.Random(7)
    undisturbed = train_ffcv.run("undisturbed", *settings, ranks=1, timeout=400)
    assert undisturbed.code == 0, undisturbed.output
    best, killed, in_a_write = 0, 0, 0

    def partial_files() -> set[Path]:
        return set((train_ffcv.output_dir / "run/checkpoints").glob("*.tmp"))

    while killed < kills:
        litter = partial_files()  # of the write that was killed before
        # Each write lasts a tenth of a second longer, so that it can be met.
        training = train_ffcv.start("run", *settings, ranks=1, fault=f"sleep0.1@0-{steps}/fsync")
        # Half of them as soon as a checkpoint is being written, the others after a random while.
        if killed % 2:
            deadline = time.monotonic() + 20
            while not partial_files() - litter and time.monotonic() < deadline:
                if training.poll(0.0005) is not None:
                    break
            in_a_write += bool(partial_files() - litter)
        else:
            training.wait_for_step(best + random_.randrange(0, 8))
            time.sleep(random_.uniform(0.0, 0.2))
        training.kill()
        training.wait()
        training.wait_for_ranks()
        killed += 1
        valid = valid_steps(training.directory)
        assert max(valid, default=0) >= best, "a valid checkpoint was lost"
        best = max(valid, default=0)
        if best == steps:
            break
    assert killed == kills, f"the run was over after {killed} kills"
    final = train_ffcv.run("run", *settings, ranks=1, timeout=400)
    assert final.code == 0
    assert state_hash(final.directory) == state_hash(undisturbed.directory)
    print(f"{killed} kills, {in_a_write} of them in a write, at steps up to {best} of {steps}")
