# Development image: build and test katashim, and run a containerd with it.
#
#   docker build --target run -t katashim .
#   docker run --rm --privileged katashim make demo
#
# The compiler (for netifaces) is in the build stage only.

FROM debian:bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends \
        python3 python3-venv python3-dev gcc libc6-dev make \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY requirements.txt requirements-dev.txt ./
RUN python3 -m venv /src/.venv && .venv/bin/pip install --no-cache-dir -r requirements-dev.txt
COPY . .
RUN .venv/bin/python -m compileall -q katashim

FROM debian:bookworm AS run
RUN apt-get update && apt-get install -y --no-install-recommends \
        python3 containerd runc qemu-system-x86 iproute2 kmod ca-certificates make \
        mmdebstrap erofs-utils e2fsprogs lz4 zstd busybox-static \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /src /src
WORKDIR /src
RUN ln -s /src/bin/containerd-shim-katashim-v2 /usr/local/bin/ && ln -s /src/bin/katashim-ctl /usr/local/bin/
CMD ["containerd"]

FROM run AS test
RUN apt-get update && apt-get install -y --no-install-recommends \
        python3-venv python3-dev gcc libc6-dev crun iputils-ping procps util-linux mount \
    && rm -rf /var/lib/apt/lists/*
CMD ["make", "test"]
