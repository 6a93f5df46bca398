"""What a user types is either taken as meant or answered with what to type instead."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from mambavision import list_models
from mambavision.batch_plan import batch_plan
from mambavision.compose import (
    CONF_DIR,
    check_command_line,
    compose_eval_config,
    compose_train_config,
    group_choices,
)
from mambavision.config import EvalConfig, TrainConfig
from mambavision.config_checks import ConfigError, check_values, known_keys, to_config
from mambavision.config_ranges import CHOICES, RANGES
from mambavision.config_words import WORDS_FROM_ELSEWHERE

SYNTHETIC = ["data=synthetic"]


@pytest.mark.parametrize(
    ("overrides", "advice"),
    [
        (["optimizer.lrr=1"], "did you mean optimizer.lr"),
        (["+optimizer.lrr=1"], "did you mean optimizer.lr"),
        (["++optimizer.lrr=1"], "did you mean optimizer.lr"),
        (["lr=1"], "did you mean optimizer.lr"),
        (["modle=mambavision_t"], "did you mean model="),
        (["eval_set=imagenet_a"], "eval_set= is no group of this program; its groups are data, augment"),
        (["model=mambavision_x"], "did you mean model=mambavision_"),
        (["optimizer=lam"], "did you mean optimizer=lamb?"),
        (["experiment=paper/mambavision_bb"], "did you mean experiment=paper/mambavision_b"),
        (["+nothing=1"], "there is no setting 'nothing'"),
        (["optimizer"], "settings are written key=value"),
        (["batch_size=64"], "type trainer.global_batch_size=N (all ranks, a step) or trainer.micro_batch_size=N"),
        (["trainer.batch_size=64"], "type trainer.global_batch_size=N"),
        (["data-dir=/data"], "type data.path=DIR"),
        (["data=/data/imagenet"], "did you mean data.path=/data/imagenet?"),
        (["resume=runs/x"], "the same command (or run_name=NAME) continues a run"),
        (["checkpoint=x.pt"], "type model.checkpoint=PATH"),
        ([*SYNTHETIC, "~augment"], "~augment would not turn it off"),
        ([*SYNTHETIC, "~augment"], "type augment=imagenet|light|none|small_images"),
        ([*SYNTHETIC, "~augment.mixup"], "type augment.mixup=VALUE"),
        ([*SYNTHETIC, "optimizer.lr=fast"], "optimizer.lr='fast' is not a number"),
        ([*SYNTHETIC, "trainer.epochs=2.5"], "trainer.epochs=2.5 is not a whole number"),
        ([*SYNTHETIC, "optimizer.betas=[0.9]"], "takes 2 numbers"),
        ([*SYNTHETIC, "optimizer.lr=-1"], "out of range"),
        ([*SYNTHETIC, "guard.max_skipped_steps=0"], "out of range"),
        ([*SYNTHETIC, "max_restarts_without_progress=0"], "out of range"),
        ([*SYNTHETIC, "checkpoint.max_write_failures=0"], "out of range"),
        ([*SYNTHETIC, "trainer.precision=bf61"], "did you mean trainer.precision=bf16"),
        ([*SYNTHETIC, "trainer.ema_decay=0", "trainer.mesa.weight=1"], "set trainer.ema_decay=0.9998"),
        ([*SYNTHETIC, "trainer.epochs=5"], "schedule.warmup_epochs=20 is longer than trainer.epochs=5"),
        ([*SYNTHETIC, "trainer.micro_batch_size=127"], "must be even"),
        ([*SYNTHETIC, "model.checkpoint=/no/such/file"], "/no/such/file does not exist"),
        (["experiment=finetune", *SYNTHETIC], "type model.checkpoint=PATH"),
        ([*SYNTHETIC, "optimizer.layer_decay=1.1"], "optimizer.layer_decay=1.1 is out of range"),
        ([*SYNTHETIC, "trainer.loss=bse"], "did you mean trainer.loss=bce?"),
        (
            [*SYNTHETIC, "trainer.loss=bce", "trainer.mesa.weight=1"],
            "type trainer.mesa.weight=0, or trainer.loss=cross",
        ),
        ([*SYNTHETIC, "trainer.bce_threshold=0.2"], "belongs to trainer.loss=bce"),
        ([*SYNTHETIC, "trainer.loss=bce", "trainer.bce_threshold=0.2"], "type guard.collapse_loss_margin=0"),
        ([*SYNTHETIC, "trainer.loss=bce", "trainer.bce_threshold=1"], "it must be more than 0 and less than 1"),
        ([*SYNTHETIC, "model.freeze=backbone"], "would keep random weights as they are; type model.checkpoint=PATH"),
        ([*SYNTHETIC, "model.freeze=bakbone"], "did you mean model.freeze=backbone?"),
        (["data=ffcv", "data.path=null"], "needs data.path=DIR"),
        ([*SYNTHETIC, "data.num_classes=null"], "needs data.num_classes"),
        ([*SYNTHETIC, "debug=yes"], "debug=yes is not known; one of: nan, profile"),
        ([*SYNTHETIC, "trainer.compile=true", "trainer.grad_checkpointing=true"], "type trainer.compile=false or"),
        ([*SYNTHETIC, "schedule.warmup_lr=1"], "schedule.warmup_lr=1, where the warm-up begins, is above optimizer.lr"),
        ([*SYNTHETIC, "schedule=constant", "schedule.cooldown_epochs=10"], "cooldown_epochs=0 trainer.epochs=310"),
        ([*SYNTHETIC, "augment.crop_scale=[1,0.08]"], "type augment.crop_scale=[0.08,1]"),
        ([*SYNTHETIC, "data.mean=[0.5]"], "takes 3 numbers"),
        ([*SYNTHETIC, "resume.allow=[optimzer.lr]"], "did you mean optimizer.lr"),
        ([*SYNTHETIC, "run_name=.."], "run_name=.. is no directory of its own"),
        ([*SYNTHETIC, "output_dir=/tmp", "run_name=x/../../y"], "is no directory of its own"),
    ],
)
def test_slip_is_answered_with_what_to_type(overrides: list[str], advice: str):
    with pytest.raises(ConfigError) as error:
        compose_train_config(overrides)
    assert advice in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        ("--model mambavision_t --epochs 3", "--model is no flag of this program: settings are written key=value"),
        ("--model=mambavision_t", "without dashes: model=mambavision_t"),
        ("--epochs 300", "did you mean trainer.epochs?"),
        ("--batch-size=128", "type trainer.global_batch_size=N"),
        ("--config run.yaml", "taken with experiment=NAME"),
        ("--local-rank=1", "start with torchrun"),
    ],
)
def test_a_flag_of_another_program_is_answered_with_the_setting(arguments: str, advice: str):
    with pytest.raises(ConfigError) as error:
        check_command_line(arguments.split(), TrainConfig)
    assert advice in str(error.value)


def test_flags_of_hydra_may_stand_anywhere():
    """Between settings, as in `train.py model=mambavision_t -m seed=1,2`, Hydra called what follows unrecognized."""
    line = ["data=synthetic", "--cfg", "job", "--cfg=hydra", "-m", "--multirun", "--resolve", "--info", "seed=1,2"]
    assert check_command_line(line, TrainConfig) == [line[0], line[-1], *line[1:-1]]


def test_two_dashes_before_the_settings_mean_nothing():
    assert check_command_line(["--cfg", "job", "--", "seed=1"], TrainConfig) == ["seed=1", "--cfg", "job"]


def test_keys_of_a_group_may_be_given_together():
    """checkpoint= and resume= of other programs are answered; these are groups of settings here."""
    cfg = compose_train_config([*SYNTHETIC, "checkpoint={keep_last: 7}", "resume={mode: never}"])
    assert (cfg.checkpoint.keep_last, cfg.resume.mode) == (7, "never")


def test_every_word_from_elsewhere_is_answered():
    """A setting of that name here would be taken, and the answer never given."""
    for word in WORDS_FROM_ELSEWHERE:
        with pytest.raises(ConfigError, match=f"{word}= is no setting; "):
            compose_train_config([f"{word}=1"])


@pytest.mark.parametrize(
    "name", ["größe", "école/2 (copy)", "собака", "a[1]", "{x}", "it's é", r"a\b (1)", "é\\", r"\'é"]
)
def test_a_text_may_have_any_letters_and_brackets(name: str):
    assert compose_train_config([*SYNTHETIC, f"run_name={name}"]).run_name == name


def test_a_free_form_key_of_an_experiment_can_be_taken_away():
    experiment = "experiment=ablation/windows_7_7"
    assert "window_size" in compose_train_config([*SYNTHETIC, experiment]).model.architecture
    overrides = [*SYNTHETIC, experiment, "~model.architecture.window_size"]
    assert "window_size" not in compose_train_config(overrides).model.architecture


def test_a_warm_up_that_precedes_the_epochs_may_be_longer_than_they_are():
    cfg = compose_train_config([*SYNTHETIC, "trainer.epochs=5", "schedule.warmup_prefix=true"])
    assert cfg.schedule.warmup_epochs == 20


def test_unknown_key_in_a_config_file_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"'optimizer\.lrr'; did you mean optimizer\.lr"):
        to_config(TrainConfig, {"optimizer": {"lrr": 0.1}})


def test_every_setting_of_the_schema_has_a_place_in_conf():
    """A field without a line in conf/ could not be overridden from the command line."""
    from hydra import compose, initialize_config_dir

    from mambavision.run_dir import flatten

    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        composed = compose("train", overrides=SYNTHETIC)
    from omegaconf import OmegaConf

    in_conf = set(flatten(OmegaConf.to_container(composed)))
    leaves = {k for k in known_keys() if not any(o.startswith(f"{k}.") for o in known_keys())}
    assert leaves == in_conf


def test_defaults_of_schema_and_conf_agree():
    """The dataclasses' defaults are what a library user gets, conf/ is what train.py gets: the same recipe."""
    cfg = compose_train_config(SYNTHETIC)
    for group in ("augment", "optimizer", "schedule", "checkpoint", "guard", "watchdog", "resume"):
        assert getattr(cfg, group) == getattr(TrainConfig(), group), group
    trainer = dataclasses.replace(cfg.trainer, expected_gpus=None)
    assert trainer == TrainConfig().trainer


