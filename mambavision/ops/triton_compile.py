"""Compiles our Triton kernels for a GPU that need not be there, and reads what they need of it.

    python -m mambavision.ops.triton_compile [--json FILE]

Registers a thread, stack bytes a thread (where registers are spilled to), shared memory bytes a program, instructions
in the inner loop. The sizes are those that the network's own shapes lead to (N = 8). The optimizer's data are float32 alone.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mambavision.ops import triton_conv as conv
from mambavision.ops import triton_scan_chunks as chunks
from mambavision.ops import triton_scan_kernels as scan
from mambavision.ops.triton_scan import CHECKPOINT_EVERY, TILE
from mambavision.optim import triton_kernels as optimizer
from mambavision.optim import triton_lists as lists

ARCHITECTURES = (80, 90)
DTYPES = ("bf16", "fp32")
_SCAN_TILE = {"STATES": 8, "TILE": TILE}
_FORWARD = _SCAN_TILE | {"CHECKPOINT_EVERY": CHECKPOINT_EVERY, "GROUPS": 1}
_BACKWARD_TILE = {"GROUPS": 2, "WIDTH": 8}

# Pointers that are float32 whatever the data's dtype: parameters, states, sums.
_FLOAT32 = {
    "a_ptr", "d_ptr", "bias_ptr", "weight_ptr", "checkpoint_ptr", "chunk_state_ptr",
    "chunk_adjoint_ptr", "chunk_end_ptr", "chunk_begin_ptr", "chunk_dt_ptr",
    "db_dc_ptr", "channel_sum_ptr", "weight_sum_ptr",
    "step_ptr", "divisor_ptr", "refused_ptr", "sums_ptr", "ratio_ptr", "norm_ptr",
}  # fmt: skip
_INT64 = {"addresses_ptr", "blocks_ptr", "first_block_ptr"}
_FLOAT_SCALARS = {
    "lr", "log_beta1", "log_beta2", "one_minus_beta1", "one_minus_beta2", "eps", "weight_decay", "weight",
}  # fmt: skip


class Variant(NamedTuple):
    kernel: triton.JITFunction
    constants: dict[str, int | bool]
    warps: int
    dtypes: tuple[str, ...]  # of the data, each of which is another program


VARIANTS: dict[str, Variant] = {}


def _add(
    name: str,
    kernel: triton.JITFunction,
    constants: dict[str, int | bool],
    warps: int = 1,
    dtypes: tuple[str, ...] = DTYPES,
) -> None:
    VARIANTS[name] = Variant(kernel, constants, warps, dtypes)


for _width in (32, 16, 8):
    _constants = _FORWARD | {"WIDTH": _width, "CHUNKED": False}
    _add(f"scan forward, {_width} wide", scan.forward_kernel, _constants | {"SAVE": False})
    _add(f"scan forward, {_width} wide, training", scan.forward_kernel, _constants | {"SAVE": True})
_add("scan forward, 8 wide, chunked", scan.forward_kernel, _FORWARD | {"WIDTH": 8, "CHUNKED": True, "SAVE": True})
for _chunked in (False, True):
    _add(
        "scan backward" + ", chunked" * _chunked,
        scan.backward_kernel,
        _SCAN_TILE | _BACKWARD_TILE | {"CHECKPOINT_EVERY": CHECKPOINT_EVERY, "CHUNKED": _chunked},
    )
for _reverse in (False, True):
    _direction = "backward" if _reverse else "forward"
    _constants = _BACKWARD_TILE | {"REVERSE": _reverse}
    _add(f"scan chunk summary, {_direction}", chunks.chunk_summary_kernel, _SCAN_TILE | _constants)
    _add(f"scan chunk carry, {_direction}", chunks.chunk_carry_kernel, {"STATES": 8} | _constants)

for _kernel, _direction in ((conv.conv_forward_kernel, "forward"), (conv.conv_backward_kernel, "backward")):
    _add(f"conv + SiLU {_direction}", _kernel, {"TOKENS": conv.TOKENS, "CHANNELS": conv.CHANNELS}, conv.WARPS)

_block = {"BLOCK": lists.BLOCK}
for _name, _kernel, _constants, _warps in (
    ("LAMB moments", optimizer.lamb_moments_kernel, _block | {"TRUST": True}, lists.WARPS),
    ("LAMB step without decay", optimizer.lamb_moments_kernel, _block | {"TRUST": False}, lists.WARPS),
    ("LAMB trust ratios", optimizer.lamb_trust_kernel, {"WIDTH": lists.TRUST_WIDTH}, lists.TRUST_WARPS),
    ("LAMB step", optimizer.lamb_apply_kernel, _block, lists.WARPS),
    ("moving average", optimizer.average_kernel, _block, lists.WARPS),
    ("gradient norm, squares", optimizer.squares_kernel, _block, lists.WARPS),
    ("gradient norm", optimizer.norm_kernel, {"WIDTH": lists.NORM_WIDTH}, lists.NORM_WARPS),
):
    _add(_name, _kernel, _constants, _warps, ("fp32",))


class Usage(NamedTuple):
    """What one compiled kernel takes of a multiprocessor."""

    registers: int  # a thread; 65 536 a multiprocessor, 255 at most
    stack_bytes: int  # a thread, in (slow) local memory: 0 means nothing is spilled
    shared_bytes: int  # a program
    loop_instructions: int  # in the innermost loop that evaluates an exponential; 0 without such a loop


def compile_ahead(name: str, architecture: int, dtype: str) -> Usage:
    """Compiles the variant for a compute capability (80 = A100, 90 = H100), data in dtype (bf16, fp16, fp32)."""
    kernel, constants, warps, _ = VARIANTS[name]
    signature, attributes = {}, {}
    for position, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            continue
        is_pointer = argument.endswith("_ptr")
        signature[argument] = _type_of(argument, dtype)
        if is_pointer or argument.startswith("stride") or argument == "channels":
            attributes[(position,)] = [["tt.divisibility", 16]]  # what the launcher finds for the network's tensors
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps})
    return _read_usage(compiled.asm["cubin"], compiled.metadata.shared)


def _type_of(argument: str, dtype: str) -> str:
    if argument.endswith("_ptr"):
        return "*i64" if argument in _INT64 else "*fp32" if argument in _FLOAT32 else f"*{dtype}"
    return "fp32" if argument in _FLOAT_SCALARS else "i32"


def cuobjdump() -> Path:
    """The disassembler that comes with Triton's wheel."""
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def _read_usage(cubin: bytes, shared_bytes: int) -> Usage:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(cuobjdump()), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        listing = subprocess.run([command[0], "-sass", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{word}:(\d+)", text).group(1)) for word in ("REG", "STACK"))
    return Usage(registers, stack, shared_bytes, _count_inner_loop(listing))


def _count_inner_loop(listing: str) -> int:
    """A loop is what lies between a backward branch and its target."""
    instructions = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,6})\*/\s+([^;]*);", listing)]
    sizes = []
    for end, text in instructions:
        branch = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if branch and (begin := int(branch.group(1), 16)) < end:
            body = [text for at, text in instructions if begin <= at <= end]
            if any("MUFU.EX2" in text for text in body):
                sizes.append(len(body))
    return min(sizes, default=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    rows = []
    print(f"{'kernel':36} {'arch':5} {'dtype':5} {'registers':>9} {'stack B':>8} {'shared B':>8} {'loop':>5}")
    for name, variant in VARIANTS.items():
        for architecture in ARCHITECTURES:
            for dtype in variant.dtypes:
                usage = compile_ahead(name, architecture, dtype)
                rows.append({"name": name, "architecture": f"sm_{architecture}", "dtype": dtype, **usage._asdict()})
                print(f"{name:36} sm_{architecture} {dtype:5}", "{:9} {:8} {:8} {:5}".format(*usage))
    if arguments.json:
        arguments.json.write_text(json.dumps({"triton": triton.__version__, "results": rows}, indent=1))


if __name__ == "__main__":
    main()
