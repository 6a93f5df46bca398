# scripts/setup.sh is bash's; make's own shell is dash on Debian and Ubuntu.
SHELL := /bin/bash

.PHONY: setup demo test test-all test-fast test-faults test-slurm lint
setup:        ; scripts/setup.sh
demo:         ; scripts/demo.sh
test:         ; scripts/test.sh
test-all:     ; scripts/test.sh --all
test-fast:    ; scripts/test.sh tests/unit -m "not slow"
test-faults:  ; scripts/test.sh tests/faults
test-slurm:   ; scripts/test.sh tests/slurm
lint:         ; . scripts/setup.sh && activate_venv && ruff check . && ruff format --check .
