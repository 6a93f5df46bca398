"""Notices, non-finite steps, collapse, stalls: the parts; real processes are in tests/faults."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from mambavision.config import GuardConfig, WatchdogConfig
from mambavision.distributed import BatchNormAverager, World
from mambavision.engine import faults
from mambavision.engine.debug_nan import name_first_not_finite
from mambavision.engine.guard import Guard, TrainingFailed
from mambavision.engine.losses import blind_guess
from mambavision.engine.progress import TrainProgress
from mambavision.engine.stop import Decision, Meetings, StopNotice
from mambavision.engine.watchdog import Watchdog, read_heartbeats
from tests.unit.model_samples import micro

WORLD = World(0, 1, 0, 1, torch.device("cpu"))
NAN, FINE = torch.tensor(torch.nan), torch.tensor(1.0)


def guard(**settings: object) -> Guard:
    return Guard(GuardConfig(**settings), num_classes=10, device=torch.device("cpu"), capacity=10)


def observe(guard: Guard, first: int, norms: list[torch.Tensor]) -> None:
    for step, norm in enumerate(norms, first):
        guard.observe(step, norm, norm)


def test_ctrl_c_is_answered_and_the_third_ends_at_once(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    with StopNotice(WORLD, tmp_path / "STOP") as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.agreed() is Decision.STOP
        assert capfd.readouterr().err.count("the run ends at the next step, saved") == 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_refusals_in_a_row_are_counted_across_readings() -> None:
    watched = guard(max_skipped_steps=4)
    observe(watched, 0, [FINE, NAN, FINE, NAN, NAN])
    refused = watched.read()
    assert (refused.steps, refused.in_a_row, watched.wants_rollback(refused)) == ([1, 3, 4], 2, False)
    observe(watched, 5, [NAN, NAN])
    refused = watched.read()
    assert (refused.steps, refused.in_a_row, watched.wants_rollback(refused)) == ([5, 6], 4, True)
    observe(watched, 7, [FINE])
    assert watched.read().in_a_row == 0


def test_whose_loss_it_was_is_known_to_that_rank_alone() -> None:
    watched = guard()
    watched.observe(3, FINE, NAN)
    watched.observe(4, NAN, NAN)
    refused = watched.read()
    assert (refused.steps, refused.mine) == ([3, 4], [4])


def test_rollbacks_are_limited_also_across_restarts() -> None:
    watched, resumed = guard(max_rollbacks=1), guard(max_rollbacks=1)
    watched.roll_back("x")
    resumed.load_state_dict(watched.state_dict())
    with pytest.raises(TrainingFailed, match="x, after 1 rollback"):
        resumed.roll_back("x")


def test_collapse_is_a_return_to_the_blind_guess_that_stays() -> None:
    blind = 2.3026
    watched = guard(collapse_loss_margin=0.02)
    assert not any(watched.collapsed(blind, step) for step in range(5)), "a run begins there"
    assert not watched.collapsed(1.5, 10)
    assert not watched.collapsed(blind, 20) and not watched.collapsed(1.6, 30), "one bad interval is none"
    assert [watched.collapsed(blind, step) for step in (40, 50, 60)] == [False, False, True]
    assert watched.collapse_began == 40
    assert not any(guard(collapse_loss_margin=0.0).collapsed(loss, 1) for loss in (1.0, blind, blind, blind))


@pytest.mark.parametrize("classes", [10, 1000])
def test_collapse_is_known_by_the_binary_cross_entropy_as_well(classes: int) -> None:
    """A mean over the classes: of a thousand, a blind guess costs 0.0079, less than the margin of a cross-entropy."""
    device = torch.device("cpu")
    watched = Guard(GuardConfig(), num_classes=classes, device=device, capacity=10, loss="bce")
    blind = blind_guess("bce", classes)
    assert not any(watched.collapsed(loss, step) for step, loss in enumerate((0.69, 0.5, blind, blind, blind)))
    assert not any(watched.collapsed(share * blind, 10) for share in (0.9, 0.5, 0.95, 0.96, 0.97, 0.98))
    assert [watched.collapsed(blind, step) for step in (40, 50, 60)] == [False, False, True]


def test_debug_nan_names_the_first_module_forward_and_backward() -> None:
    class Root(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sqrt()

    model = nn.Sequential(nn.Linear(4, 4), Root(), nn.Linear(4, 2))
    name_first_not_finite(model)
    nn.init.zeros_(model[0].weight), nn.init.zeros_(model[0].bias)
    with pytest.raises(TrainingFailed, match=r"the gradient through 1 \(Root\) is not finite"):
        model(torch.ones(2, 4)).sum().backward()  # the root of zero has an infinite slope
    nn.init.constant_(model[0].bias, -1.0)
    with pytest.raises(
        TrainingFailed, match=r"1 \(Root\) gave a value that is not finite; its input: .* from -1 to -1"
    ):
        model(torch.ones(2, 4))


# What is poisoned, each in another kind of place; the module that holds it is to be named.
POISONED = (
    "patch_embed.conv_down.0.weight",
    "patch_embed.conv_down.4.bias",
    "levels.0.blocks.0.conv1.weight",
    "levels.0.blocks.0.conv2.bias",
    "levels.1.blocks.0.norm1.weight",
    "levels.1.downsample.reduction.0.weight",
    "levels.2.blocks.0.norm1.weight",
    "levels.2.blocks.0.mixer.A_log",
    "levels.2.blocks.0.mixer.in_proj.weight",
    "levels.2.blocks.1.mixer.conv1d_x.weight",
    "levels.2.blocks.2.mixer.qkv.weight",
    "levels.3.blocks.1.mixer.proj.bias",
    "levels.3.blocks.1.norm2.bias",
    "levels.3.blocks.1.mlp.fc1.weight",
    "norm.weight",
    "head.weight",
)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_debug_nan_names_the_module_of_a_poisoned_parameter(precision: str) -> None:
    model = micro().train()
    name_first_not_finite(model)
    sound = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in POISONED:
        model.load_state_dict({**sound, parameter: torch.full_like(sound[parameter], torch.nan)}, strict=False)
        with (
            pytest.raises(TrainingFailed, match="gave a value that is not finite") as failure,
            torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
        ):
            model(torch.randn(2, 3, 32, 32))
        named = str(failure.value).removeprefix("debug=nan: ").split(" (")[0]
        layer, _, own = parameter.rpartition(".")
        assert named == layer
        assert f"its {own} is not finite" in str(failure.value)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_debug_nan_lets_a_sound_model_train_and_names_the_data_and_the_loss(precision: str) -> None:
    model = micro().train()
    name_first_not_finite(model)
    images = torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        model(images).float().square().mean().backward()
        with pytest.raises(TrainingFailed, match="the gradient of the loss by the model's output"):
            (model(images).float() * torch.nan).sum().backward()
        with pytest.raises(TrainingFailed, match=r"the model \(MambaVision\) .* its input: .* from nan to nan"):
            model(images * torch.nan)


class RootOfZero(nn.Module):
    """Finite values whose gradient is not, made at one of three places."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.place, self.first, self.last = place, nn.Linear(4, 4), nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        if self.place == "between its layers":
            y = (0.0 * y).sqrt()
        if self.place == "at a parameter":
            y = y.detach() + self.scale.sqrt()
        return self.last(y)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("place", ["between its layers", "at a parameter"])
