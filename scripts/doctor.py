#!/usr/bin/env python
"""Can this machine, or this job, run what it is about to be asked? Checks all that can be checked in a minute.

    scripts/doctor.py model=mambavision_b data=ffcv data.path=DIR       here, one process
    torchrun --nproc_per_node=8 scripts/doctor.py --ranks model=...     every rank and the links (as slurm/train.sbatch)
    scripts/doctor.py --json report.json ...                            the findings as data, too

Each line is ok, warning or error with the cure. Exit codes: 0 no error, 1 some error, 2 the settings are refused.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

from mambavision import distributed
from mambavision.cluster import doctor, doctor_device, points, sizing
from mambavision.cluster.doctor import Finding, Plan
from mambavision.compose import refuse
from mambavision.config import TrainConfig
from mambavision.world_end import world_left_at_end


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", action="store_true", help="under torchrun: check every rank and the links")
    parser.add_argument("--nodes", type=int, default=1, help="nodes the run is to have, where that is not this job's")
    parser.add_argument("--nproc-per-node", type=int, default=1, help="ranks of each node")
    parser.add_argument("--limit-hours", type=float, help="of the job; known by itself inside a SLURM job")
    parser.add_argument("--img-per-sec", type=float, help="of one rank, as measured; for loader and time")
    parser.add_argument("--no-loader", action="store_true", help="leave the loader's rate out")
    parser.add_argument("--json", type=Path, help="write the findings here as well")
    args, overrides = parser.parse_known_args()
    try:
        is_sweep, overrides = points.split_multirun(overrides)
        # The points of a sweep differ in little that matters here; scripts/submit.py checks each of them.
        cfg = (points.expand(overrides)[0] if is_sweep else points.single(overrides)).cfg
        with world_left_at_end():
            findings, hosts = examine(cfg, args)
            if distributed_rank() == 0:
                report(findings, hosts, args.json)
    except ValueError as error:  # the settings, or how the ranks were started
        refuse(error)
    return int(doctor.has_error(findings))


def distributed_rank() -> int:
    import torch.distributed as dist

    return dist.get_rank() if dist.is_initialized() else 0


def examine(cfg: TrainConfig, args: argparse.Namespace) -> tuple[list[Finding], set[str]]:
    """(findings, hosts of the job), the same on every rank: all of rank 0's findings, and of the others what is not ok."""
    limit = doctor.job_limit_seconds() if args.limit_hours is None else 3600 * args.limit_hours
    device = doctor_device.check_torch(cfg)
    usable = not doctor.has_error(device)
    world = distributed.init_world(
        cfg.trainer.device if usable else "cpu", timeout_seconds=300, start_timeout_seconds=300
    )
    differing = doctor_device.check_same_device(world)
    if args.ranks:
        plan = Plan(world.world_size // world.local_world_size, world.local_world_size, limit)
    else:
        plan = Plan(args.nodes, args.nproc_per_node, limit)
    total_rate = args.img_per_sec and args.img_per_sec * plan.world_size
    findings = [*doctor.check_run(cfg, plan), doctor.check_time(cfg, plan, total_rate)]
    findings += [*device, *differing, *(doctor_device.check_scan() if usable else [])]
    if not differing:
        findings.append(doctor_device.check_all_reduce(world))
    loads = not any(f.level == "error" and f.name in ("data", "batch", "ffcv", "device") for f in findings)
    if loads and not args.no_loader:
        expected = sizing.expected_train_img_per_sec(cfg.model.name) if world.device.type == "cuda" else None
        needed = args.img_per_sec or expected
        findings.append(doctor_device.check_loader(cfg, world, plan, needed))
    everyone = distributed.gather_objects([replace(f, host=f.host or doctor.host()) for f in findings])
    others = [f for theirs in everyone[1:] for f in theirs if f.level != "ok"]
    return list(dict.fromkeys([*everyone[0], *others])), {f.host for theirs in everyone for f in theirs}


def report(findings: list[Finding], hosts: set[str], path: Path | None) -> None:
    for finding in findings:
        print((finding if len(hosts) > 1 else replace(finding, host="")).line())
    bad = sorted({f.host for f in findings if f.level == "error"})
    counts = {level: sum(f.level == level for f in findings) for level in ("ok", "warning", "error")}
    print(f"{counts['ok']} ok, {counts['warning']} warnings, {counts['error']} errors", flush=True)
    if bad and len(hosts) > 1:
        print(f"hosts with errors: {','.join(bad)} (sbatch --exclude={','.join(bad)} keeps them out)", flush=True)
    if path is not None:
        path.write_text(json.dumps({"counts": counts, "findings": [asdict(f) for f in findings]}, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
