#!/bin/bash
# CPPO of Qwen2.5-VL-7B on 2 nodes of 8 H100: TP4 x DP4. From the root of the clone, with RUN_DIR, MODEL and
# TRAIN_DATA in the environment:
#
#   bash slurm/train_cppo_7b.sh --check                            says what would run, and starts nothing
#   sbatch -A ACCOUNT -p PARTITION slurm/train_cppo_7b.sh [--section.field VALUE ...]
#
# sbatch's own options override the lines below: with --nodes=4 there are eight replicas. docs/slurm.md has the rest.
#SBATCH --job-name=cppo-7b
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=12:00:00
# Half an hour before the end: longer than a step, an evaluation and a save, or than hang_minutes.
#SBATCH --signal=B:USR1@1800
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail

# What is trained, and where. All paths are absolute, on disks that every node sees.
: "${RUN_DIR:?the run folder: checkpoints, metrics, logs}"
: "${MODEL:?the Hugging Face folder to start from}"
: "${TRAIN_DATA:?parquet files, separated by spaces}"
: "${EVALUATION_DATA:=}"
: "${ROOT:=${SLURM_SUBMIT_DIR:-$PWD}}" # of the clone
: "${RECIPE:=examples/qwen2_5_vl_7b.py}"
: "${TENSOR_PARALLEL:=4}" "${PIPELINE_PARALLEL:=1}" # what is left of the nodes are replicas

# How it is run: the Python of an environment, or of a pyxis container.
: "${PYTHON:=python3}"
: "${CONTAINER_IMAGE:=}"  # a .sqsh or an image; empty: no container
: "${CONTAINER_MOUNTS:=}" # SOURCE:TARGET,...: ROOT, RUN_DIR, MODEL and the data under their own names
: "${SRUN_OPTIONS:=}"     # more of srun, such as --mpi=pmix or --network=sharp
: "${SITE:=}"             # a file of `module load` and NCCL_ lines, sourced before all

# Rollouts by vLLM: on the trainer's GPUs, or on the last ROLLOUT_NODES nodes of the job (sbatch --nodes counts both).
: "${VLLM_PYTHON:=}"     # of vLLM's environment; empty: as the recipe says
: "${ROLLOUT_NODES:=0}"  # more than 0: separate servers
: "${SERVERS_PER_NODE:=8}" "${SERVER_PORT:=8000}" "${IMAGES_PER_PROMPT:=1}"

# Before it: nodes are looked at, and must reduce so many GB/s together. 0 leaves out the floor, PREFLIGHT=0 all.
: "${PREFLIGHT:=1}" "${PREFLIGHT_GB_PER_SECOND:=50}" "${PREFLIGHT_MEBIBYTES:=256}" "${PREFLIGHT_SECONDS:=300}"

# When to stop starting again: after so many lives in all, or in a row without a new checkpoint.
: "${MAX_LIVES:=50}" "${MAX_STALLED_LIVES:=3}"

: "${DEVICE:=cuda}" # cpu: the same on gloo, to try the script

# NCCL and CUDA, as far as it is the same everywhere. Tensor parallelism on Hopper wants one queue.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} NCCL_DEBUG=${NCCL_DEBUG:-WARN}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8} HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}

# Not beside this file: a batch script is a copy in Slurm's spool.
[[ -f $ROOT/slurm/lives.sh ]] || { echo "ROOT=$ROOT is no clone: submit from its root, or set ROOT" >&2; exit 2; }
# shellcheck source=slurm/lives.sh
source "$ROOT/slurm/lives.sh"
live "$@"
