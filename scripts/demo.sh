#!/usr/bin/env bash
# From nothing to a trained, evaluated MambaVision on this machine: set-up, Fashion-MNIST as .beton files, training
# through FFCV, LAMB and EMA, evaluation. About ten minutes on two CPU cores, most of it training; no GPU, no account.
# Further arguments go to train.py, for instance: scripts/demo.sh trainer.epochs=1
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
activate_venv

DATA="${MAMBAVISION_DEMO_DATA:-$HOME/.cache/mambavision/fashion_mnist}"
SETTINGS=(experiment=demo data.path="$DATA" run_name=demo "$@")

python scripts/prepare_data.py fashion_mnist --out "$DATA"
RUN="$(python train.py --run-dir "${SETTINGS[@]}")"
python train.py "${SETTINGS[@]}"
python eval.py checkpoint="$RUN"
echo
echo "The run lies in $(realpath -m "$RUN"): config.yaml, metrics.jsonl, status.json, checkpoints/, wandb/."
echo "The same command continues it; 'wandb sync $RUN/wandb/offline-run-*' uploads it."
