"""Building the kernels: what is said without a compiler, where the result is kept, many processes at once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data.native_library import load_library
from mambavision.ops import native_build
from mambavision.ops.native_build import NativeBuildError, find_or_build, load_native

LOAD = (
    "import warnings; warnings.simplefilter('always'); from mambavision.ops.native_build import load_native; "
    "print(load_native() is not None, load_native() is not None)"
)
# The last source is small and needs no other: enough for a real build of a library that loads.
LOAD_PART = "from mambavision.ops import native_build; native_build.SOURCES = native_build.SOURCES[-1:]; " + LOAD


@pytest.mark.slow
def test_no_compiler_gives_one_warning_with_reason_cost_and_cure(tmp_path):
    environment = {**os.environ, "PATH": "/nonexistent", "CXX": "", "MAMBAVISION_CACHE": str(tmp_path)}
    answer = subprocess.run([sys.executable, "-c", LOAD], env=environment, capture_output=True, text=True, check=False)
    assert answer.stdout.split() == ["False", "False"], answer.stderr
    assert answer.stderr.count("RuntimeWarning") == 1
    for part in ("no C++ compiler found", "20 times slower", "apt install g++"):
        assert part in answer.stderr


def test_failing_compiler_is_quoted_and_leaves_nothing_behind(tmp_path, monkeypatch):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\n[ \"$1\" = --version ] && echo fake && exit 0\necho 'out of swap' >&2; exit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("MAMBAVISION_CACHE", str(tmp_path / "cache"))
    with pytest.raises(NativeBuildError, match="out of swap"):
        find_or_build()
    assert not list((tmp_path / "cache").rglob("*.so")) and not list((tmp_path / "cache").rglob("build-*"))


def test_unwritable_cache_names_the_variable_to_set(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MAMBAVISION_CACHE", str(tmp_path / "file"))
    with pytest.raises(NativeBuildError, match="set MAMBAVISION_CACHE"):
        find_or_build()


def test_clang_is_refused_with_what_to_set(tmp_path, monkeypatch):
    """It compiles the kernels, but they then want an OpenMP runtime that torch does not bring."""
    compiler = tmp_path / "clang++"
    compiler.write_text("#!/bin/sh\necho 'Debian clang version 14.0.6'\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(NativeBuildError, match=r"is clang, .*CXX=g\+\+"):
        find_or_build()


def test_a_compiler_with_arguments_and_a_user_without_a_home_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv("MAMBAVISION_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "g++ -m64")
    with pytest.raises(NativeBuildError, match=r"CXX=g\+\+ -m64: a program's name or path, without arguments"):
        find_or_build()
    for name in ("MAMBAVISION_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(
        Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory."))
    )
    with pytest.raises(NativeBuildError, match="no place for the cache .*set MAMBAVISION_CACHE"):
        find_or_build()


def test_cache_follows_the_environment(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.delenv("MAMBAVISION_CACHE", raising=False)
    assert native_build.cache_directory() == Path("/xdg/mambavision/native")
    monkeypatch.setenv("MAMBAVISION_CACHE", "/mine")
    assert native_build.cache_directory() == Path("/mine/native")


def test_node_without_a_compiler_uses_what_another_built(tmp_path, monkeypatch):
    monkeypatch.setenv("MAMBAVISION_CACHE", str(tmp_path))
    monkeypatch.setattr(native_build, "find_compiler", lambda: None)
    built = native_build.cache_directory() / native_build._machine_key() / "0123.so"
    built.parent.mkdir(parents=True)
    built.write_bytes(b"")
    assert find_or_build() == built


def test_a_changed_source_or_compiler_is_another_library(monkeypatch, tmp_path):
    before = native_build._machine_key()
    (tmp_path / "scan.cpp").write_text("int changed;")
    monkeypatch.setattr(native_build, "SOURCE_DIRECTORY", tmp_path)
    assert native_build._machine_key() != before


@pytest.mark.skipif(native_build.find_compiler() is None, reason="no C++ compiler here")
def test_where_there_is_a_compiler_both_libraries_are_built_and_loaded():
    """Tests of the kernels and of the decoder are skipped without them; a source that does not compile must not pass for that."""
    assert find_or_build().exists() and load_native() is not None
    assert load_library() is not None  # raises with what is wrong and what to install


@pytest.mark.skipif(load_native() is None, reason="no C++ compiler here")
def test_library_brings_no_second_openmp_runtime():
    library = find_or_build()
    needed = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    assert "libgomp" not in needed and "libomp" not in needed
    maps = Path("/proc/self/maps").read_text()
    assert len({line.split()[-1] for line in maps.splitlines() if "libgomp" in line}) == 1


@pytest.mark.slow
@pytest.mark.skipif(native_build.find_compiler() is None, reason="no C++ compiler here")
def test_processes_starting_at_once_share_one_build(tmp_path):
    environment = {**os.environ, "MAMBAVISION_CACHE": str(tmp_path)}
    starts = [
        subprocess.Popen([sys.executable, "-c", LOAD_PART], env=environment, stdout=subprocess.PIPE) for _ in range(3)
    ]
    assert [process.communicate()[0].split() for process in starts] == [[b"True", b"True"]] * 3
    assert len(list(tmp_path.rglob("*.so"))) == 1
    assert not list(tmp_path.rglob("build-*"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("aarch64-linux-gnu-g++") is None, reason="no compiler for aarch64 here")
@pytest.mark.parametrize("source", [source.name for source in native_build.SOURCES if source.per_isa])
def test_kernels_compile_for_arm(source, tmp_path):
    command = ["aarch64-linux-gnu-g++", *native_build.COMPILE_FLAGS, "-DNATIVE_ISA=baseline", "-c"]
    path = str(native_build.SOURCE_DIRECTORY / source)
    subprocess.run([*command, path, "-o", str(tmp_path / "kernel.o")], check=True)
