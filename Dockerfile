# Image for x86-64 machines with NVIDIA GPUs (docs/docker.md says why it is built like this and what was checked):
#   docker build --tag megatron_mmrl .
#   docker run --rm --gpus all --ipc host --init --volume /shared:/workspace megatron_mmrl train --config F
# CUDA's development tools stay in the image, as SGLang compiles kernels when it runs. The CUDA version is that of torch
# 2.13.0's wheel: apex refuses to be compiled with another.
FROM nvidia/cuda:13.0.2-cudnn-devel-ubuntu24.04@sha256:ae7f650405a3964972dacfa889273bf8e3fbe9709899afd187da01c4cdff3105
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

# Ubuntu's packages are those of this moment (snapshot.ubuntu.com). CUDA's own archive has no snapshots and is not needed.
ARG UBUNTU_SNAPSHOT=20261101T000000Z
# hadolint ignore=DL3008
RUN rm -f /etc/apt/sources.list.d/cuda* \
    && echo "APT::Snapshot \"${UBUNTU_SNAPSHOT}\";" > /etc/apt/apt.conf.d/50snapshot \
    && apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        build-essential ca-certificates git libnuma1 python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3.12 -m venv /opt/venv \
    && useradd --create-home --shell /bin/bash --uid 10001 mmrl \
    && install --directory --owner mmrl --group mmrl /workspace
ENV PATH=/opt/venv/bin:$PATH CUDA_HOME=/usr/local/cuda PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# From what changes least to what changes most: all wheels, what is compiled against them, this project.
WORKDIR /opt/megatron_mmrl
COPY requirements/cuda-lock.txt requirements/
RUN pip install --no-deps --require-hashes -r requirements/cuda-lock.txt

# Compute capabilities to compile for: 8.0 A100, 9.0 H100 and H200. One job needs about 4 GB of memory.
ARG TORCH_CUDA_ARCH_LIST="8.0;9.0"
ARG MAX_JOBS=8
COPY requirements/cuda-source.txt requirements/
RUN NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_FRAMEWORK=pytorch \
    pip install --no-deps --no-build-isolation --require-hashes -r requirements/cuda-source.txt
# NVIDIA's apex exists as source only; the package of that name in package indices is another project.
ARG APEX_SOURCE=https://github.com/NVIDIA/apex
ARG APEX_COMMIT=8a6508aaad6e75a2b939e33f308cd63d745d97f1
RUN git init --quiet /tmp/apex \
    && git -C /tmp/apex fetch --quiet --depth 1 "${APEX_SOURCE}" "${APEX_COMMIT}" \
    && git -C /tmp/apex checkout --quiet "${APEX_COMMIT}" \
    && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-deps --no-build-isolation /tmp/apex \
    && rm -rf /tmp/apex

COPY . .
RUN pip install --no-deps --no-build-isolation -e . \
    && mmrl doctor versions

USER 10001:10001
WORKDIR /workspace
ENTRYPOINT ["mmrl"]
CMD ["--help"]
