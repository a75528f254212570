# A whole cluster in one container: torch, Ray, Redis server. For GPUs run it with --gpus all; there is no nvcc here, so
# base it on a CUDA development image, or copy a cache filled by `python -m baton.kernels.build` to ~/.cache/baton.
# Build from the repository's root: docker build -f deploy/worker.Dockerfile -t baton .
# The project's tests do not build this image.
FROM python:3.11-slim
WORKDIR /opt/baton
COPY . .
# Editable, so that the bundled model in models/ is found.
RUN pip install --no-cache-dir -e ".[worker]" && useradd --create-home baton
USER baton
EXPOSE 50051 8000 9400
# It listens to all that reach the container: set BATON_API_KEYS, and TLS, wherever that is more than this machine.
# Ray keeps KV that is on its way in shared memory: run with --shm-size=1g or more.
ENTRYPOINT ["baton", "serve", "--host", "0.0.0.0", "--log-format", "json"]
