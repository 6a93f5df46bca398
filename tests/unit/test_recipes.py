"""The experiments carry the published recipes exactly, and the learning rate is the published one at every step."""

from __future__ import annotations

import math

import pytest
import torch
from timm.scheduler import CosineLRScheduler

from mambavision.compose import CONF_DIR, compose_train_config, group_choices
from mambavision.config import ScheduleConfig
from mambavision.optim.schedule import LearningRate

# variant: weight decay, warm-up epochs, MESA weight, MESA start, crop_pct while training
PUBLISHED = {
    "t": (0.05, 20, 0.5, 0.25, 1.0),
    "t2": (0.05, 20, 0.75, 0.25, 1.0),
    "s": (0.05, 20, 1.0, 0.25, 0.875),
    "b": (0.075, 35, 1.0, 0.3, 1.0),
    "l": (0.12, 20, 6.0, 0.25, 1.0),
    "l2": (0.12, 20, 6.0, 0.25, 1.0),
}


@pytest.mark.parametrize("variant", PUBLISHED)
def test_paper_and_published_recipes(variant: str):
    decay, warmup, mesa_weight, mesa_start, crop_pct = PUBLISHED[variant]
    paper = compose_train_config([f"experiment=paper/mambavision_{variant}", "data.path=/data"])
    published = compose_train_config([f"experiment=published/mambavision_{variant}", "data.path=/data"])
    for cfg in (paper, published):
        assert cfg.model.name == f"mambavision_{variant}"
        o, a = cfg.optimizer, cfg.augment
        assert (o.name, o.lr, o.betas, o.eps, o.weight_decay) == ("lamb", 0.005, (0.9, 0.999), 1e-8, decay)
        assert (o.clip_grad, o.lamb_max_grad_norm) == (5.0, 1.0)
        s = cfg.schedule
        assert (s.warmup_epochs, s.warmup_lr, s.min_lr) == (warmup, 1e-6, 5e-6)
        assert (a.crop_scale, a.interpolation, a.hflip, a.auto_augment) == (
            (0.08, 1.0),
            "random",
            0.5,
            "rand-m9-mstd0.5-inc1",
        )
        assert a.crop_ratio == pytest.approx((3 / 4, 4 / 3), abs=0)
        assert (a.erasing_prob, a.mixup, a.cutmix, a.mixup_switch_prob, a.label_smoothing) == (0.25, 0.8, 1.0, 0.5, 0.1)
        assert a.color_jitter == 0.0
        assert (cfg.trainer.global_batch_size, cfg.trainer.micro_batch_size, cfg.trainer.ema_decay) == (
            4096,
            128,
            0.9998,
        )
        assert (cfg.data.image_size, cfg.data.crop_pct, cfg.data.eval_interpolation) == (224, crop_pct, "bicubic")
    assert (paper.trainer.epochs, paper.schedule.cooldown_epochs, paper.trainer.mesa.weight) == (300, 0, 0.0)
    assert (published.trainer.epochs, published.schedule.cooldown_epochs) == (310, 10)
    assert (published.trainer.mesa.weight, published.trainer.mesa.start_fraction) == (mesa_weight, mesa_start)


def test_model_alone_carries_its_recipe():
    """`torchrun train.py model=mambavision_b` trains B as published, without an experiment."""
    cfg = compose_train_config(["model=mambavision_b", "data.path=/data"])
    assert (cfg.optimizer.lr, cfg.optimizer.weight_decay, cfg.schedule.warmup_epochs) == (0.005, 0.075, 35)


# optimizer: its learning rate and, where it is not the model's, its weight decay
OPTIMIZERS = {"lamb": (0.005, None), "lamb_torch_optimizer": (0.005, None), "adamw": (0.001, None), "sgd": (0.5, 2e-5)}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("choice", ["model=mambavision_t", "model=mambavision_l", "experiment=paper/mambavision_b"])
def test_another_optimizer_brings_its_own_settings(optimizer: str, choice: str):
    """SGD's coupled decay must not be LAMB's, nor AdamW's learning rate that of an experiment for LAMB."""
    cfg = compose_train_config([choice, f"optimizer={optimizer}", "data.path=/data"])
    lr, own_decay = OPTIMIZERS[optimizer]
    published_decay = PUBLISHED[choice.rsplit("_", 1)[1]][0]
    assert (cfg.optimizer.name, cfg.optimizer.lr) == (optimizer, lr)
    assert cfg.optimizer.weight_decay == (published_decay if own_decay is None else own_decay)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["paper", "published"])
def test_another_model_brings_its_own_recipe_into_an_experiment(kind: str):
    for variant, (decay, warmup, _, _, crop_pct) in PUBLISHED.items():
        cfg = compose_train_config([f"experiment={kind}/mambavision_t", f"model=mambavision_{variant}", "data.path=/d"])
        found = (cfg.model.name, cfg.optimizer.weight_decay, cfg.schedule.warmup_epochs, cfg.data.crop_pct)
        assert found == (f"mambavision_{variant}", decay, warmup, crop_pct)


@pytest.mark.parametrize("experiment", [e for e in group_choices("experiment") if "/" in e])
def test_header_of_an_experiment_says_command_hardware_and_expectation(experiment: str):
    header = (CONF_DIR / "experiment" / f"{experiment}.yaml").read_text()
    for word in ("Command:", "Hardware:", "Expected:", "Source:"):
        assert word in header
    assert f"experiment={experiment}" in header


@pytest.mark.parametrize(("epochs", "warmup", "cooldown"), [(310, 20, 10), (310, 35, 10), (300, 20, 0)])
def test_learning_rate_equals_timm_at_every_step(epochs: int, warmup: int, cooldown: int):
    steps_per_epoch = 7
    lr = LearningRate(ScheduleConfig(warmup_epochs=warmup, cooldown_epochs=cooldown), 0.005, epochs, steps_per_epoch)
    assert lr.total_steps == (epochs + cooldown) * steps_per_epoch
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.005)
    timm = CosineLRScheduler(
        optimizer,
        t_initial=epochs * steps_per_epoch,
        lr_min=5e-6,
        warmup_t=warmup * steps_per_epoch,
        warmup_lr_init=1e-6,
        t_in_epochs=False,
    )
    for step in range(lr.total_steps):
        assert math.isclose(lr(step), optimizer.param_groups[0]["lr"], rel_tol=1e-12), step
        timm.step_update(step + 1)


def test_warm_up_drops_onto_the_cosine_unless_it_is_a_prefix():
    published = LearningRate(ScheduleConfig(warmup_epochs=10), 1.0, 100, 10)
    assert 0.98 < published(99) < 1.0
    assert published(100) == pytest.approx(0.5 * (1 + math.cos(math.pi / 10)), abs=1e-5)
    prefix = LearningRate(ScheduleConfig(warmup_epochs=10, warmup_prefix=True), 1.0, 100, 10)
    assert prefix(100) == 1.0
    assert prefix.total_steps == 1100


def test_a_prefix_that_ends_within_an_epoch_never_leaves_the_peak_before_the_cosine():
    lr = LearningRate(ScheduleConfig(warmup_epochs=1.5, warmup_prefix=True), 1.0, 100, 10)
    assert [lr(step) for step in range(15, 21)] == [1.0] * 6
    assert lr(21) < 1.0
