# An image of the server and the client. Steps live in deploy/scripts, where CI runs them without a
# container.
#   docker build -t entropyserve .                             # CPU
#   docker build -t entropyserve:cuda --build-arg BACKEND=cuda .   # also CUDA; run with --gpus=1
#   docker run -v $PWD/models:/models -v $PWD/keys:/etc/entropyserve/keys:ro -p 50051:50051 \
#     -e ENTROPYSERVE_MODEL=/models/model.gguf -e ENTROPYSERVE_LISTEN=0.0.0.0:50051 \
#     -e ENTROPYSERVE_KEY_FILE=/etc/entropyserve/keys entropyserve
# The server listens beyond loopback only with keys or client certificates (or when told that
# anyone may use it), so the image sets no address.
ARG BACKEND=cpu
ARG DEBIAN=debian:12-slim
# Only its toolkit is taken; its C library is older than Debian 12's, so its programs run there.
ARG CUDA=nvidia/cuda:13.0.1-devel-ubuntu22.04

FROM ${CUDA} AS toolkit

FROM ${DEBIAN} AS build-cpu
WORKDIR /src
COPY deploy/scripts/install_deps.sh deploy/scripts/
RUN deploy/scripts/install_deps.sh build && rm -rf /var/lib/apt/lists/*

FROM build-cpu AS build-cuda
COPY --from=toolkit /usr/local/cuda /usr/local/cuda
ENV PATH=/usr/local/cuda/bin:$PATH LD_LIBRARY_PATH=/usr/local/cuda/lib64

FROM build-${BACKEND} AS build
ARG BACKEND
COPY . .
RUN deploy/scripts/stage_programs.sh ${BACKEND} /out

FROM ${DEBIAN}
COPY deploy/scripts/install_deps.sh /tmp/
RUN /tmp/install_deps.sh runtime && rm -rf /var/lib/apt/lists/* /tmp/install_deps.sh
COPY --from=build /out/ /usr/local/
RUN ldconfig && useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin entropyserve
USER 10001
# gRPC and metrics; addresses come from ENTROPYSERVE_LISTEN and ENTROPYSERVE_METRICS_LISTEN.
EXPOSE 50051 9464
# SIGTERM drains.
STOPSIGNAL SIGTERM
ENTRYPOINT ["/usr/local/bin/entropyserve"]
