#!/usr/bin/env bash
# Slurm 22.05 and shellcheck from Debian 12's packages, for tests/integration/slurm. As root; starts nothing.
set -euo pipefail
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge \
  libslurm-dev iproute2 gcc libc6-dev shellcheck > /dev/null
slurmctld -V
