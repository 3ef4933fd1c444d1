# PICARD and DIA. The locked PyTorch runs on CPUs, and on NVIDIA GPUs with `docker run --gpus all`:
#   docker build -t picard-dia .
# A smaller image for CPUs alone: TORCH_INDEX is the address of PyTorch's own index of CPU wheels.
#   docker build -t picard-dia --build-arg TORCH_INDEX=ADDRESS .
FROM python:3.11-slim

ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 OMP_WAIT_POLICY=PASSIVE

# Before the code, so that a change of the code does not install all of this again.
WORKDIR /opt/picard-dia
COPY requirements.lock ./
ARG TORCH_INDEX=
RUN if [ -z "$TORCH_INDEX" ]; then pip install --require-hashes -r requirements.lock; else \
    pip install --index-url "$TORCH_INDEX" $(grep -oE '^torch(vision)?==[^ ]+' requirements.lock) && \
    awk '/^[a-z]/ {skip = /^(torch|torchvision|triton|nvidia-|cuda-)/} !skip' requirements.lock > rest.lock && \
    pip install --require-hashes --no-deps -r rest.lock; fi

COPY . .
RUN pip install --no-deps --no-build-isolation -e . && \
    useradd --create-home --uid 1000 researcher && chown -R researcher .

# Results go to folders below this one, see configs/default.yaml: mount yours there.
USER researcher
CMD ["python", "-m", "common.selfcheck"]
