"""The schema: every knob of a run, typed and frozen, one line each on what it is, its unit and what it changes.

Hydra composes conf/ and the command line into a dict; `config_checks.to_config` turns that dict into these classes and
refuses what does not fit. Nothing below train.py and eval.py sees Hydra or OmegaConf.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ModelConfig:
    name: str = "mambavision_t"  # a name of mambavision.list_models()
    num_classes: int | None = None  # None: as many as the data set has
    checkpoint: str | None = None  # weights to start from: a file (ours, published) or a run's directory; not a resume
    checkpoint_weights: str = "model"  # which of our checkpoint's: model (raw) | ema (the moving average, as scored)
    replace_head: bool = False  # with checkpoint: start a fresh classifier, whatever its classes
    freeze: str | None = None  # backbone: the head alone learns (a linear probe), all else is as in evaluation
    drop_path: float | None = None  # stochastic depth of the last block; None: the variant's own
    architecture: dict[str, Any] = field(default_factory=dict)  # create_model keywords: depths, window_size, mixer, ...
    init: str = "published"  # published | mamba (Mamba's own initialisation of the step size)
    window_padding: str = "published"  # published: a map smaller than its window is padded up to it | tight: it is not
    scan_backend: str = "auto"  # auto | cpu | triton | mamba_ssm | reference


@dataclass(frozen=True)
class DataConfig:
    source: str = "ffcv"  # ffcv (.beton files) | folder (class folders of images) | synthetic
    path: str | None = None  # directory with train.beton and val.beton, or with train/ and val/
    image_size: int = 224  # side of the square the model sees, px
    num_classes: int | None = None  # None: read from the data set; synthetic data needs it
    num_workers: int | None = None  # decoder threads (ffcv) or processes (folder) a rank; None: cores / local ranks
    crop_pct: float = 1.0  # evaluation: the centre crop is this share of the resized image
    crop_mode: str = "center"  # center: resize the short side, then crop | squash: resize both sides, no crop
    eval_interpolation: str = "bicubic"  # bicubic | bilinear
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # subtracted, in units of [0, 1]
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)  # divided by, in units of [0, 1]
    decoder: str = "native"  # native (ours, exact and keyed) | stock (FFCV's own operations, not reproducible)
    os_cache: bool = True  # ffcv: map the file, which the kernel caches for all ranks; False: each rank reads its pages
    corrupt_images: str = "skip"  # skip: count, name, take the next sample instead | stop: end the run
    max_corrupt_fraction: float = 0.001  # skip: share of a rank's epoch; more, and more than 3, ends the run; 0: any
    verify_checksum: bool = False  # hash the whole .beton at start and compare it with its manifest
    repeated_augmentation: int = 1  # each image this many times in an epoch, differently augmented
    progressive_resolution: tuple[int, ...] = ()  # () off; (start_px, end_px, ramp_start_epoch, ramp_end_epoch)
    synthetic_train_samples: int = 1024  # size of the synthetic training set
    synthetic_eval_samples: int = 256  # size of the synthetic validation set
    stall_warning_seconds: float = 60.0  # a batch later than this is reported with rank and host
    timeout_seconds: float = 1800.0  # a batch later than this ends the run


@dataclass(frozen=True)
class AugmentConfig:
    crop_scale: tuple[float, float] = (0.08, 1.0)  # area of the random resized crop, share of the image
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)  # aspect ratio of the crop
    interpolation: str = "random"  # random (bilinear or bicubic, per sample) | bilinear | bicubic
    random_crop: bool = True  # False: resize to the image size without cropping, plus `pad_crop`
    pad_crop: int = 0  # with random_crop False: zero-pad by this many px, then crop at random (small images)
    hflip: float = 0.5  # probability of a horizontal flip
    auto_augment: str = "rand-m9-mstd0.5-inc1"  # timm's notation; trivial | three | none
    color_jitter: float = 0.0  # strength of brightness, contrast, saturation; only without auto_augment or with three
    erasing_prob: float = 0.25  # probability of erasing one rectangle with pixel noise
    mixup: float = 0.8  # alpha of mixup, 0 turns it off
    cutmix: float = 1.0  # alpha of cutmix, 0 turns it off
    mixup_switch_prob: float = 0.5  # with both: probability of cutmix
    mixup_off_epoch: int = 0  # no mixup and cutmix from this epoch on; 0: never off
    label_smoothing: float = 0.1  # share of the target spread over all classes


@dataclass(frozen=True)
class OptimizerConfig:
    name: str = "lamb"  # lamb (ours, timm's semantics) | lamb_torch_optimizer | adamw | sgd
    lr: float = 0.005  # peak learning rate for the global batch; never rescaled behind your back
    betas: tuple[float, float] = (0.9, 0.999)  # decay of the first and the second moment a step; not for sgd
    eps: float = 1e-8  # added to the root of the second moment; not for sgd
    weight_decay: float = 0.05  # lamb, adamw: apart from the moments; sgd: part of the gradient
    decay_rule: str = "published"  # published: none on biases and 1-d parameters | mamba: none on A_log and D either
    layer_decay: float | None = None  # factor of lr per layer from the head down, each block a layer; None or 1: off
    clip_grad: float | None = 5.0  # global norm the gradient is clipped to; None: off
    lamb_max_grad_norm: float | None = 1.0  # LAMB's own clip, as in timm; None: off
    momentum: float = 0.9  # of sgd (Nesterov)


@dataclass(frozen=True)
class ScheduleConfig:
    name: str = "cosine"  # cosine | constant
    warmup_epochs: float = 20.0  # linear from warmup_lr to lr
    warmup_lr: float = 1e-6  # where the warm-up begins
    min_lr: float = 5e-6  # where the cosine ends
    warmup_prefix: bool = False  # False, as published: the warm-up replaces the cosine's start | True: precedes it
    cooldown_epochs: int = 0  # epochs at min_lr after trainer.epochs


@dataclass(frozen=True)
class MesaConfig:
    weight: float = 0.0  # weight of the distillation from the EMA model; 0 turns it off
    start_fraction: float = 0.25  # share of trainer.epochs after which it starts
    temperature: float = 3.0  # both answers' logits are divided by it; higher: softer targets


@dataclass(frozen=True)
class TrainerConfig:
    epochs: int = 300  # epochs of the schedule (cooldown comes on top)
    global_batch_size: int = 4096  # images a step, over all ranks; kept at any world size by accumulation
    micro_batch_size: int = 128  # images per forward pass; BatchNorm sees this many, so it is part of the recipe
    eval_batch_size: int = 128  # images per forward pass in evaluation, per rank
    max_steps: int | None = None  # stop here, whatever the epochs say (the schedule does not change)
    device: str = "auto"  # auto (cuda where there is one) | cuda | cpu
    expected_gpus: int | None = None  # what the preset was planned for; printed when the run differs
    precision: str = "auto"  # auto (bf16 where the hardware has it) | bf16 | fp16 | fp32
    channels_last: bool = True  # memory format of weights and maps, for speed
    compile: bool | None = None  # torch.compile training steps; None: on CUDA, with engine/compilation.py's exceptions
    compile_mode: str = "auto"  # auto (CUDA graphs on one GPU) | a mode of torch.compile
    grad_checkpointing: bool = False  # keep only each block's input and compute it again: less memory, slower
    deterministic: bool = False  # CUDA: deterministic kernels, slower; CPU runs are deterministic anyway
    threads: int | None = None  # CPU threads of each rank for math; None: cores / local ranks
    ema_decay: float = 0.9998  # of the weights' moving average; 0 turns it off
    ema_warmup: bool = False  # decay grows as (1 + step) / (10 + step) up to ema_decay
    loss: str = "cross_entropy"  # cross_entropy | bce (binary, mean over images and classes); both on soft targets
    bce_threshold: float | None = None  # bce: targets above it count as 1, the others as 0; None: as soft as they are
    mesa: MesaConfig = field(default_factory=MesaConfig)
    eval_every_epochs: int = 1  # epochs between evaluations; the last epoch has one in any case
    log_every_steps: int = 50  # steps a log interval: loss and speed are its means
    agree_every_steps: int = 10  # ranks agree on stop signals every so many steps, or 5 s where that is sooner


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int | None = None  # None: only by minutes and at epoch ends
    every_minutes: float | None = 15.0  # at most this much work is lost to a hard kill
    keep_last: int = 2  # newest checkpoints kept
    keep_best: bool = True  # besides the checkpoint of the best Top-1: the moving average's, if there is one
    keep_every_epochs: int = 0  # after every so many epochs one is kept for ever; 0: none
    asynchronous: bool = True  # write in the background; training stops only for the copy to host memory
    max_write_failures: int = 10  # this many failed writes in a row end the run


@dataclass(frozen=True)
class ResumeConfig:
    mode: str = "auto"  # auto: continue what the run directory holds | never: refuse a directory that holds a run
    allow: tuple[str, ...] = ()  # keys that may differ from the stored configuration, e.g. [optimizer.lr]


@dataclass(frozen=True)
class GuardConfig:
    max_skipped_steps: int = 5  # so many non-finite steps in a row roll back to the last good checkpoint
    max_rollbacks: int = 1  # one more than this ends the run
    collapse_loss_margin: float = 0.02  # loss an image this close to a blind guess's, once lower, is a collapse; 0: off
    collapse_policy: str = "stop"  # stop | rollback | warn


@dataclass(frozen=True)
class WatchdogConfig:
    heartbeat_seconds: float = 10.0  # how often each rank says that it lives
    stall_seconds: float = 300.0  # without a step for this long every rank dumps its stacks
    start_timeout_seconds: float = 600.0  # how long the ranks of a start wait for each other
    init_timeout_seconds: float = 1800.0  # timeout of collectives until the first step is done: data, compilation
    step_timeout_seconds: float = 600.0  # collectives afterwards


@dataclass(frozen=True)
class LoggerConfig:
    wandb: str = "auto"  # auto (online with a key, else offline) | online | offline | off
    project: str = "mambavision"  # W&B's
    entity: str | None = None  # W&B's user or team; None: the key's default
    group: str | None = None  # W&B's; None: in a sweep its name
    tags: tuple[str, ...] = ()  # W&B's; a sweep's point has its settings besides
    init_timeout_seconds: float = 20.0  # then offline, with one warning
    artifacts: bool = False  # at the end of the run, its best and its last checkpoint as W&B artifacts
    console: str = "auto"  # auto (progress bar on a terminal, lines elsewhere) | lines | off


@dataclass(frozen=True)
class TrainConfig:
    """One training run, complete."""

    run_name: str = ""  # directory under output_dir; empty: <model>-<data>-<hash of the configuration>
    output_dir: str = "runs"  # where run directories are made
    seed: int = 0  # of initial weights, sample order, augmentation and dropped paths
    debug: str | None = None  # nan: name the first module with a non-finite value (slow) | profile: trace five steps
    max_restarts_without_progress: int = 3  # a run that starts so often at the same step ends as failed
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)


@dataclass(frozen=True)
class EvalConfig:
    """One evaluation: `python eval.py checkpoint=PATH data=ffcv data.path=DIR`."""

    checkpoint: str = ""  # ours (raw and EMA weights are both scored) or a published one
    out: str | None = None  # JSON file; None: next to the checkpoint
    predictions: str | None = None  # a CSV file to be made: each image's top 5, of the moving average if there is one
    batch_size: int = 128  # images per forward pass, per rank
    device: str = "auto"  # auto (cuda where there is one) | cuda | cpu
    precision: str = "auto"  # auto (bf16 where the hardware has it) | bf16 | fp16 | fp32
    channels_last: bool = True  # as trainer.channels_last
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    eval_set: str = "val"  # val | imagenet_v2 | imagenet_a | imagenet_r | imagenet_sketch | imagenet_c | imagenet_real
