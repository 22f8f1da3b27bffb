#!/bin/bash
# Converts a checkpoint on one node, without GPUs: a Hugging Face folder into a Megatron checkpoint, or the other way.
# A run needs none of it: it reads the Hugging Face folder, and exports one. From the root of the clone:
#
#   SOURCE=... TARGET=... bash slurm/convert.sh --check             says what it would take, and starts nothing
#   SOURCE=... TARGET=... sbatch -A ACCOUNT -p PARTITION slurm/convert.sh [--dtype bf16 ...]
#
# Ended by whatever, it goes on where it stopped: before the time limit, and when its node fails, it is requeued.
#SBATCH --job-name=convert
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=64G
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail

# All paths are absolute, on disks that the node sees.
: "${SOURCE:?a Hugging Face folder, or a Megatron checkpoint such as RUN/checkpoints/step_000012}"
: "${TARGET:?a new folder}"
: "${ROOT:=${SLURM_SUBMIT_DIR:-$PWD}}" # of the clone

# How it is run: the Python of an environment, or of a pyxis container.
: "${PYTHON:=python3}"
: "${CONTAINER_IMAGE:=}"  # a .sqsh or an image; empty: no container
: "${CONTAINER_MOUNTS:=}" # SOURCE:TARGET,...: ROOT and both folders under their own names
: "${SRUN_OPTIONS:=}"     # more of srun
: "${SITE:=}"             # a file of `module load` lines, sourced before all
: "${MAX_LIVES:=10}"      # starts in all

# shellcheck disable=SC1090
[[ -z $SITE ]] || source "$SITE"
life=${SLURM_RESTART_COUNT:-0}
say() { echo "$(date +%T) [job ${SLURM_JOB_ID:-none}, life $life] $*"; }
tool=hf_to_megatron
[[ -f $SOURCE/config.json ]] || tool=megatron_to_hf # only a Hugging Face folder has one at its top
cores=${SLURM_CPUS_PER_TASK:-$(sed -n 's/^#SBATCH --cpus-per-task=//p' "$0")}
words=("$PYTHON" -m "tools.$tool" "$SOURCE" "$TARGET" --workers "$cores")
read -r -a options <<< "$SRUN_OPTIONS"
step=(srun --export=ALL --chdir="$ROOT" --cpus-per-task="$cores" "${options[@]}")
[[ -z $CONTAINER_IMAGE ]] || step+=(--container-image="$CONTAINER_IMAGE" --container-mounts="$CONTAINER_MOUNTS"
  --container-workdir="$ROOT" --no-container-mount-home)

checks=""
for flag in "$@"; do if [[ $flag == --check ]]; then checks=yes; else words+=("$flag"); fi; done
if [[ $checks ]]; then
  printf '# asked of sbatch\n%s\n\n# step\n%s\n\n' "$(grep '^#SBATCH' "$0")" "${step[*]@Q} ${words[*]@Q}"
  [[ ! $CONTAINER_IMAGE || ${SLURM_JOB_ID:-} ]] || { echo "asked in the container alone: sbatch --check"; exit; }
  where=()
  [[ -z ${SLURM_JOB_ID:-} ]] || where=("${step[@]}")
  cd "$ROOT"
  "${where[@]}" "${words[@]}" --dry-run
  exit
fi

# shellcheck disable=SC2317 # called by the trap
requeue() {
  ((life + 1 < MAX_LIVES)) || { say "this is life $MAX_LIVES of $MAX_LIVES: the time limit ends it"; return; }
  say "requeued before the time limit"
  scontrol requeue "$SLURM_JOB_ID" || say "Slurm does not requeue this job: the time limit ends it"
}
trap requeue USR1
say "$tool on $SLURM_JOB_NODELIST"
status=0
"${step[@]}" "${words[@]}" &
while kill -0 $! 2> /dev/null; do wait $! || true; done # the trap ends a wait
wait $! || status=$?
say "ended with status $status"
exit "$status"
