# docker build -t tinystory . && docker run -it tinystory                                  a CPU
# docker build -t tinystory --build-arg BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04 . && docker run -it --gpus all tinystory
ARG BASE=ubuntu:24.04
FROM ${BASE}
RUN apt-get update && apt-get install -y --no-install-recommends g++ git make python3-dev python3-venv
WORKDIR /tinystory
COPY . .
ENV PIP_CONSTRAINT=/tinystory/constraints.txt
RUN make .venv/ready
CMD ["make", "demo"]
