# MambaVision training with CUDA. Build:  docker build -t mambavision .
#   docker run --gpus all --ipc=host -v /data/imagenet-ffcv:/data -v $PWD/runs:/runs mambavision \
#       torchrun --standalone --nproc_per_node=8 train.py model=mambavision_t data.path=/data output_dir=/runs
# On SLURM: enroot import dockerd://mambavision (pyxis) or apptainer build mambavision.sif docker-daemon://mambavision:latest,
# then name it in slurm/env.sh.
ARG CUDA=12.8.1
FROM nvidia/cuda:${CUDA}-cudnn-devel-ubuntu24.04

ARG TORCH_INDEX=https://download.pytorch.org/whl/cu128
# mamba-ssm up to 2.3.2 is C++17, the headers of torch 2.14 are C++20 (requirements-gpu.txt). With MAMBA_SSM=0 any will do.
ARG TORCH="torch>=2.8,<2.14"
# The architectures that mamba-ssm's kernels are compiled for: A100, H100. Ours are compiled at run time.
ARG TORCH_CUDA_ARCH_LIST="8.0;9.0"
ARG MAMBA_SSM=1

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

# The archive keeps only the newest version of each package, so none is pinned.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        g++ git libjpeg-turbo8-dev libopencv-core-dev libopencv-imgproc-dev libturbojpeg0-dev ninja-build pkg-config \
        python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/mambavision
# The packages first: they change less often than the code.
COPY requirements.txt requirements-dev.txt requirements-gpu.txt pyproject.toml ./
COPY scripts/setup.sh scripts/setup.sh
COPY mambavision/__init__.py mambavision/__init__.py
RUN python3 -m venv .venv \
    && .venv/bin/pip install "${TORCH}" torchvision --index-url "${TORCH_INDEX}" \
    && scripts/setup.sh \
    && if [ "${MAMBA_SSM}" = 1 ]; then \
        TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST}" MAX_JOBS=8 \
        .venv/bin/pip install --no-build-isolation -r requirements-gpu.txt; fi

ENV PATH=/opt/mambavision/.venv/bin:$PATH VIRTUAL_ENV=/opt/mambavision/.venv
COPY . .
# Compile the native kernels now, so that a read-only image starts at once; another processor compiles its own. The check
# takes synthetic data, so FFCV and its keyed decoder, which every real run needs, are loaded by name.
RUN python -c 'import ffcv.libffcv; from data.native_library import load_library; load_library()' \
    && python -c 'from mambavision.ops.native_build import load_native; load_native()' \
    && python scripts/doctor.py experiment=tiny logger=jsonl output_dir=/tmp/runs

CMD ["python", "scripts/doctor.py", "experiment=tiny", "logger=jsonl", "output_dir=/tmp/runs"]
