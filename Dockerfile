# DualParal Studio.
#   GPUs:  docker build -t dualparal . && docker run --gpus all --shm-size 8g -p 7860:7860 -v dualparal:/data dualparal
#   CPU:   docker build -t dualparal-cpu --build-arg BASE=python:3.11-slim-bookworm --build-arg TORCH_INDEX=... .
#          with the address of PyTorch's CPU index, which saves several GB of CUDA packages
# No model is in the image: weights are downloaded once into the volume at /data.
ARG BASE=nvidia/cuda:13.0.1-runtime-ubuntu24.04
FROM ${BASE}

ARG TORCH_INDEX=
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1

# The CUDA image brings no Python; the slim Python image brings its own. python3-dev and gcc serve torch.compile's kernels.
# hadolint ignore=DL3008
RUN if ! command -v pip >/dev/null; then \
        apt-get update \
        && apt-get install -y --no-install-recommends python3 python3-venv python3-dev gcc curl \
        && rm -rf /var/lib/apt/lists/*; \
    fi \
    && (id -u 1000 >/dev/null 2>&1 && userdel -r "$(id -un 1000)" || true) \
    && useradd -m -u 1000 user \
    && mkdir -p /data /app \
    && chown user:user /data /app

USER user
WORKDIR /app
ENV VIRTUAL_ENV=/home/user/venv
ENV PATH=$VIRTUAL_ENV/bin:$PATH
RUN python3 -m venv "$VIRTUAL_ENV"

# torch first and by itself: it is the largest layer and changes least.
RUN pip install torch==2.13.0 ${TORCH_INDEX:+--index-url "$TORCH_INDEX"}
COPY --chown=user:user requirements.txt ./
RUN pip install -r requirements.txt
COPY --chown=user:user . .

ENV HF_HOME=/data/huggingface \
    DUALPARAL_OUTPUTS=/data/outputs \
    GRADIO_SERVER_NAME=0.0.0.0 \
    GRADIO_SERVER_PORT=7860
VOLUME /data
EXPOSE 7860
# Loading a 14B model takes minutes; until then the page answers and /readyz says 503.
HEALTHCHECK --interval=30s --timeout=5s --start-period=30m \
    CMD python -c "import urllib.request as r; r.urlopen('http://127.0.0.1:7860/readyz', timeout=4)"
CMD ["python", "app.py"]
