"""Compiles data/native/ at first use, once per user, source, compiler and machine, and loads it through ctypes.

Plain C++17 and libjpeg(-turbo): no torch, no OpenCV. Instruction sets are chosen when the library runs, so one build
serves every machine of an architecture. Many ranks may start at once: one builds under a lock, the others wait.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ctypes import c_double, c_int64, c_void_p
from functools import cache
from pathlib import Path

from mambavision.ops.native_build import cache_directory, find_compiler, looked_for

SOURCE_DIRECTORY = Path(__file__).parent / "native"
# -ffp-contract=off: pixels are the same bytes on every machine only if no compiler fuses multiplications and additions.
COMPILE_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-shared",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-pthread",
    "-Wno-psabi",
)


class NativeUnavailable(RuntimeError):
    """The decoder cannot be compiled or loaded here; the message says why and what to install."""


class Settings(ctypes.Structure):
    """data/native/settings.h, field for field."""

    _fields_ = (
        ("seed", c_int64),
        ("epoch", c_int64),
        ("image_size", c_int64),
        ("evaluate", c_int64),
        ("filter", c_int64),
        ("resized_side", c_int64),
        ("squash", c_int64),
        ("random_crop", c_int64),
        ("pad_crop", c_int64),
        ("scale", c_double * 2),
        ("ratio", c_double * 2),
        ("hflip", c_double),
        ("policy", c_int64),
        ("layers", c_int64),
        ("increasing", c_int64),
        ("prob", c_double),
        ("magnitude", c_double),
        ("magnitude_std", c_double),
        ("magnitude_max", c_double),
        ("jitter", c_double),
        ("fill", c_int64 * 3),
        ("substitute", c_int64),
        ("num_samples", c_int64),
        ("file", c_void_p),
        ("file_size", c_int64),
        ("metadata", c_void_p),
        ("metadata_stride", c_int64),
        ("failures", c_void_p),
    )


SIGNATURES = {
    "loader_decode": (c_int64, (c_void_p, c_void_p, *(c_int64,) * 5, c_void_p, c_int64)),
    "loader_decode_batch": (None, (c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_void_p)),
    "loader_new_pool": (c_void_p, (c_int64,)),
    "loader_delete_pool": (None, (c_void_p,)),
    "loader_new_log": (c_void_p, ()),
    "loader_delete_log": (None, (c_void_p,)),
    "loader_take_failures": (c_int64, (c_void_p, c_void_p, c_int64)),
    "loader_settings_size": (c_int64, ()),
    "loader_usable": (c_int64, ()),
    "loader_use_isa": (c_int64, (c_int64,)),
    "loader_draw": (None, (c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p)),
    "loader_apply": (None, (c_void_p, c_int64, c_int64, c_double, c_int64, c_void_p)),
    "loader_resize": (c_int64, (c_void_p, *(c_int64,) * 9, c_void_p)),
    "loader_decode_whole": (c_int64, (c_void_p, c_int64)),
    "loader_normalize": (None, (c_void_p, c_void_p, c_int64, c_void_p, c_void_p)),
}


@cache
def load_library() -> ctypes.CDLL:
    """The decoder's library, compiled if the cache has none. Raises NativeUnavailable."""
    path = _find_or_build()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeUnavailable(f"{path} does not load ({error}); delete it to have it built again") from error
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    assert library.loader_settings_size() == ctypes.sizeof(Settings), "settings.h and Settings differ"
    if not library.loader_usable():
        raise NativeUnavailable(
            "the libjpeg found at run time is another than the one whose headers were compiled against; "
            f"make them agree (apt install libjpeg-dev, or one conda environment) and delete {path}"
        )
    return library


def loaded_library() -> ctypes.CDLL | None:
    """The library if this process has loaded it already: for what is not worth compiling it."""
    return load_library() if load_library.cache_info().currsize else None


def _find_or_build() -> Path:
    directory = cache_directory() / f"loader-{platform.machine()}-{_source_key()}"
    compiler = find_compiler()
    if compiler is None:
        # A compute node without a compiler uses what the login node built: whole libraries, named by a hash.
        built = sorted(directory.glob("[0-9a-f]" * 16 + ".so"))
        if built:
            return built[-1]
        raise NativeUnavailable(
            f"no C++ compiler found (looked for {looked_for()}). Install one with "
            "`apt install g++ libjpeg-dev` or `conda install -c conda-forge gxx libjpeg-turbo`, or run once on a node "
            f"that has one: the result is kept in {cache_directory()}"
        )
    version = _run([compiler, "--version"])
    library = directory / f"{hashlib.sha256(version.encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _locked(library.with_suffix(".lock")):
            if not library.exists():
                _build(compiler, library)
    except OSError as error:
        raise NativeUnavailable(
            f"cannot write to the cache {directory} ({error}); set MAMBAVISION_CACHE to a directory you can write to"
        ) from error
    return library


def _source_key() -> str:
    digest = hashlib.sha256(repr((COMPILE_FLAGS, platform.libc_ver())).encode())
    for path in sorted(SOURCE_DIRECTORY.iterdir()):
        if path.suffix in (".cpp", ".h"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _build(compiler: str, library: Path) -> None:
    """Compiles in a directory beside the final place and renames from there, so no half library is ever seen.

    The compiler makes the file itself: it then has the mode of the umask, and every user of a shared cache can read it.
    """
    sources = [str(path) for path in sorted(SOURCE_DIRECTORY.glob("*.cpp"))]
    prefix = os.environ.get("CONDA_PREFIX")
    places = [f"-I{prefix}/include", f"-L{prefix}/lib", f"-Wl,-rpath,{prefix}/lib"] if prefix else []
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as temporary:
        unfinished = f"{temporary}/{library.name}"
        _run([compiler, *COMPILE_FLAGS, *places, *sources, "-ljpeg", "-o", unfinished])
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, library)


def _run(command: list[str]) -> str:
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode == 0:
        return answer.stdout
    hint = ""
    if "jpeglib.h" in answer.stderr or "-ljpeg" in answer.stderr or "JCS_EXT_RGBX" in answer.stderr:
        hint = "libjpeg-turbo's headers are missing: `apt install libjpeg-dev` or `conda install libjpeg-turbo`\n"
    raise NativeUnavailable(f"{hint}`{' '.join(command)}` failed:\n{answer.stderr.strip()[-2000:]}")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        with suppress(OSError):  # some cluster filesystems have no locks: several ranks build, the last rename stands
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
