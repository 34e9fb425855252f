# docker build -t univigu .
# docker run --rm --user "$(id -u)" -v "$PWD":/work univigu predict --config caption.yaml --data.videos clip.mp4
#
# With CUDA: docker build --build-arg TORCH=cu130 ..., docker run --gpus all ...
# TORCH names a folder of https://download.pytorch.org/whl; the host's driver must support its version of CUDA.
FROM python:3.11-slim-bookworm

ARG TORCH=cpu
RUN pip install --no-cache-dir --index-url "https://download.pytorch.org/whl/${TORCH}" "torch>=2.9,<2.14"

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY configs configs
COPY univigu univigu
RUN pip install --no-cache-dir . && useradd --uid 1000 --create-home univigu && install --directory --owner univigu /work

USER 1000
WORKDIR /work
ENTRYPOINT ["lightning"]
CMD ["--help"]
