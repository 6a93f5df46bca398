# The environment of every job, sourced by slurm/train.sbatch on the first node before anything else. Edit it for your
# cluster, or keep your own copy and name it in MAMBAVISION_ENV. It must leave $PYTHON; $ROOT is the repository.
# shellcheck shell=bash disable=SC2034

# ---- Python: a module, a virtual environment, or a container -----------------------------------------------------------
# module purge; module load cuda/12.8 gcc/13
if [ -z "${PYTHON:-}" ]; then
    if [ -x "$ROOT/.venv/bin/python" ]; then PYTHON=$ROOT/.venv/bin/python; else PYTHON=$(command -v python3); fi
fi
PATH="$(dirname "$PYTHON"):$PATH"
export PATH
# Containers: PYTHON is then the container's, and all Python of a job runs in it: the ranks, and what train.sbatch asks
# about the settings before it starts them. The repository, the run directory and the data have the same paths inside.
#   PYTHON=/opt/mambavision/.venv/bin/python                              # where the Dockerfile puts it; and either
#   export CONTAINER="apptainer exec --nv --bind $ROOT,$PWD,/data /shared/mambavision.sif"     # a prefix to $PYTHON, or
#   SRUN_ARGS=(--container-image=/shared/mambavision.sqsh --container-mounts="$ROOT:$ROOT,$PWD:$PWD,/data:/data"
#       --container-workdir="$PWD")                                       # SLURM's pyxis plugin, for every srun

# ---- threads ----------------------------------------------------------------------------------------------------------
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # each rank sets its own share of the cores (trainer.threads)
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1

# ---- NCCL -------------------------------------------------------------------------------------------------------------
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1} # a dead peer ends the run instead of hanging it
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000} # flight recorder: the last collectives before a hang
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# export NCCL_SOCKET_IFNAME=ib0      # where nodes have several networks: the one for the rendezvous and for gloo
# export GLOO_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5            # InfiniBand adapters to use