def test_every_model_has_a_config_and_every_config_a_model():
    assert set(group_choices("model")) == set(list_models())


@pytest.mark.parametrize("model", ["mambavision_l", "mambavision_nano"])
def test_weight_decay_from_the_command_line_wins_over_model_and_optimizer(model: str):
    for optimizer in group_choices("optimizer"):
        overrides = [f"model={model}", f"optimizer={optimizer}", "optimizer.weight_decay=0.3"]
        assert compose_train_config([*SYNTHETIC, *overrides]).optimizer.weight_decay == 0.3


@pytest.mark.parametrize("choice", ["mambavision_t", "mambavision_l2_512_21k"])
def test_evaluation_takes_model_files_without_their_recipe(choice: str):
    cfg = compose_eval_config([f"model={choice}", "checkpoint=x.pt", "data=synthetic", "data.num_classes=10"])
    assert cfg.model.name == choice
    assert cfg.data.image_size == (512 if "512" in choice else 224)


def test_evaluation_names_its_own_groups():
    with pytest.raises(ConfigError, match="trainer= is no group of this program; its groups are data, model, eval_set"):
        compose_eval_config(["trainer=cpu"])


def test_free_form_architecture_keys_need_no_plus():
    cfg = compose_train_config([*SYNTHETIC, "model.architecture.depths=[1,1,2,2]"])
    assert cfg.model.architecture == {"depths": [1, 1, 2, 2]}


