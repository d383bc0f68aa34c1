# An image with lorafit, for processors and for NVIDIA GPUs. docs/install.md shows how to build and run it.
#
# A linter and tests/release read this file. No test builds it.

FROM python:3.12.11-slim-bookworm AS build
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /dist .

FROM python:3.12.11-slim-bookworm
LABEL org.opencontainers.image.title="lorafit" \
      org.opencontainers.image.licenses="Apache-2.0"

# lorafit compiles its CPU kernels at the first use, for the processor that it runs on: g++ belongs to the image.
# On a GPU torch.compile needs the C compiler that comes with it. Debian removes old versions: none is pinned.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/*

# torch's own wheel index. For GPUs: https://download.pytorch.org/whl/cu130, which brings the CUDA libraries along.
# The version of its builds ends in +cpu or +cu130, which pip ranks above the same version of PyPI.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# The names stand in docs/install.md.
ARG EXTRAS=serve,verify,gguf
# The wheel was built above, and its metadata bounds the versions of what it needs.
# hadolint ignore=DL3013
RUN --mount=type=bind,from=build,source=/dist,target=/dist \
    set -- /dist/*.whl \
 && pip install --no-cache-dir --extra-index-url "${TORCH_INDEX}" "$1[${EXTRAS}]"

# The user who owns what a run writes: give the id of the user outside (`id -u`).
ARG UID=1000
RUN useradd --no-log-init --create-home --uid "${UID}" lorafit \
 && install --directory --owner=lorafit /cache /work
# Downloaded models, tokens of data sets and compiled kernels, which the next container finds again.
ENV LORAFIT_CACHE=/cache/lorafit \
    HF_HOME=/cache/huggingface
VOLUME /cache
WORKDIR /work
USER ${UID}
ENTRYPOINT ["lorafit"]
CMD ["--help"]
