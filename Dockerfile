# mkaq for GPU servers. CUDA comes with torch's own wheels from PyPI, so the base
# is plain Python; the host needs the NVIDIA driver (580 or newer, for CUDA 13) and
# the NVIDIA Container Toolkit. Without a GPU the same image works on the CPU.
#
#   docker build -t mkaq .
#   docker build -t mkaq:eval --build-arg EXTRAS=eval --build-arg VERSION=0.1.0 .
#
#   docker run --rm mkaq recipes
#   mkdir -p runs models ~/.cache/huggingface    # else docker makes them, as root
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD/runs:/runs" mkaq run tiny_llama_int4
#   docker run --rm --gpus all --user "$(id -u):$(id -g)" -e HF_TOKEN \
#       -v "$PWD/models:/models:ro" -v "$HOME/.cache/huggingface:/cache/huggingface" -v "$PWD/runs:/runs" \
#       mkaq run /runs/recipe.yaml
#
# `docker stop` interrupts as Ctrl-C does: the same `docker run` resumes.

ARG BASE=python:3.11-slim

# A C compiler is needed at RUN time: on a GPU, torch >= 2.13 computes some plain
# products (the rotary tables of every Llama) with Triton, which compiles its
# launcher with gcc (and with Python's headers: the official image has them; a BASE
# of another kind needs its python3-dev). bitsandbytes' CPU kernels link to libgomp1.
FROM ${BASE} AS base
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev libgomp1 \
    && rm -rf /var/lib/apt/lists/*

FROM base AS build
WORKDIR /src
RUN python -m venv /opt/mkaq
ENV PATH=/opt/mkaq/bin:$PATH
# Nothing is installed but what requirements/ names, by version and sha256, and mkaq itself, last: a change of
# its code does not download CUDA again. `make lock` writes the lists.
ARG PIP="pip install --no-cache-dir --no-deps --no-build-isolation"
COPY requirements/ requirements/
RUN $PIP --require-hashes --only-binary :all: -r requirements/image.txt
# Optional extras, comma-separated: eval, gguf, gptqmodel, llamacpp.
ARG EXTRAS=""
RUN for extra in $(echo "$EXTRAS" | tr , ' '); do \
        $PIP --require-hashes -r "requirements/$extra.txt" || exit 1; \
    done
COPY pyproject.toml README.md LICENSE ./
COPY mkaq/ mkaq/
COPY recipes/ recipes/
RUN $PIP . && pip check

FROM base
ARG VERSION=dev
LABEL org.opencontainers.image.title="mkaq" \
      org.opencontainers.image.description="Merge the similar layers of a large language model, quantize the rest, ship one verified artifact." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"

# The writable folders are open like /tmp, so that `--user` may name anyone.
RUN useradd --uid 1000 --create-home --shell /usr/sbin/nologin mkaq \
    && install -d -o mkaq -g mkaq /models \
    && install -d -o mkaq -g mkaq -m 1777 /cache /runs

COPY --from=build /opt/mkaq /opt/mkaq

ENV PATH=/opt/mkaq/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/cache/huggingface \
    XDG_CACHE_HOME=/cache \
    MPLCONFIGDIR=/cache/matplotlib \
    TRITON_CACHE_DIR=/cache/triton \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

USER mkaq
# Results go to runs/NAME below the working directory: /runs/NAME.
WORKDIR /
VOLUME ["/models", "/cache", "/runs"]
STOPSIGNAL SIGINT
ENTRYPOINT ["mkaq"]
CMD ["--help"]
