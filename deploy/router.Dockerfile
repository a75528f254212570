# The router: no torch, no Ray. Build from the repository's root: docker build -f deploy/router.Dockerfile -t baton-router .
# The project's tests do not build this image.
FROM python:3.11-slim
WORKDIR /opt/baton
COPY . .
RUN pip install --no-cache-dir . && useradd --create-home baton
USER baton
EXPOSE 50051 8000 9400
# Wants BATON_ROUTER_CONFIG, one JSON object: router/config.py lists its fields.
ENTRYPOINT ["python", "-m", "baton.router"]
