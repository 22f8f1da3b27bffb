# shellcheck shell=bash disable=SC2153,SC2154
# One life of a training job: preflight, rollout servers, trainer; then the next life, or the end. Sourced by
# train_cppo_*.sh, which set every variable in capitals.
#
# RUN_DIR/lives.txt has a line for each life: job, life, the step that it goes on from, nodes. RUN_DIR/FINISHED ends
# later lives at once; so does RUN_DIR/STOP, which you may make.

life=${SLURM_RESTART_COUNT:-0} told="" trainer=""

say() { echo "$(date +%T) [job ${SLURM_JOB_ID:-none}, life $life] $*"; }

asked() { sed -n "s/^#SBATCH --$1=//p" "$0"; } # what the script asks of sbatch

prepare() { # FLAGS...: the commands, as arrays, and what all tasks have in their environment
  local nodes=${SLURM_JOB_NUM_NODES:-$(asked nodes)} tasks=${SLURM_NTASKS_PER_NODE:-$(asked ntasks-per-node)}
  local -a names files flags addresses=() gpus=() options
  local name port train_nodes=$((nodes - ROLLOUT_NODES))
  mapfile -t names < <(printf 'node%d\n' $(seq "$nodes"))
  # Here, as a container has no scontrol.
  [[ -z ${SLURM_JOB_NODELIST:-} ]] || mapfile -t names < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  export RUN_DIR STATUS=$RUN_DIR/.status-${SLURM_JOB_ID:-0}-$life MASTER_ADDR=${names[0]} MASTER_PORT=$((20000 + ${SLURM_JOB_ID:-0} % 10000))
  read -r -a files <<< "$TRAIN_DATA"
  flags=(--model.path "$MODEL" --data.train "${files[@]}" --policy.device "$DEVICE"
    --policy.tensor_parallel "$TENSOR_PARALLEL" --policy.pipeline_parallel "$PIPELINE_PARALLEL")
  read -r -a files <<< "$EVALUATION_DATA"
  [[ -z $EVALUATION_DATA ]] || flags+=(--data.evaluation "${files[@]}")
  [[ -z $VLLM_PYTHON ]] || flags+=(--vllm.python "$VLLM_PYTHON")
  if ((ROLLOUT_NODES)); then
    flags+=(--rollout.engine vllm --vllm.tensor_parallel $((tasks / SERVERS_PER_NODE)))
    for name in "${names[@]:train_nodes}"; do
      for ((port = SERVER_PORT; port < SERVER_PORT + SERVERS_PER_NODE; port++)); do addresses+=("http://$name:$port"); done
    done
    addresses=(--vllm.addresses "${addresses[@]}")
    # In the environment alone: all users of a machine see arguments.
    export MEGATRON_CPPO_VLLM_KEY=${MEGATRON_CPPO_VLLM_KEY:-$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')}
  fi
  words=("$PYTHON" -m megatron_cppo.train "$RECIPE" "${flags[@]}" "${addresses[@]}"
    --trainer.num_gpus $((train_nodes * tasks)) --trainer.run_dir "$RUN_DIR" "$@")

  read -r -a options <<< "$SRUN_OPTIONS"
  step=(srun --chdir="$ROOT" --cpus-per-task="${SLURM_CPUS_PER_TASK:-$(asked cpus-per-task)}" "${options[@]}")
  [[ -z $CONTAINER_IMAGE ]] || step+=(--container-image="$CONTAINER_IMAGE" --container-mounts="$CONTAINER_MOUNTS"
    --container-workdir="$ROOT" --no-container-mount-home)
  # One task a rank. Its numbers are expanded in it, not here; a signal to all processes must not end a shell, or a
  # Python that does not listen yet; and the first failing task says why: --kill-on-bad-exit makes 143 of the rest.
  # shellcheck disable=SC2016
  local as_rank='trap "" USR2; export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
    "$@" && exit; status=$?; (set -o noclobber; echo $status > "$STATUS") 2> /dev/null; exit $status'
  local ranks=("${step[@]}" --nodes="$train_nodes" --relative=0 --ntasks-per-node="$tasks" --ntasks=$((train_nodes * tasks))
    --kill-on-bad-exit=1 --wait=0 --label bash -c "$as_rank" rank)
  [[ $DEVICE == cpu ]] || gpus=(--gpus "$tasks")
  preflight=("${ranks[@]}" "$PYTHON" tools/preflight.py --device "$DEVICE" "${gpus[@]}" --shared "$RUN_DIR"
    --floor-gb-per-second "$PREFLIGHT_GB_PER_SECOND" --mebibytes "$PREFLIGHT_MEBIBYTES" --seconds "$PREFLIGHT_SECONDS"
    --nodes "${names[@]:0:train_nodes}")
  # shellcheck disable=SC2016 # expanded in the task
  servers=("${step[@]}" --nodes="$ROLLOUT_NODES" --relative="$train_nodes" --ntasks-per-node=1 --ntasks="$ROLLOUT_NODES"
    bash -c 'exec "$@" --trainer.run_dir "$RUN_DIR/servers/$SLURMD_NODENAME"' servers
    "$PYTHON" -m tools.serve_rollouts "$RECIPE" --port "$SERVER_PORT" --servers "$SERVERS_PER_NODE"
    --images "$IMAGES_PER_PROMPT" "${flags[@]}" --vllm.host 0.0.0.0 "$@")
  train=("${ranks[@]}" "${words[@]}")
}

check() { # prints what would run; the status is that of the trainer's own check
  local shown=(RUN_DIR ROOT SITE PREFLIGHT MAX_LIVES MAX_STALLED_LIVES MASTER_ADDR MASTER_PORT CUDA_DEVICE_MAX_CONNECTIONS
    NCCL_DEBUG OMP_NUM_THREADS HF_HUB_OFFLINE) where=()
  printf '\n# asked of sbatch\n%s\n\n# environment of all tasks\n' "$(grep '^#SBATCH' "$0")"
  for name in "${shown[@]}"; do printf '%s=%q\n' "$name" "${!name}"; done
  [[ -z ${MEGATRON_CPPO_VLLM_KEY:-} ]] || echo "MEGATRON_CPPO_VLLM_KEY is drawn for each life, and never shown"
  ((!PREFLIGHT)) || printf '\n# 1. preflight\n%s\n' "${preflight[*]@Q}"
  ((!ROLLOUT_NODES)) || printf '\n# 2. rollout servers, beside the trainer\n%s\n' "${servers[*]@Q}"
  printf '\n# 3. trainer\n%s\n\n# the trainer, of its own plan\n' "${train[*]@Q}"
  [[ -z ${SLURM_JOB_ID:-} ]] || where=("${step[@]}" --nodes=1 --ntasks=1)
  if [[ $CONTAINER_IMAGE && ! ${SLURM_JOB_ID:-} ]]; then
    echo "not asked here, as it is in the container: sbatch this script with --check"
  else
    cd "$ROOT" && "${where[@]}" "${words[@]}" --check
  fi
}

lives_without_progress() { # in a row, of this job, that went on from what is still the newest checkpoint
  awk -v job="$SLURM_JOB_ID" -v step="$(newest_step)" '$1 == job { n = $3 == step ? n + 1 : 0 } END { print n + 0 }' \
    "$RUN_DIR/lives.txt"
}

newest_step() {
  local path newest=0
  for path in "$RUN_DIR"/checkpoints/step_*; do
    if [[ $path =~ /step_0*([0-9]+)$ ]] && ((BASH_REMATCH[1] > newest)); then newest=${BASH_REMATCH[1]}; fi
  done
  echo "$newest"
}

end_if_stalled() { # STATUS
  local lives
  lives=$(lives_without_progress)
  ((lives < MAX_STALLED_LIVES)) || { say "the last $lives lives saved no new step ($(newest_step)): the end"; exit "$1"; }
}

next_life() { # STATUS, which the job ends with when there is none
  [[ ! -e $RUN_DIR/STOP ]] || { say "STOP is there: the end"; exit 0; }
  ((life + 1 < MAX_LIVES)) || { say "this was life $MAX_LIVES of $MAX_LIVES: the end"; exit "$1"; }
  end_if_stalled "$1"
  say "requeued"
  scontrol requeue "$SLURM_JOB_ID" || { say "Slurm does not requeue this job: submit it again"; exit "$1"; }
  sleep 600 # Slurm ends this life
  exit "$1"
}

on_time_limit() {
  told=yes
  [[ $trainer ]] || return 0
  say "asked to leave: the trainer finishes its step, and saves"
  # srun passes it on to all processes of its step. Again, as one that only just starts may not have heard.
  (while kill -USR2 "$trainer" 2> /dev/null; do sleep 60; done) &
}

live() { # [--check] FLAGS...
  local flags=() status=0 flag checks=""
  for flag in "$@"; do if [[ $flag == --check ]]; then checks=yes; else flags+=("$flag"); fi; done
  # shellcheck disable=SC1090
  [[ -z $SITE ]] || source "$SITE"
  prepare "${flags[@]}"
  [[ -z $checks ]] || { check; exit; }
  trap on_time_limit USR1
  mkdir -p "$RUN_DIR" && touch "$RUN_DIR/lives.txt"
  say "nodes $SLURM_JOB_NODELIST, newest checkpoint: step $(newest_step)"
  [[ ! -e $RUN_DIR/FINISHED && ! -e $RUN_DIR/STOP ]] || { say "FINISHED or STOP is in $RUN_DIR: nothing to do"; exit 0; }
  end_if_stalled 1 # lives that ended with their node said nothing
  echo "$SLURM_JOB_ID $life $(newest_step) $SLURM_JOB_NODELIST" >> "$RUN_DIR/lives.txt"
  ((!PREFLIGHT)) || "${preflight[@]}" || { say "preflight failed, see above: no other life; mend it, or leave the node out \
(sbatch --exclude=NODE)"; exit 3; }
  ((!ROLLOUT_NODES)) || "${servers[@]}" &
  [[ -z $told ]] || next_life 75
  rm -f "$STATUS"
  "${train[@]}" &
  trainer=$!
  while kill -0 "$trainer" 2> /dev/null; do wait "$trainer" || true; done # the trap ends a wait
  wait "$trainer" || status=$?
  [[ $status == 0 || ! -s $STATUS ]] || status=$(< "$STATUS")
  rm -f "$STATUS"
  case $status in
    0) touch "$RUN_DIR/FINISHED"; say "finished"; exit 0 ;;
    2) say "the trainer refuses this, see above: no other life"; exit 2 ;;
  esac
  say "the trainer ended with status $status, the newest checkpoint is step $(newest_step)"
  next_life "$status"
}
