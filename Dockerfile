# Image for machines with NVIDIA GPUs: docker build -t megatron_mmrl .
# Transformer Engine and apex are compiled here against the torch that SGLang pins; a wheel made for another torch
# breaks. This takes an hour or so. The tests of this repository run without a GPU and do not build this image.
FROM nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04

# Compute capabilities to compile for: 8.0 A100, 9.0 H100 and H200, 10.0 B200.
ARG TORCH_CUDA_ARCH_LIST="8.0;9.0;10.0"
ARG NVTE_CUDA_ARCHS="80;90;100"
ARG APEX_SOURCE="https://github.com/NVIDIA/apex"
ARG APEX_VERSION="25.09"
ARG MAX_JOBS=8
ENV TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST} NVTE_CUDA_ARCHS=${NVTE_CUDA_ARCHS} NVTE_FRAMEWORK=pytorch MAX_JOBS=${MAX_JOBS}

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        build-essential git libnuma1 ninja-build python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3.12 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

WORKDIR /opt/megatron_mmrl
COPY requirements requirements
RUN pip install --no-cache-dir torch==2.13.0 \
    && pip install --no-cache-dir -r requirements/cuda.txt
RUN pip install --no-cache-dir --no-build-isolation -r requirements/cuda-source.txt
# The package called apex in package indices is something else; NVIDIA's exists as source only.
RUN git clone --depth 1 --branch "${APEX_VERSION}" "${APEX_SOURCE}" /tmp/apex \
    && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-cache-dir --no-build-isolation /tmp/apex \
    && rm -rf /tmp/apex

COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation -e . \
    && python -c "import torch, transformer_engine.pytorch, megatron.core, sglang; print(torch.__version__)"
ENTRYPOINT []
CMD ["mmrl", "--help"]
