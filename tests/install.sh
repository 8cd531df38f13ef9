#!/bin/sh
# Installs what tests need besides pip's packages, where it is missing and can be installed. Tests say what is missing still.
#   install.sh docker       what `make test-docker` needs, and tests of several hosts
#   install.sh launchers    Open MPI and Slurm
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

missing_packages() {
    case $1 in
        docker)
            { has_all docker && has_compose && has_engine; } \
                || printf '%s ' docker.io docker-compose mmdebstrap iptables iproute2 ;;
        launchers)
            has_all mpirun || printf '%s ' openmpi-bin
            has_all munged slurmctld slurmd sinfo srun || printf '%s ' munge slurmctld slurmd slurm-client ;;
        *)
            echo "install.sh: $1: give docker or launchers" >&2
            return 2 ;;
    esac
}

for group in "$@"; do
    packages=$(missing_packages "$group")
    [ -n "$packages" ] || continue
    if [ "$(id -u)" -ne 0 ] || ! has_all apt-get; then
        echo "$group: only root with apt-get can install $packages" >&2
        continue
    fi
    apt-get -qq update || true
    # shellcheck disable=SC2086
    DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends $packages >/dev/null </dev/null \
        || echo "$group: could not install $packages" >&2
done
