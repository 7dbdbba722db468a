# The project with all that its demo and its tests need, on a CPU or on GPUs.
#
#   docker build -t halonet .                                  for a CPU
#   docker build -t halonet --build-arg CUDA=cu126 .           for GPUs, with Paddle for this CUDA
#   docker run --rm halonet                                    the demo
#   docker run --rm halonet ./run_tests.sh                     the tests
#   docker run --rm -it --gpus all --shm-size 16g -v /data:/data halonet bash
FROM python:3.11-slim-bookworm
ARG CUDA=
# g++ compiles the operators, git names the commit in machine.json, setpriv of util-linux ends what a script started
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git util-linux \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /halonet
COPY . .
RUN python3 -m venv .venv
RUN if [ -n "$CUDA" ]; then .venv/bin/python -m pip install --no-cache-dir paddlepaddle-gpu==3.3.1 -i "https://www.paddlepaddle.org.cn/packages/stable/$CUDA/"; fi
RUN PIP_NO_CACHE_DIR=1 tools/setup_env.sh requirements-dev.txt
RUN .venv/bin/python -m ops
CMD ["./run_demo.sh"]
