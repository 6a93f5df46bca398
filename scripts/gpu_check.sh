#!/usr/bin/env bash
# Everything that needs a GPU, in under 8 minutes: the GPU tests, then the benchmarks named below, our inference also by the
# paper's protocol (batch 128, fp16, channels last). Writes one JSON: {"machine", "tests", "benchmarks"}.
#
#   scripts/gpu_check.sh [gpu_check.json]
#
# Exit code 0: all passed. A benchmark that fails or overruns its share of the time is named in the JSON and fails the check.
set -uo pipefail
cd "$(dirname "$0")/.."
out="${1:-gpu_check.json}"
limit_seconds="${GPU_CHECK_SECONDS:-470}"
python="${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}"

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu_check: no CUDA device (torch.cuda.is_available() is False). On a SLURM cluster: srun --gres=gpu:1 $0" >&2
    exit 2
fi

parts="$(mktemp -d)"
trap 'rm -rf "$parts"' EXIT
deadline=$((SECONDS + limit_seconds))
left() { echo $((deadline - SECONDS > 5 ? deadline - SECONDS : 5)); }

beside=() # most of a test's time is compilation
"$python" -c 'import xdist' 2>/dev/null && beside=(-n 6)
timeout -k 10 $((limit_seconds / 2)) "$python" -m pytest tests/gpu -q "${beside[@]}" --junit-xml "$parts/tests.xml"
echo $? > "$parts/tests.code"

benchmarks=( # name in the report: script and arguments
    "scan: bench_scan.py --rounds 5 --batch 128"
    "optimizer: bench_optimizer.py --models mambavision_t,mambavision_b"
    "checkpoint: bench_checkpoint.py --model mambavision_b"
    "paper_protocol: bench_step.py --paper-protocol --modes infer --models mambavision_t --compile off --rounds 5"
    "step: bench_step.py --modes infer,train --compile off --channels-last on --rounds 5 --seconds 0.5"
    "compiled_step: bench_step.py --modes train --compile reduce-overhead --channels-last on --rounds 5 --seconds 0.5"
)
remaining=${#benchmarks[@]}
for benchmark in "${benchmarks[@]}"; do
    name="${benchmark%%: *}"
    read -ra words <<<"${benchmark#*: }"
    share=$(($(left) / remaining))
    remaining=$((remaining - 1))
    echo "== ${words[*]} (up to $share s)"
    timeout -k 10 "$share" "$python" "scripts/${words[0]}" "${words[@]:1}" --json "$parts/$name.json"
    echo $? > "$parts/$name.code"
done

"$python" - "$parts" "$out" <<'PYTHON'
import contextlib, json, sys, xml.etree.ElementTree as xml
from pathlib import Path

import torch

parts, out = Path(sys.argv[1]), Path(sys.argv[2])
properties = torch.cuda.get_device_properties(0)
report = {
    "machine": {
        "device": properties.name, "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory, "torch": torch.__version__, "cuda": torch.version.cuda,
    },
    "tests": {"exit_code": int((parts / "tests.code").read_text())},
    "benchmarks": {},
}
with contextlib.suppress(OSError, xml.ParseError):  # stopped before it was written, or within
    suite = next(xml.parse(parts / "tests.xml").getroot().iter("testsuite"))
    report["tests"] |= {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
for code in sorted(set(parts.glob("*.code")) - {parts / "tests.code"}):
    exit_code, measured = int(code.read_text()), {}
    with contextlib.suppress(OSError, ValueError):
        measured = json.loads(code.with_suffix(".json").read_text())
    cause = {"cause": "ran out of its share of the time"} if exit_code in (124, 137) else {}
    report["benchmarks"][code.stem] = {"exit_code": exit_code, **cause, **measured}
out.write_text(json.dumps(report, indent=1) + "\n")
failed = [name for name, part in {"tests": report["tests"], **report["benchmarks"]}.items() if part["exit_code"]]
print(f"gpu_check: {'failed: ' + ', '.join(failed) if failed else 'all passed'}; report in {out}")
sys.exit(bool(failed))
PYTHON
