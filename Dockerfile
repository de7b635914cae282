# DualParal Studio.
#   GPUs:  docker build -t dualparal . && docker run --gpus all --shm-size 8g -p 7860:7860 -v dualparal:/data dualparal
#   CPU:   docker build -t dualparal-cpu --build-arg VARIANT=cpu . && docker run -p 7860:7860 -v dualparal:/data dualparal-cpu
# No model is in the image: weights are downloaded once into the volume at /data. docs/deployment.md says what was tried.
ARG VARIANT=cuda

# The CUDA image brings no Python; python3-dev and gcc serve torch.compile's kernels.
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04 AS base-cuda
ENV TORCH_INDEX=
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 python3-venv python3-dev gcc \
    && rm -rf /var/lib/apt/lists/*

# PyTorch's own index has a build without CUDA, several GB smaller.
FROM python:3.11-slim-bookworm AS base-cpu
ENV TORCH_INDEX=https://download.pytorch.org/whl/cpu

# hadolint ignore=DL3006
FROM base-${VARIANT}
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1 \
    VIRTUAL_ENV=/home/user/venv \
    PATH=/home/user/venv/bin:$PATH

# Ubuntu's image has a user 1000 of its own; Spaces run containers as 1000, who must own what it writes.
RUN if id -u 1000 >/dev/null 2>&1; then userdel -r "$(id -un 1000)"; fi \
    && useradd -m -u 1000 user \
    && mkdir -p /data /app \
    && chown user:user /data /app
USER 1000
WORKDIR /app

# torch first and by itself: it is the largest layer and changes least.
# hadolint ignore=DL3013
RUN python3 -m venv "$VIRTUAL_ENV" \
    && pip install torch==2.13.0 ${TORCH_INDEX:+--index-url "$TORCH_INDEX"}
COPY --chown=1000:1000 requirements.txt ./
RUN pip install -r requirements.txt
COPY --chown=1000:1000 . .
# So that a running container writes to /data and /tmp only.
RUN python -m compileall -q dualparal

ENV HF_HOME=/data/huggingface \
    DUALPARAL_OUTPUTS=/data/outputs \
    DUALPARAL_CACHE=/data/cache \
    GRADIO_SERVER_NAME=0.0.0.0 \
    GRADIO_SERVER_PORT=7860
VOLUME /data
EXPOSE 7860
# Loading a 14B model takes minutes; until then the page answers and /readyz says 503.
HEALTHCHECK --interval=30s --timeout=5s --start-period=30m \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:7860/readyz', timeout=4)"]
CMD ["python", "app.py"]
