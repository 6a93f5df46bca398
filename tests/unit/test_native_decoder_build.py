"""Building the decoder's library into a cache that several users and machines share."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from data import native_library
from data.native_library import NativeUnavailable
from mambavision.ops.native_build import find_compiler


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and one line of C++ in place of the decoder."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "one.cpp").write_text('extern "C" int one() { return 1; }\n')
    monkeypatch.setattr(native_library, "SOURCE_DIRECTORY", source)
    monkeypatch.setenv("MAMBAVISION_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
def test_a_built_library_can_be_read_by_whom_the_umask_lets(cache, umask):
    try:
        library = native_library._find_or_build()
    except NativeUnavailable as reason:
        pytest.skip(str(reason))
    assert library.stat().st_mode & 0o777 == 0o777 & ~umask
    assert {path.suffix for path in library.parent.iterdir()} == {".so", ".lock"}, "no build directory stays"


@pytest.fixture
def slow_compiler(tmp_path):
    """A compiler that writes half of its output and then takes for ever."""
    script = tmp_path / "slow_c++"
    script.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --version ]; then echo slow; exit; fi\n'
        'while [ "$1" != -o ]; do shift; done\n'
        'echo half > "$2"\n'
        "exec sleep 30\n"
    )
    script.chmod(0o755)
    return script


BUILD = """
import sys
from pathlib import Path
from data import native_library
native_library.SOURCE_DIRECTORY = Path(sys.argv[1])
native_library._find_or_build()
"""


@pytest.mark.slow
def test_what_a_killed_build_left_is_never_taken_for_the_library(cache, slow_compiler, monkeypatch):
    command = [sys.executable, "-c", BUILD, str(native_library.SOURCE_DIRECTORY)]
    environment = {**os.environ, "CXX": str(slow_compiler)}
    build = subprocess.Popen(command, env=environment, start_new_session=True)
    while not (half := [path for path in cache.rglob("*.so") if path.read_bytes()]) and build.poll() is None:
        time.sleep(0.02)
    os.killpg(build.pid, 9)
    build.wait()
    directory = next(cache.glob("native/loader-*"))
    assert half
    (directory / "build-k3x0dq7e.so").write_bytes(b"half")  # as earlier versions named what they were building
    monkeypatch.setenv("CXX", "no-compiler-here")
    with pytest.raises(NativeUnavailable, match="no C\\+\\+ compiler found"):
        native_library._find_or_build()
    whole = directory / "0123456789abcdef.so"
    whole.write_bytes(b"whole")
    assert native_library._find_or_build() == whole
