#!/usr/bin/env python
"""Score a checkpoint, ours (raw and EMA weights) or a published one.

Examples:
    python eval.py checkpoint=runs/NAME                                   # the best checkpoint of a run, on its own data
    python eval.py checkpoint=PATH.pt data=ffcv data.path=DIR
    python eval.py checkpoint=mambavision_tiny_1k.pth.tar data=folder data.path=DIR   # published: at its own size and crop
    python eval.py checkpoint=runs/NAME predictions=FILE.csv              # and the top 5 of each image
    torchrun --standalone --nproc_per_node=8 eval.py checkpoint=PATH.pt data.path=DIR  # each image is still counted once

Settings are those of EvalConfig in mambavision/config.py; eval_set=NAME takes a file of conf/eval_set/. Exit codes: 0 scored,
2 refused.
"""

from __future__ import annotations

import sys


def main() -> None:
    from mambavision.compose import compose_eval_config, refuse
    from mambavision.engine.score import implied_overrides, score, with_quoted_checkpoint
    from mambavision.world_end import world_left_at_end

    try:
        given = sys.argv[1:]
        if {"-h", "--help"} & set(given):
            return print(__doc__)
        if flags := [word for word in given if word.startswith("-")]:
            raise ValueError(
                f"{flags[0]} is no setting; eval.py takes key=value and scores once: run it for each value"
            )
        with world_left_at_end():
            score(compose_eval_config(implied_overrides(given) + with_quoted_checkpoint(given)))
    except ValueError as error:
        refuse(error)


if __name__ == "__main__":
    main()
