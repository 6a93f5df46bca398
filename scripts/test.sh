#!/usr/bin/env bash
# Sets up (quick the second time) and tests.
#   scripts/test.sh            units, integration, and the faults that a run meets most: about a quarter of an hour
#   scripts/test.sh --all      everything that can run here: also the whole fault suite, the soaks and a real SLURM
#   scripts/test.sh ARGUMENTS  what pytest is told:  scripts/test.sh tests/unit -m "not slow"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
activate_venv
# Tests start many small processes; threads that spin while they wait would fight for the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-100}" WANDB_SILENT=true
ruff check .
ruff format --check .
if [ $# = 0 ]; then
    set -- tests/unit tests/integration tests/gpu tests/faults/test_kills.py tests/faults/test_checkpoints.py
elif [ "$1" = --all ]; then
    shift
fi
exec python -m pytest "$@"