@pytest.mark.parametrize(("world", "accum"), [(32, 1), (8, 4), (1, 32)])
def test_published_global_batch_is_kept_at_any_world_size(world: int, accum: int):
    assert batch_plan(4096, 128, world).accum_steps == accum


def test_batch_that_does_not_divide_names_the_nearest():
    with pytest.raises(
        ConfigError, match=r"global_batch_size=100 .* on 3 ranks; nearest: trainer.global_batch_size=384"
    ):
        batch_plan(100, 128, 3)
    with pytest.raises(
        ConfigError, match=r"nearest: trainer.global_batch_size=96, or keep it with trainer.micro_batch_size=10"
    ):
        batch_plan(100, 16, 2)


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("optimizer.lr", float("inf"), "a finite number and more than 0"),
        ("optimizer.lr", float("nan"), "a finite number and more than 0"),
        ("optimizer.betas", (0.9, 1.5), "at least 0 and less than 1"),
        ("trainer.ema_decay", 1.0, "at least 0 and less than 1"),
        ("trainer.mesa.temperature", 0.0, "more than 0"),
        ("model.drop_path", 1.0, "less than 1"),
        ("data.std", (0.2, 0.0, 0.2), "more than 0"),
        ("data.num_workers", 0, "at least 1"),
        ("data.synthetic_eval_samples", 0, "at least 1"),
        ("seed", -1, "at least 0"),
        ("seed", 10**23, "at most 9223372036854775807"),
    ],
)
def test_a_number_that_makes_no_sense_is_refused_with_what_it_must_be(key: str, value: object, wanted: str):
    *groups, leaf = key.split(".")
    values: dict = {leaf: value}
    for group in reversed(groups):
        values = {group: values}
    with pytest.raises(ConfigError, match=f"{key}=.* is out of range: it must be .*{wanted}"):
        check_values(to_config(TrainConfig, values))


def test_every_range_and_choice_belongs_to_a_setting():
    """A key misspelt there would check nothing."""
    known = {*known_keys(), *known_keys(EvalConfig)}
    assert {*RANGES, *CHOICES} <= known


@pytest.mark.parametrize("name", ["1.10", "20260101_01", "007", "1e3", "true", "'1.10'"])
def test_a_name_that_looks_like_a_number_stays_as_it_was_typed(name: str):
    assert compose_train_config(["experiment=tiny", f"run_name={name}"]).run_name == name.strip("'")


def test_glob_stands_for_the_choices_of_a_group():
    line = ["-m", "model=glob([mambavision_s,mambavision_t*],exclude=*2)"]
    assert check_command_line(line, TrainConfig) == ["model=mambavision_s,mambavision_t", "-m"]
    with pytest.raises(ConfigError, match=r"^model=glob\(x\*\) stands for nothing; available: mambavision_b, "):
        check_command_line(["model=glob(x*)"], TrainConfig)
    with pytest.raises(ConfigError, match="glob.. is for groups, and optimizer.lr is none; list its values"):
        check_command_line(["optimizer.lr=glob(*)"], TrainConfig)


def test_a_sweep_file_without_a_multirun_is_no_single_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    import train

    monkeypatch.setattr("sys.argv", ["train.py", "sweep=lr", *SYNTHETIC])
    with pytest.raises(SystemExit) as end:
        train.main()
    assert end.value.code == 2
    assert "sweep=lr names the points of a sweep, which needs -m" in capsys.readouterr().err
