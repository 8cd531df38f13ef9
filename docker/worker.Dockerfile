# A worker: one stage of a pipeline on one GPU, or on CPUs.
#
#   docker build -f docker/worker.Dockerfile -t asyncpipe-worker:cpu .
#   docker build -f docker/worker.Dockerfile -t asyncpipe-worker:cuda --build-arg DEVICE=cuda .
#
# BASE is any image with Python 3.11 to 3.13, pip and venv. The CUDA build uses the same one: torch's CUDA wheels bring their
# own CUDA, cuDNN and NCCL libraries, and the NVIDIA Container Toolkit mounts the driver's. A base like nvidia/cuda would add
# the same libraries a second time, and no Python.
ARG BASE=python:3.12-slim

FROM ${BASE} AS build
# DEVICE chooses the index that torch comes from: for cpu PyTorch's index of CPU builds, for cuda pip's own index, whose
# builds for Linux have CUDA. TORCH_INDEX names another one; empty, it is pip's own in any case.
ARG DEVICE=cpu
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=auto
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
RUN python3 -m venv /opt/asyncpipe
ENV PATH=/opt/asyncpipe/bin:$PATH
# PyTorch's headers and tests are of no use here.
# hadolint ignore=DL3013
RUN case "${DEVICE}:${TORCH_INDEX}" in \
      cpu:auto) index=https://download.pytorch.org/whl/cpu ;; \
      cuda:auto) index= ;; \
      cpu:*|cuda:*) index="${TORCH_INDEX}" ;; \
      *) echo "DEVICE is cpu or cuda, not ${DEVICE}" >&2; exit 1 ;; \
    esac \
    && pip install --only-binary=:all: ${index:+--index-url "${index}"} "${TORCH}" \
    && rm -rf /opt/asyncpipe/lib/python*/site-packages/torch/include \
       /opt/asyncpipe/lib/python*/site-packages/torch/test
# What we depend on, before what we are: this layer is built again only when pyproject.toml changes.
COPY pyproject.toml ./
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
print(*project['dependencies'], *project['optional-dependencies']['worker'], sep='\n')" > requirements.txt \
    && pip install --only-binary=:all: -r requirements.txt
COPY . .
RUN pip install --no-deps . \
    && pip uninstall --yes pip

FROM ${BASE}
LABEL org.opencontainers.image.title="asyncpipe worker" \
      org.opencontainers.image.description="Computes one stage of a language model for an asyncpipe coordinator" \
      org.opencontainers.image.licenses="Apache-2.0"
# /keys and /cache belong to the user, and so do the volumes that are first mounted there.
RUN groupadd --gid 10001 asyncpipe \
    && useradd --uid 10001 --gid 10001 --home-dir /cache --no-create-home --shell /usr/sbin/nologin asyncpipe \
    && install --directory --owner=asyncpipe --group=asyncpipe --mode=0700 /keys /cache
COPY docker/worker_health.py /usr/local/lib/asyncpipe/
COPY --from=build /opt/asyncpipe /opt/asyncpipe
ENV PATH=/opt/asyncpipe/bin:$PATH \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HOME=/cache/huggingface \
    XDG_CACHE_HOME=/cache \
    TMPDIR=/cache \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
WORKDIR /cache
HEALTHCHECK --interval=15s --timeout=10s --start-period=60s --retries=3 \
    CMD ["python", "-IS", "/usr/local/lib/asyncpipe/worker_health.py"]
ENTRYPOINT ["asyncpipe-worker"]
