# The coordinator, and the client library: no torch, no model.
#
#   docker build -f docker/coordinator.Dockerfile -t asyncpipe-coordinator .
#
# BASE is any image with Python 3.11 to 3.13, pip and venv.
ARG BASE=python:3.12-slim

FROM ${BASE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
RUN python3 -m venv /opt/asyncpipe
ENV PATH=/opt/asyncpipe/bin:$PATH
# What we depend on, before what we are: this layer is built again only when pyproject.toml changes.
COPY pyproject.toml ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > requirements.txt \
    && pip install --only-binary=:all: -r requirements.txt
COPY . .
RUN pip install --no-deps . \
    && pip uninstall --yes pip setuptools

FROM ${BASE}
LABEL org.opencontainers.image.title="asyncpipe coordinator" \
      org.opencontainers.image.description="Schedules pipeline-parallel LLM inference on asyncpipe workers" \
      org.opencontainers.image.licenses="Apache-2.0"
# /keys and /cache belong to the user, and so do the volumes that are first mounted there.
RUN groupadd --gid 10001 asyncpipe \
    && useradd --uid 10001 --gid 10001 --home-dir /cache --no-create-home --shell /usr/sbin/nologin asyncpipe \
    && install --directory --owner=asyncpipe --group=asyncpipe --mode=0700 /keys /cache
COPY --from=build /opt/asyncpipe /opt/asyncpipe
ENV PATH=/opt/asyncpipe/bin:$PATH \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HOME=/cache/huggingface \
    XDG_CACHE_HOME=/cache \
    TMPDIR=/cache
USER 10001:10001
WORKDIR /cache
EXPOSE 5550
HEALTHCHECK --interval=15s --timeout=10s --start-period=60s --retries=3 \
    CMD ["sh", "-c", "asyncpipe-coordinator status \"${ASYNCPIPE_BIND:-tcp://127.0.0.1:5550}\" --json > /dev/null"]
ENTRYPOINT ["asyncpipe-coordinator"]
CMD ["--help"]
