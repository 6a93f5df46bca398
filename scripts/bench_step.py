"""Images per second of training and inference steps: MambaVision beside timm's models, interleaved, each at its best.

    python scripts/bench_step.py --models mambavision_t,swin_tiny_patch4_window7_224,convnext_tiny --json step.json
    python scripts/bench_step.py --paper-protocol --modes infer          # on a GPU: the paper's way of measuring

For each model and mode the settings (weights cast or autocast, memory format, compiled or not) are tried once and the
best is kept; then the models take turns, `--rounds` times. Reported: medians, their spread, the ratio of the first to
each other model (median of the ratios within a round), and the share of a matrix product's speed in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

# Keeps the allocator from returning the activations of each step to the system and faulting them in again (8 to 10 % of
# a training step on a CPU). Read by the C library at start, so the script starts itself again with it; holds for all
# models alike.
MALLOC_TUNABLES = "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592"
COMPILE_MODES = ("default", "reduce-overhead")  # of torch.compile; the second one has CUDA graphs
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def main() -> None:
    args = parse_arguments()
    import torch

    device = args.device if args.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu" and "GLIBC_TUNABLES" not in os.environ and not args.plain_malloc and sys.platform == "linux":
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "GLIBC_TUNABLES": MALLOC_TUNABLES})
    if args.threads:
        torch.set_num_threads(args.threads)
    args.batch = args.batch or (128 if device == "cuda" else 32)
    if args.dtype == "auto":
        from mambavision.engine.precision import hardware_has_bf16

        args.dtype = "bf16" if hardware_has_bf16(torch.device(device)) else "fp32"
    bench = Bench(args, device, getattr(torch, DTYPES[args.dtype]))
    peak = bench.matmul_peak()
    machine = machine_description(device) | {"matmul_tflops": round(peak / 1e12, 3), "dtype": args.dtype}
    print(f"{machine['processor']}, {machine['threads']} threads, matmul {args.dtype}: {peak / 1e12:.2f} TFLOP/s")
    results = []
    for mode in args.modes.split(","):
        results += bench.compare(args.models.split(","), mode, peak)
        if args.json:
            Path(args.json).write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="mambavision_t,swin_tiny_patch4_window7_224,convnext_tiny")
    parser.add_argument("--modes", default="infer,train", help="infer, train, or both")
    parser.add_argument("--batch", type=int, help="images a step; default: 32, on CUDA 128")
    parser.add_argument("--image-size", type=int, default=224, help="side of the square, px")
    told = "auto: bf16 where the hardware computes in it, else fp32"
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help=told)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default: PyTorch's choice")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each model, taken in turns; at least 5")
    parser.add_argument("--seconds", type=float, default=2.0, help="least length of one measurement")
    compile_choices = ["try", "on", "off", *COMPILE_MODES]
    parser.add_argument("--compile", choices=compile_choices, default="try", help="try: per model the best, eager too")
    parser.add_argument("--channels-last", choices=["try", "on", "off"], default="try")
    parser.add_argument("--drop-path", type=float, default=0.2, help="stochastic depth in training, the same for all")
    parser.add_argument("--plain-malloc", action="store_true", help="CPU: leave the C library's allocator as it is")
    parser.add_argument(
        "--paper-protocol",
        action="store_true",
        help="inference as the paper measures it: batch 128, fp16, channels-last, 100 warm-ups, 500 runs, one wait",
    )
    parser.add_argument("--json", help="write machine and results here")
    args = parser.parse_args()
    if args.rounds < 5:
        parser.error(f"--rounds {args.rounds}: medians of fewer than 5 are not worth reporting")
    if args.paper_protocol:
        args.batch, args.dtype, args.channels_last = 128, "fp16", "on"
    return args


@dataclass(frozen=True)
class Setting:
    """How a model is run. `weights`: autocast | cast (stored in the dtype; ours also folds its normalisations)."""

    weights: str
    channels_last: bool
    mode: str | None  # of torch.compile; None: eager

    def __str__(self) -> str:
        layout = "channels-last" if self.channels_last else "contiguous"
        return f"{self.weights}, {layout}, {f'compiled ({self.mode})' if self.mode else 'eager'}"


class Bench:
    """Builds steps and times them."""

    def __init__(self, args: argparse.Namespace, device: str, dtype) -> None:
        self.args, self.device, self.dtype = args, device, dtype

    def compare(self, names: list[str], mode: str, peak: float) -> list[dict]:
        """The rows of one mode: the best setting of each model, then rounds in turns."""
        steps, settings, flops = {}, {}, {}
        for name in names:
            steps[name], settings[name], flops[name] = self.best_step(name, mode)
        rates: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(self.args.rounds):
            for name in names:
                rates[name].append(self.rate(steps[name]))
        rows = []
        for name in names:
            median = statistics.median(rates[name])
            ratios = [first / other for first, other in zip(rates[names[0]], rates[name], strict=True)]
            row = {
                "model": name,
                "mode": mode,
                "dtype": self.args.dtype,
                "img_per_sec": round(median, 2),
                "n": self.args.rounds,
                "spread": [round(min(rates[name]), 2), round(max(rates[name]), 2)],
                "batch": self.args.batch,
                "image_size": self.args.image_size,
                "setting": str(settings[name]),
                "gflop_per_img": round(flops[name] / self.args.batch / 1e9, 2),
                "share_of_matmul_peak": round(flops[name] / self.args.batch * median / peak, 3),
                f"ratio_{names[0]}_to_this": round(statistics.median(ratios), 3),
                "ratio_spread": [round(min(ratios), 3), round(max(ratios), 3)],
            }
            rows.append(row)
            print(
                f"{mode:5} {name:32} {median:9.1f} img/s [{row['spread'][0]}, {row['spread'][1]}]  "
                f"{names[0]} is {statistics.median(ratios):.2f}x [{min(ratios):.2f}, {max(ratios):.2f}]  "
                f"{row['share_of_matmul_peak']:.0%} of peak  ({row['setting']})",
                flush=True,
            )
        return rows

    def best_step(self, name: str, mode: str) -> tuple[Callable[[], None], Setting, float]:
        """Each setting timed once; the fastest step is kept."""
        best, best_rate, best_setting = None, 0.0, None
        for setting in self.settings(mode):
            step = self.build(name, mode, setting)
            self.rate(step, seconds=0.0)
            rate = self.rate(step, seconds=self.args.seconds / 2)
            print(f"  tried {mode} {name}: {rate:.1f} img/s ({setting})", file=sys.stderr, flush=True)
            if rate > best_rate:
                best, best_rate, best_setting = step, rate, setting
        # A backward takes two products for each of the forward's. Not counted itself: the counter takes the backward of
        # a depthwise convolution for that of a full one.
        forward = self.count_flops(self.build(name, "infer", Setting("autocast", False, None), batch=1))
        return best, best_setting, forward * (3 if mode == "train" else 1) * self.args.batch

    def settings(self, mode: str) -> list[Setting]:
        layouts = {"try": [True, False], "on": [True], "off": [False]}[self.args.channels_last]
        modes = COMPILE_MODES if self.device == "cuda" else COMPILE_MODES[:1]
        modes = {"try": [None, *modes], "on": modes, "off": [None]}.get(self.args.compile, [self.args.compile])
        weights = ["cast", "autocast"] if mode == "infer" and self.args.dtype != "fp32" else ["autocast"]
        if mode == "infer" and self.args.dtype == "fp32":
            weights = ["cast"]
        return [Setting(w, layout, mode) for mode in modes for layout in layouts for w in weights]

    def build(self, name: str, mode: str, setting: Setting, batch: int | None = None) -> Callable[[], None]:
        """A call that runs one step of a model on one fixed random batch."""
        import timm
        import torch

        import mambavision  # noqa: F401  registers ours with timm
        from mambavision.engine.compilation import compiled
        from mambavision.models import MambaVision, fuse_for_inference

        torch.manual_seed(0)
        layout = torch.channels_last if setting.channels_last else torch.contiguous_format
        model = timm.create_model(name, num_classes=1000, drop_path_rate=self.args.drop_path).to(self.device)
        size, batch = self.args.image_size, batch or self.args.batch
        images = torch.randn(batch, 3, size, size, device=self.device).to(memory_format=layout)
        autocast = nullcontext
        if self.args.dtype != "fp32" and setting.weights == "autocast":

            def autocast():
                return torch.autocast(self.device, dtype=self.dtype)

        if mode == "infer":
            model = model.eval()
            if setting.weights == "cast":
                ours = isinstance(model, MambaVision)
                model = fuse_for_inference(model, self.dtype) if ours else model.to(self.dtype)
                images = images.to(self.dtype)
            model = model.to(memory_format=layout)
            run, before_forward = compiled(model, setting.mode)

            def infer() -> None:
                before_forward()
                with torch.inference_mode(), autocast():
                    run(images)

            return infer

        model = model.train().to(memory_format=layout)
        run, before_forward = compiled(model, setting.mode)
        targets = torch.randint(1000, (batch,), device=self.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        scaler = torch.amp.GradScaler(self.device, enabled=self.args.dtype == "fp16")

        def train() -> None:
            before_forward()
            with autocast():
                loss = torch.nn.functional.cross_entropy(run(images).float(), targets)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

        return train

    def rate(self, step: Callable[[], None], seconds: float | None = None) -> float:
        """Images per second over at least so long (0: three steps to warm up, not worth a figure)."""
        seconds = self.args.seconds if seconds is None else seconds
        paper = self.args.paper_protocol and seconds == self.args.seconds
        waits_every = 1 if self.device == "cpu" else 10  # a GPU waited for each time idles while the next is queued
        for _ in range(100 if paper else 1):
            step()
        self.wait()
        done, begin = 0, time.perf_counter()
        while done < (500 if paper else 3 * waits_every) or (not paper and time.perf_counter() - begin < seconds):
            step()
            done += 1
            if not paper and done % waits_every == 0:
                self.wait()
        self.wait()
        return done * self.args.batch / (time.perf_counter() - begin)

    def wait(self) -> None:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()

    def count_flops(self, step: Callable[[], None]) -> float:
        """Floating-point operations of the products and convolutions of `step` (the scan's are not counted)."""
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            step()
        return float(counter.get_total_flops())

    def matmul_peak(self) -> float:
        """FLOP/s of a square matrix product: the best of a few sizes."""
        import torch

        best = 0.0
        for n in (1024, 2048, 4096) if self.device == "cpu" else (4096, 8192):
            a, b = torch.randn(2, n, n, device=self.device, dtype=self.dtype).unbind(0)
            times = []
            for _ in range(8):
                self.wait()
                begin = time.perf_counter()
                a @ b
                self.wait()
                times.append(time.perf_counter() - begin)
            best = max(best, 2 * n**3 / min(times))
            if min(times) > 0.5:  # emulated: larger ones would take minutes
                break
        return best


def machine_description(device: str) -> dict:
    import torch

    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        processor = names[0] if names else processor
    if device == "cuda":
        processor = torch.cuda.get_device_name()
    return {
        "processor": processor,
        "device": device,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "malloc": os.environ.get("GLIBC_TUNABLES", "default"),
        "command": " ".join(["python", *sys.argv]),
    }


if __name__ == "__main__":
    main()