def test_debug_nan_names_where_a_gradient_went_wrong_outside_of_any_layer(place: str, first: bool) -> None:
    """The first module gets images, which have no gradient; the others hand theirs on to a sound module."""
    model = nn.Sequential(RootOfZero(place), nn.Linear(4, 4))
    if not first:
        model.insert(0, nn.Linear(4, 4))
    name_first_not_finite(model)
    root = 0 if first else 1
    named = f"of {root}.scale" if place == "at a parameter" else rf"through {root} \(RootOfZero\)"
    with pytest.raises(TrainingFailed, match=rf"the gradient {named} is not finite"):
        model(torch.ones(2, 4)).sum().backward()


def test_batch_norm_forgets_a_refused_step() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    averager = BatchNormAverager(model)
    for values, norm in ((torch.randn(8, 3), FINE), (torch.full((8, 3), torch.nan), NAN)):
        averager.begin_step()
        averager.begin_micro_batch(0)
        model(values)
        averager.finish_step(1, norm)
    assert torch.isfinite(model[0].running_mean).all() and model[0].running_mean.abs().sum() > 0
    assert model[0].num_batches_tracked == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_is_remembered_until_the_ranks_agree(tmp_path: Path, number: int) -> None:
    before = signal.getsignal(number)
    with StopNotice(WORLD, tmp_path / "STOP") as stop:
        assert stop.agreed() is Decision.CONTINUE
        os.kill(os.getpid(), number)
        assert stop.agreed() is Decision.STOP
        assert stop.cause == signal.Signals(number).name
        assert stop.agreed(Decision.ROLL_BACK) is Decision.ROLL_BACK
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(("step_seconds", "interval"), [(0.02, 10), (0.7, 7), (3.3, 1), (60.0, 1)])
def test_slow_steps_make_the_ranks_meet_more_often(
    step_seconds: float, interval: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("mambavision.engine.stop.time.monotonic", lambda: clock[0])
    meetings, held = Meetings(10), []
    for step in range(1, 61):
        clock[0] += step_seconds
        if meetings.due(step):
            meetings.held(step)
            held.append(step)
    assert held[:2] == [1, 2], "until it is known how long a step takes"
    assert held[2:] == [step for step in range(3, 61) if step % interval == 0]


def test_an_old_stop_file_is_removed_a_new_one_counts(tmp_path: Path) -> None:
    path = tmp_path / "STOP"
    stop = StopNotice(WORLD, path)
    path.touch()
    stop.remove_old_stop_file()
    assert stop.agreed() is Decision.STOP
    os.utime(path, (0, 0))
    stop.remove_old_stop_file()
    assert not path.exists()


def test_the_same_place_in_the_data_under_another_batch_size() -> None:
    progress = TrainProgress(step=2 * 10 + 3, samples_seen=23 * 64)
    progress.move({"global_batch_size": 64, "steps_per_epoch": 10}, steps_per_epoch=20, batch=32)
    assert (progress.step, progress.samples_seen) == (46, 23 * 64)
    progress.move({"global_batch_size": 32, "steps_per_epoch": 20}, steps_per_epoch=10, batch=64)
    assert progress.step == 23


def watchdog(directory: Path, said: list, **settings: object) -> Watchdog:
    cfg = WatchdogConfig(**{"heartbeat_seconds": 0.1, "stall_seconds": 1.0, **settings})
    log = lambda event, **fields: said.append((event, fields))  # noqa: E731
    return Watchdog(WORLD, directory, cfg, log=log, notice=said.append, data_warning_seconds=0.6)


@pytest.mark.slow
def test_a_stall_is_reported_once_with_stacks_and_the_step_is_known_afterwards(tmp_path: Path) -> None:
    said: list = []
    with watchdog(tmp_path, said) as dog:
        dog.beat(1, "step")
        dog.arm()
        dog.beat(2, "data")
        time.sleep(2.2)
    kinds = [event for event, _ in said]
    assert kinds.count("stall") == 1
    assert "has waited" in said[0][1]["message"] and "rank 0 on" in said[0][1]["message"]
    assert "test_a_stall_is_reported_once" in (tmp_path / "stacks/rank_00000.txt").read_text()
    (beat,) = read_heartbeats(tmp_path)
    assert (beat["step"], beat["phase"], beat["pid"]) == (2, "end", os.getpid())


@pytest.mark.slow
def test_nothing_is_a_stall_before_the_first_step(tmp_path: Path) -> None:
    said: list = []
    with watchdog(tmp_path, said, stall_seconds=0.2):
        time.sleep(0.9)
    assert said == []


def test_faults_are_off_unless_ordered() -> None:
    assert faults.ORDERS == []
    assert [o.place for o in faults.parse("kill@3:1,sleep2.5@4-9/data")] == ["step", "data"]
    for wrong in ("kill", "boom@3", "kill@3/nowhere"):
        with pytest.raises(ValueError, match="KIND@STEP"):
            faults.parse(wrong)


def test_heartbeats_of_killed_writers_do_not_confuse_readers(tmp_path: Path) -> None:
    (tmp_path / "heartbeats").mkdir()
    (tmp_path / "heartbeats/rank_00000.json").write_text('{"rank": 0, "st')
    (tmp_path / "heartbeats/rank_00001.json").write_text(json.dumps({"rank": 1, "step": 5}) + "   \n")
    assert [b["rank"] for b in read_heartbeats(tmp_path)] == [1]
