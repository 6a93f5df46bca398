.PHONY: setup demo test test-fast test-faults test-slurm lint
setup:        ; scripts/setup.sh
demo:         ; scripts/demo.sh
test:         ; scripts/test.sh
test-fast:    ; scripts/test.sh tests/unit -m "not slow"
test-faults:  ; scripts/test.sh tests/faults -m "faults or slow or not slow"
test-slurm:   ; scripts/test.sh tests/slurm -m "slurm or not slurm"
lint:         ; . scripts/setup.sh && activate_venv && ruff check . && ruff format --check .
