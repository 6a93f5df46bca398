"""Runs a program whose Triton kernels are interpreted, on CPU tensors: Triton decides at import, hence a process of its own."""

import os
import subprocess
import sys


def interpret(program: str, *arguments: str) -> str:
    """What the program prints. Raises AssertionError with the end of its messages if it fails."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
