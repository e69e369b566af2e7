# docker build -t tinystory . && docker run -it -v "$PWD/runs:/tinystory/runs" tinystory
# With a GPU: add --build-arg BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04 to the first command, --gpus all to the second.
# The report is then in runs/demo/interact/report.html of this folder; without -v it would stay in the container. The
# compiled kernels stay in the volume `cache` if the second command has -v cache:/cache too.
ARG BASE=ubuntu:24.04
FROM ${BASE}
RUN apt-get update && apt-get install -y --no-install-recommends g++ git make python3-dev python3-venv
WORKDIR /tinystory
COPY . .
ENV PIP_CONSTRAINT=/tinystory/constraints.txt TINYSTORY_CACHE=/cache
VOLUME /cache
RUN make .venv/ready
CMD ["make", "demo"]
