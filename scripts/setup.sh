#!/usr/bin/env bash
# Installs what the project needs: system libraries (apt), then .venv with requirements-dev.txt. Quick the second time.
# Use:  source scripts/setup.sh && activate_venv     (scripts/demo.sh and scripts/test.sh do)
#   or  scripts/setup.sh                             to set up and do nothing else
#   PYTHON=python3.12 chooses the interpreter of a new .venv.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"

say() { printf '\033[1m[setup]\033[0m %s\n' "$*" >&2; }
die() { printf '[setup] %s\n' "$*" >&2; exit 1; }

# Debian/Ubuntu packages: 50 MB in all (libopencv-dev would be 640 MB, and ffcv uses only core and imgproc).
APT_PACKAGES=(g++ pkg-config libopencv-core-dev libopencv-imgproc-dev libturbojpeg0-dev libjpeg62-turbo-dev)

missing_system_packages() {
    command -v g++ >/dev/null || echo g++
    command -v pkg-config >/dev/null || echo pkg-config
    [ -e /usr/include/opencv4/opencv2/core.hpp ] || pkg-config --exists opencv4 2>/dev/null || echo libopencv-core-dev
    [ -e /usr/include/opencv4/opencv2/imgproc.hpp ] || pkg-config --exists opencv4 2>/dev/null || echo libopencv-imgproc-dev
    header turbojpeg.h || echo libturbojpeg0-dev
    header jpeglib.h || [ "$(os_id)" = ubuntu ] || echo libjpeg62-turbo-dev
    header jpeglib.h || [ "$(os_id)" != ubuntu ] || echo libjpeg-turbo8-dev
}
header() { echo "#include <stddef.h>
#include <stdio.h>
#include <$1>" | g++ -E -x c++ - >/dev/null 2>&1; }
os_id() { . /etc/os-release 2>/dev/null; echo "${ID:-unknown}"; }

install_system_packages() {
    local missing python_missing=""
    missing="$(missing_system_packages | tr '\n' ' ')"
    "${PYTHON:-python3}" -c 'import venv, ensurepip' 2>/dev/null || python_missing="python3 python3-venv python3-dev"
    "${PYTHON:-python3}" -c 'import os, sysconfig as s; assert os.path.exists(s.get_path("include") + "/Python.h")' 2>/dev/null \
        || python_missing="python3 python3-venv python3-dev"
    missing="$(echo $missing $python_missing)"
    [ -n "$missing" ] || return 0
    local sudo=""
    if [ "$(id -u)" != 0 ]; then
        sudo -n true 2>/dev/null && sudo="sudo -n" \
            || die "missing system packages and no root to install them. Ask for: sudo apt-get install -y --no-install-recommends $missing"
    fi
    command -v apt-get >/dev/null || die "missing: $missing (no apt-get here; install the same libraries with this system's package manager)"
    say "installing system packages: $missing"
    $sudo apt-get update -qq
    DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends $missing >/dev/null
}

# ffcv's setup.py asks pkg-config for "opencv4" and includes opencv2/opencv.hpp; Debian ships both only in the full
# libopencv-dev. Two small files stand in for them, so ffcv itself is built unpatched.
write_opencv_shim() {
    local shim="$1"
    mkdir -p "$shim/include/opencv2"
    printf '#pragma once\n#include <opencv2/core.hpp>\n#include <opencv2/imgproc.hpp>\n' > "$shim/include/opencv2/opencv.hpp"
    printf 'Name: OpenCV\nDescription: core+imgproc\nVersion: 4\nCflags: -I%s/include -I/usr/include/opencv4\nLibs: -lopencv_imgproc -lopencv_core\n' \
        "$shim" > "$shim/opencv4.pc"
}

install_ffcv() {
    "$VENV/bin/python" -c 'import importlib.metadata as m; m.version("ffcv")' 2>/dev/null && return 0
    say "building ffcv"
    local shim="$VENV/opencv-shim"
    pkg-config --exists opencv4 2>/dev/null || { write_opencv_shim "$shim"; export PKG_CONFIG_PATH="$shim:${PKG_CONFIG_PATH:-}"; }
    "$VENV/bin/pip" install -q --no-deps --no-build-isolation "$(grep -E '^ffcv' "$ROOT/requirements.txt")"
}

setup() {
    local stamp="$VENV/.setup-stamp" want
    want="$(cat "$ROOT"/requirements.txt "$ROOT"/requirements-dev.txt "$ROOT"/scripts/setup.sh | sha256sum)"
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ] && return 0
    install_system_packages
    if [ ! -x "$VENV/bin/python" ]; then
        "${PYTHON:-python3}" -c 'import sys; assert (3, 10) <= sys.version_info[:2] <= (3, 13)' 2>/dev/null \
            || die "Python 3.10 to 3.13 is needed, found $("${PYTHON:-python3}" --version 2>&1); choose one with PYTHON=python3.11 $0"
        say "creating .venv"
        "${PYTHON:-python3}" -m venv "$VENV"
    fi
    say "installing Python packages (the first time a few minutes: torch is large)"
    local list="$VENV/requirements-without-ffcv.txt"
    grep -hvE '^(ffcv|-r )' "$ROOT/requirements.txt" "$ROOT/requirements-dev.txt" > "$list"
    "$VENV/bin/pip" install -q --disable-pip-version-check --no-compile -r "$list"
    install_ffcv
    "$VENV/bin/pip" install -q --no-deps --no-build-isolation -e "$ROOT"
    echo "$want" > "$stamp"
}

activate_venv() { export PATH="$VENV/bin:$PATH" VIRTUAL_ENV="$VENV"; }

setup
if [ "${BASH_SOURCE[0]}" = "$0" ]; then say "ready: $VENV"; fi
