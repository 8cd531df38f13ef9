#!/bin/sh
# Installs what `make test-docker` needs, where that is missing and can be installed. The tests say what is missing still.
set -eu

has_all() {
    for name in "$@"; do command -v "$name" >/dev/null || return 1; done
}
has_compose() {
    docker compose version >/dev/null 2>&1 || command -v docker-compose >/dev/null
}
has_engine() {
    docker version >/dev/null 2>&1 || has_all dockerd containerd mmdebstrap iptables ip
}

has_all docker && has_compose && has_engine && exit 0
packages="docker.io docker-compose mmdebstrap iptables iproute2"
if [ "$(id -u)" -ne 0 ] || ! has_all apt-get; then
    echo "test-docker: not installing $packages: that needs root and apt-get" >&2
    exit 0
fi
apt-get -qq update || true
# shellcheck disable=SC2086
DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends $packages >/dev/null </dev/null \
    || echo "test-docker: could not install $packages" >&2
