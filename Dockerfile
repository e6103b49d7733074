# One image for the learner, the policy server, the simulator and the topics job. Two targets:
#   docker build .                   cpu, the default
#   docker build --target cuda .     for the NVIDIA container toolkit
# PyPI's PyTorch is the CUDA build, several GB. For a small cpu image say where pip finds PyTorch's CPU wheels:
#   docker build --build-arg PIP_OPTIONS='--extra-index-url URL' .
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS requirements
COPY pyproject.toml .
RUN python3 -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
      > requirements.txt

FROM ${PYTHON_IMAGE} AS installed
ARG PIP_OPTIONS=""
# the data folders exist with their owner, so that a named volume mounted there takes it over
RUN useradd --uid 10001 --user-group --create-home bellwether \
 && install -d -o bellwether -g bellwether \
      /var/lib/bellwether /var/lib/bellwether/learner /var/lib/bellwether/weights /var/lib/bellwether/numba \
 && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    NUMBA_CACHE_DIR=/var/lib/bellwether/numba
WORKDIR /opt/bellwether
# a layer that only new dependencies change: nothing else fetches PyTorch again
COPY --from=requirements requirements.txt .
RUN pip install --no-cache-dir ${PIP_OPTIONS} -r requirements.txt
COPY pyproject.toml .
COPY proto proto
COPY streaming streaming
COPY learner learner
COPY serving serving
COPY simulator simulator
# the packages read proto/ beside them, so they run from here and not from a copy
RUN touch README.md \
 && pip install --no-cache-dir --no-deps ${PIP_OPTIONS} --editable . \
 && python -m compileall -q streaming learner serving simulator
USER bellwether
EXPOSE 50051 9400
# holds for whatever is started with --metrics-port 9400; others bring their own check
HEALTHCHECK --interval=10s --timeout=5s --start-period=5m --retries=3 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9400/metrics', timeout=4)"]
CMD ["serving", "--help"]

FROM installed AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

FROM installed AS cpu
