"""What other training programs call things, and what to type for it here. Answers alone: none of the words is taken."""

from __future__ import annotations

_WEIGHTS = "to begin from weights type model.checkpoint=PATH (a file, or the directory of a run)"
# What users of timm, Lightning and torch type where the letters lead to no setting, or to a wrong one.
WORDS_FROM_ELSEWHERE = {
    "batch_size": "type trainer.global_batch_size=N (all ranks, a step) or trainer.micro_batch_size=N (a forward pass)",
    "data_dir": "type data.path=DIR",
    "dataset": "type data.path=DIR",
    "opt": "type optimizer=...",
    "sched": "type schedule=...",
    "aa": "type augment.auto_augment=...",
    "reprob": "type augment.erasing_prob=...",
    "amp": "type trainer.precision=bf16 or fp16",
    "model_ema": "type trainer.ema_decay=... (0: off)",
    "ema": "type trainer.ema_decay=... (0: off)",
    "gradient_clip_val": "type optimizer.clip_grad=...",
    "accumulate_grad_batches": "it follows from trainer.global_batch_size=N, trainer.micro_batch_size=N and the ranks",
    "accelerator": "type trainer.device=cuda or cpu",
    "devices": "start one process a GPU: torchrun --standalone --nproc_per_node=N train.py ...",
    "local_rank": "start with torchrun, which tells ranks in the environment: torchrun --nproc_per_node=N train.py ...",
    "config": "a file of settings is conf/experiment/NAME.yaml, taken with experiment=NAME",
    "pretrained": _WEIGHTS,
    "initial_checkpoint": _WEIGHTS,
    "checkpoint": _WEIGHTS,
    "resume": f"the same command (or run_name=NAME) continues a run; {_WEIGHTS}",
}
