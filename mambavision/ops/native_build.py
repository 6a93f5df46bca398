"""Compiles the C++ kernels at first use, once per user, source, torch, compiler and machine, and loads them.

Many ranks may start at once on a shared filesystem: one builds under a file lock, the others wait. The finished library
only ever appears under its final name by an atomic rename, so a filesystem without locks costs time, not correctness.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

SOURCE_DIRECTORY = Path(__file__).parent / "native"


@dataclass(frozen=True)
class Source:
    """A file of `native/`. With per_isa it is compiled once per instruction set, with NATIVE_ISA naming it (isa.h)."""

    name: str
    per_isa: bool = False


# To add kernels, add their file here: all become one library. Headers beside them count for the cache by themselves.
# The longest to compile come first, so that at the end no core waits for one of them.
SOURCES = (
    Source("autograd.cpp"),
    Source("operators.cpp"),
    Source("token_inference.cpp"),
    Source("conv_inference.cpp"),
    Source("scan.cpp"),
    Source("depthwise_conv.cpp"),
    Source("gelu.cpp"),
    Source("linear_training.cpp"),
    Source("attention_training.cpp"),
    Source("norm_training.cpp"),
    Source("optimizer.cpp"),
    Source("isa.cpp"),
    Source("matrix_units.cpp"),
    Source("gelu_table.cpp"),
    Source("scan_kernel.cpp", per_isa=True),
    Source("scan_backward_kernel.cpp", per_isa=True),
    Source("depthwise_conv_kernel.cpp", per_isa=True),
    Source("gelu_kernel.cpp", per_isa=True),
    Source("pack_kernel.cpp", per_isa=True),
    Source("attention_kernel.cpp", per_isa=True),
    Source("norm_kernel.cpp", per_isa=True),
    Source("row_kernels.cpp", per_isa=True),
    Source("panel_kernel.cpp", per_isa=True),
    Source("optimizer_kernel.cpp", per_isa=True),
)

# No -march=native: it would put the build machine's instructions into inline functions that nothing guards.
# No -ffast-math: its re-association removes the rounding tricks of the exponential, fast and wrong.
COMPILE_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi")
_AVX512_FLAGS = ("-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")
ISA_FLAGS = {
    "x86_64": {
        "baseline": (),
        "avx2": ("-mavx2", "-mfma"),
        "avx512": _AVX512_FLAGS,
        "avx512bf16": (*_AVX512_FLAGS, "-mavx512bf16"),
    },
}


class NativeBuildError(RuntimeError):
    """The kernels cannot be compiled or loaded here; the message says why and what to install."""


@cache
def load_native() -> object | None:
    """The namespace torch.ops.mambavision with the compiled kernels, or None after one warning that says why not."""
    try:
        library = find_or_build()
        _load(library)
    except NativeBuildError as error:
        warnings.warn(
            f"the compiled CPU kernels are not available: {error}\n"
            "Training and inference on the CPU go on in plain PyTorch: the selective scan about 20 times slower, a "
            "whole training step about half as fast. CUDA is not affected.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return torch.ops.mambavision


def find_or_build() -> Path:
    """Path of the compiled library, built if the cache has none. Raises NativeBuildError."""
    directory = cache_directory() / _machine_key()
    compiler = find_compiler()
    if compiler is None:
        # A compute node without a compiler can use what the login node built.
        built = sorted(directory.glob("*.so"), key=lambda path: path.stat().st_mtime)
        if built:
            return built[-1]
        raise NativeBuildError(
            f"no C++ compiler found (looked for {looked_for()}). Install one with `apt install g++` or "
            "`conda install -c conda-forge gxx`, or run once on a node that has one: the result is kept in "
            f"{cache_directory()}"
        )
    library = directory / f"{_compiler_key(compiler)}.so"
    if library.exists():
        return library
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _locked(library.with_suffix(".lock")):
            if not library.exists():
                print(
                    f"compiling the CPU kernels into {library.parent}, once: one to three minutes of processor time",
                    file=sys.stderr,
                    flush=True,
                )
                _build(compiler, library)
    except OSError as error:
        raise NativeBuildError(
            f"cannot write to the cache {directory} ({error}); set MAMBAVISION_CACHE to a directory you can write to"
        ) from error
    return library


def cache_directory() -> Path:
    """$MAMBAVISION_CACHE, else $XDG_CACHE_HOME/mambavision, else ~/.cache/mambavision; libraries lie in native/."""
    if explicit := os.environ.get("MAMBAVISION_CACHE"):
        return Path(explicit) / "native"
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mambavision" / "native"
    except RuntimeError as error:  # neither $HOME nor an entry in the password file
        raise NativeBuildError(f"no place for the cache ({error}); set MAMBAVISION_CACHE to a directory") from error


def find_compiler() -> str | None:
    """The C++ compiler: $CXX if set, else the first of c++, g++, clang++ on the path."""
    if explicit := os.environ.get("CXX"):
        return shutil.which(explicit)
    return next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)


def looked_for() -> str:
    """For messages: what `find_compiler` takes."""
    if explicit := os.environ.get("CXX"):
        return f"CXX={explicit}: a program's name or path, without arguments"
    return "c++, g++, clang++; $CXX names another"


def _machine_key() -> str:
    """Of all that the library depends on apart from the compiler: sources, flags, torch, C library, machine."""
    digest = hashlib.sha256(repr((SOURCES, COMPILE_FLAGS, ISA_FLAGS)).encode())
    for path in sorted(SOURCE_DIRECTORY.iterdir()):
        if path.suffix in (".cpp", ".h"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    libc = "".join(platform.libc_ver())
    return f"{platform.machine()}-torch{torch.__version__}-{libc}-{digest.hexdigest()[:16]}"


def _compiler_key(compiler: str) -> str:
    answer = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        raise NativeBuildError(f"the compiler {compiler} does not run: {answer.stderr.strip()[-500:]}")
    if sys.platform == "linux" and "clang" in answer.stdout:
        raise NativeBuildError(
            f"{compiler} is clang, whose OpenMP is not the one that torch brings; install g++ and, if CXX is set, set CXX=g++"
        )
    return hashlib.sha256(answer.stdout.encode()).hexdigest()[:16]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        # Some cluster filesystems have no locks: then several ranks build, and the last rename stands.
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(compiler: str, library: Path) -> None:
    """Compiles all sources in parallel beside the cache's place for them, links, and renames into it."""
    isa_flags = ISA_FLAGS.get(platform.machine(), {"baseline": ()})
    torch_directory = Path(torch.__file__).parent
    includes = [f"-I{torch_directory / 'include'}", f"-I{torch_directory / 'include/torch/csrc/api/include'}"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as temporary:
        jobs: dict[str, list[str]] = {}
        for source in SOURCES:
            for isa, flags in isa_flags.items() if source.per_isa else [("", ())]:
                target = f"{temporary}/{Path(source.name).stem}{isa and '_' + isa}.o"
                named = [f"-DNATIVE_ISA={isa}"] if isa else []
                path = str(SOURCE_DIRECTORY / source.name)
                jobs[target] = [compiler, *COMPILE_FLAGS, abi, *includes, *flags, *named, "-c", path, "-o", target]
        with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
            list(pool.map(_run, jobs.values()))
        unfinished = f"{temporary}/{library.name}"
        # No -fopenmp in the link: the calls then bind to the OpenMP runtime that torch has loaded, the only one.
        _run([compiler, "-shared", *jobs, f"-L{torch_directory / 'lib'}", "-ltorch_cpu", "-lc10", "-o", unfinished])
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, library)


def _run(command: list[str]) -> None:
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        raise NativeBuildError(f"`{' '.join(command)}` failed:\n{(answer.stdout + answer.stderr).strip()[-2000:]}")


def _load(library: Path) -> None:
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise NativeBuildError(f"{library} does not load ({error}); delete it to have it built again") from error
