#!/usr/bin/env bash
# Sets up (quick the second time) and runs every test that can run on this machine.
# Arguments go to pytest: scripts/test.sh tests/unit    or    scripts/test.sh -m "not slow"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
activate_venv
# Tests start many small processes; threads that spin while they wait would fight for the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" WANDB_SILENT=true
ruff check .
exec python -m pytest "$@"
