#!/usr/bin/env bash
# From nothing to a trained, evaluated MambaVision on this machine: set-up, Fashion-MNIST as .beton files, training
# through FFCV, LAMB and EMA, evaluation. About ten minutes on two CPU cores, most of it training; no GPU, no account.
# Further arguments go to train.py, for instance: scripts/demo.sh trainer.epochs=1
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
activate_venv

DATA="${MAMBAVISION_DEMO_DATA:-$HOME/.cache/mambavision/fashion_mnist}"
RUN_NAME=demo
for argument in "$@"; do case "$argument" in run_name=*) RUN_NAME="${argument#run_name=}" ;; esac; done

python scripts/prepare_data.py fashion_mnist --out "$DATA"
python train.py experiment=demo data.path="$DATA" run_name="$RUN_NAME" "$@"
python eval.py checkpoint="runs/$RUN_NAME"
echo
echo "The run lies in $PWD/runs/$RUN_NAME: config.yaml, metrics.jsonl, status.json, checkpoints/, wandb/."
echo "The same command continues it; 'wandb sync runs/$RUN_NAME/wandb/offline-run-*' uploads it."
