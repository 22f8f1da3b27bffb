# shellcheck shell=bash disable=SC2016,SC2153,SC2154
# One life of a training job: preflight, rollout servers, trainer; then the next life, or the end. Sourced by
# train_cppo_*.sh, which set every variable in capitals. docs/slurm.md says when there is a next life.
#
# RUN_DIR/lives.txt has a line for each: job, life, the step that it goes on from, nodes. RUN_DIR/FINISHED ends later
# lives at once; so does RUN_DIR/STOP, which you may make.

life=${SLURM_RESTART_COUNT:-0} told="" trainer=""
say() { echo "$(date +%T) [job ${SLURM_JOB_ID:-none}, life $life] $*"; }
end() { say "$2"; exit "$1"; }
asked() { sed -n "s/^#SBATCH --$1=//p" "$0"; } # what the script asks of sbatch

prepare() { # FLAGS...: the commands, as arrays, and what all tasks have in their environment
  local nodes=${SLURM_JOB_NUM_NODES:-$(asked nodes)} tasks=${SLURM_NTASKS_PER_NODE:-$(asked ntasks-per-node)}
  local names training evaluation flags servers_at=() gpus=() options name port
  local train_nodes=$((nodes - ROLLOUT_NODES))
  mapfile -t names < <(printf 'node%d\n' $(seq "$nodes"))
  # Here, as a container has no scontrol.
  [[ -z ${SLURM_JOB_NODELIST:-} ]] || mapfile -t names < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  export RUN_DIR MASTER_ADDR=${names[0]} MASTER_PORT=$((20000 + ${SLURM_JOB_ID:-0} % 10000))
  export FIRST_STATUS=$RUN_DIR/.status-${SLURM_JOB_ID:-0}-$life
  read -r -d '' -a training <<< "$TRAIN_DATA" || true # to the end, not of the line
  read -r -d '' -a evaluation <<< "$EVALUATION_DATA" || true
  flags=(--model.path "$MODEL" --data.train "${training[@]}" --policy.device "$DEVICE"
    --policy.tensor_parallel "$TENSOR_PARALLEL" --policy.pipeline_parallel "$PIPELINE_PARALLEL")
  [[ -z $EVALUATION_DATA ]] || flags+=(--data.evaluation "${evaluation[@]}")
  [[ -z $VLLM_PYTHON ]] || flags+=(--vllm.python "$VLLM_PYTHON")
  # Servers on the trainer's own GPUs answer on their machine alone, unless there are several. All ask for a key.
  ((ROLLOUT_NODES || train_nodes == 1)) || flags+=(--vllm.host 0.0.0.0)
  if ((ROLLOUT_NODES)); then
    flags+=(--rollout.engine vllm --vllm.tensor_parallel $((tasks / SERVERS_PER_NODE)))
    flags+=(--vllm.arguments gpu-memory-utilization=0.9) # nobody else is on their GPUs
    servers_at=(--vllm.addresses)
    for name in "${names[@]:train_nodes}"; do
      for ((port = 0; port < SERVERS_PER_NODE; port++)); do servers_at+=("http://$name:$((SERVER_PORT + port))"); done
    done
    # In the environment alone: all users of a machine see arguments.
    export MEGATRON_CPPO_VLLM_KEY=${MEGATRON_CPPO_VLLM_KEY:-$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')}
  fi
  words=("$PYTHON" -m megatron_cppo.train "$RECIPE" "${flags[@]}" "${servers_at[@]}"
    --trainer.num_gpus $((train_nodes * tasks)) --trainer.run_dir "$RUN_DIR" "$@")

  read -r -d '' -a options <<< "$SRUN_OPTIONS" || true
  local cpus=${SLURM_CPUS_PER_TASK:-$(asked cpus-per-task)}
  step=(srun --chdir="$ROOT" --export=ALL --cpus-per-task="$cpus" "${options[@]}")
  [[ -z $CONTAINER_IMAGE ]] || step+=(--container-image="$CONTAINER_IMAGE" --container-mounts="$CONTAINER_MOUNTS"
    --container-workdir="$ROOT" --no-container-mount-home)
  # One task a rank. Its numbers are expanded in it, not here; a signal to all processes must not end a shell, or a
  # Python that does not listen yet; and the first failing task says why: --kill-on-bad-exit makes 143 of the rest.
  local as_rank='trap "" USR1 USR2; export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
    "$@" && exit; status=$?; (set -o noclobber; echo $status > "$FIRST_STATUS") 2> /dev/null; exit $status'
  local ranks=("${step[@]}" --nodes="$train_nodes" --relative=0 --ntasks=$((train_nodes * tasks))
    --ntasks-per-node="$tasks" --kill-on-bad-exit=1 --wait=0 --label bash -c "$as_rank" rank)
  [[ $DEVICE == cpu ]] || gpus=(--gpus "$tasks")
  preflight=("${ranks[@]}" "$PYTHON" tools/preflight.py --device "$DEVICE" "${gpus[@]}" --shared "$RUN_DIR"
    --floor-gb-per-second "$PREFLIGHT_GB_PER_SECOND" --mebibytes "$PREFLIGHT_MEBIBYTES" --seconds "$PREFLIGHT_SECONDS"
    --nodes "${names[@]:0:train_nodes}")
  servers=("${step[@]}" --nodes="$ROLLOUT_NODES" --relative="$train_nodes" --ntasks-per-node=1 --ntasks="$ROLLOUT_NODES"
    --cpus-per-task=$((cpus * tasks)) bash -c 'exec "$@" --trainer.run_dir "$RUN_DIR/servers/$SLURMD_NODENAME"' servers
    "$PYTHON" -m tools.serve_rollouts "$RECIPE" --port "$SERVER_PORT" --servers "$SERVERS_PER_NODE"
    --images "$IMAGES_PER_PROMPT" "${flags[@]}" --vllm.host 0.0.0.0 "$@")
  train=("${ranks[@]}" "${words[@]}")
}

check() { # prints what would run; the status is that of the trainer's own check
  local name where=()
  printf '\n# asked of sbatch\n%s\n\n# environment of all tasks\n' "$(grep '^#SBATCH' "$0")"
  for name in RUN_DIR ROOT SITE MASTER_ADDR MASTER_PORT "${!NCCL_@}" "${!CUDA_@}" OMP_NUM_THREADS HF_HUB_OFFLINE; do
    printf '%s=%q\n' "$name" "${!name}"
  done
  [[ -z ${MEGATRON_CPPO_VLLM_KEY:-} ]] || echo "MEGATRON_CPPO_VLLM_KEY is drawn for each life, and never shown"
  ((!PREFLIGHT)) || printf '\n# 1. preflight\n%s\n' "${preflight[*]@Q}"
  ((!ROLLOUT_NODES)) || printf '\n# 2. rollout servers, beside the trainer\n%s\n' "${servers[*]@Q}"
  printf '\n# 3. trainer\n%s\n\n# the trainer, of its own plan\n' "${train[*]@Q}"
  [[ -n ${SLURM_JOB_ID:-} || ! $CONTAINER_IMAGE ]] || { echo "is asked in the container: sbatch with --check"; return; }
  [[ -z ${SLURM_JOB_ID:-} ]] || where=("${step[@]}" --nodes=1 --ntasks=1)
  cd "$ROOT" && "${where[@]}" "${words[@]}" --check
}

first_status() { # OTHERWISE: of the first task of this life that failed; removes it
  local found=$1
  [[ ! -s $FIRST_STATUS ]] || found=$(< "$FIRST_STATUS")
  rm -f "$FIRST_STATUS"
  echo "$found"
}

newest_step() { # of the checkpoints that are whole; 0: there is none
  local path newest=0
  for path in "$RUN_DIR"/checkpoints/step_*; do
    if [[ $path =~ /step_0*([0-9]+)$ ]] && ((BASH_REMATCH[1] > newest)); then newest=${BASH_REMATCH[1]}; fi
  done
  echo "$newest"
}

end_if_stalled() { # STATUS: when the last lives of this job all went on from what is still the newest checkpoint
  local lives
  lives=$(awk -v job="$SLURM_JOB_ID" -v step="$(newest_step)" \
    '$1 == job { lives = $3 == step ? lives + 1 : 0 } END { print lives + 0 }' "$RUN_DIR/lives.txt")
  ((lives < MAX_STALLED_LIVES)) || end "$1" "the last $lives lives saved no new step ($(newest_step)): the end"
}

next_life() { # STATUS, which the job ends with when there is none
  [[ ! -e $RUN_DIR/STOP ]] || end 0 "STOP is there: the end"
  ((life + 1 < MAX_LIVES)) || end "$1" "this was life $MAX_LIVES of $MAX_LIVES: the end"
  end_if_stalled "$1"
  say "requeued"
  sleep 600 & # one that begins while Slurm looks for what is to end would outlive the job
  local end_of_life=$!
  for _ in {1..20}; do # a controller that many jobs ask at once may not answer
    ! scontrol requeue "$SLURM_JOB_ID" || wait "$end_of_life" # Slurm ends this life
    sleep 15
  done
  kill "$end_of_life" 2> /dev/null
  say "Slurm does not requeue this job: submit it again"
  exit "$1"
}

on_time_limit() {
  told=yes
  [[ $trainer ]] || return 0
  say "asked to leave: the trainer finishes its step, and saves"
  local ends # as Slurm does not requeue what the time limit ends: before it, saved or not
  ends=$(date -d "$(squeue -h -j "$SLURM_JOB_ID" -o %e)" +%s) || ends=0
  # srun passes it on to all processes of its step. Again, as one that only just starts may not have heard.
  (while kill -USR2 "$trainer" 2> /dev/null; do
    ((!ends || $(date +%s) < ends - 60)) || { say "not saved in time"; scontrol requeue "$SLURM_JOB_ID" || true; }
    sleep 5
  done) &
}

live() { # [--check] FLAGS...
  local flags=() status=0 flag checks=""
  for flag in "$@"; do if [[ $flag == --check ]]; then checks=yes; else flags+=("$flag"); fi; done
  trap on_time_limit USR1
  # shellcheck disable=SC1090
  [[ -z $SITE ]] || source "$SITE"
  prepare "${flags[@]}"
  [[ -z $checks ]] || { check; exit; }
  mkdir -p "$RUN_DIR" && touch "$RUN_DIR/lives.txt"
  rm -f "$RUN_DIR/.status-$SLURM_JOB_ID-"* # of lives that ended with their node
  say "nodes $SLURM_JOB_NODELIST, newest checkpoint: step $(newest_step)"
  [[ ! -e $RUN_DIR/FINISHED && ! -e $RUN_DIR/STOP ]] || end 0 "FINISHED or STOP is in $RUN_DIR: nothing to do"
  end_if_stalled 1 # lives that ended with their node said nothing
  echo "$SLURM_JOB_ID $life $(newest_step) $SLURM_JOB_NODELIST" >> "$RUN_DIR/lives.txt"
  if ((PREFLIGHT)) && ! "${preflight[@]}"; then # 3: a node is bad. Else a node died in it, did not come, or srun failed
    [[ $(first_status 1) != [23] ]] || end 3 "preflight failed, see above: no other life (sbatch --exclude=NODE)"
    next_life 1
  fi
  [[ -z $told ]] || next_life 75
  "${train[@]}" &
  trainer=$!
  [[ -z $told ]] || on_time_limit # which came while there was no trainer to tell
  # Without servers the trainer would wait for them, and all GPUs with it.
  ((!ROLLOUT_NODES)) || { "${servers[@]}" || true; say "the servers' step ended"; kill "$trainer" 2> /dev/null; } &
  while kill -0 "$trainer" 2> /dev/null; do wait "$trainer" || true; done # the trap ends a wait
  wait "$trainer" || status=$?
  ((!status)) || status=$(first_status "$status")
  ((status)) || { touch "$RUN_DIR/FINISHED" && end 0 "finished"; }
  # Later it is no mistake of the configuration: servers that are gone, a disk, a rank that another run's port kept out.
  ((status != 2 || life || $(newest_step))) || end 2 "the trainer refuses this, see above: no other life"
  say "the trainer ended with status $status, the newest checkpoint is step $(newest_step)"
  next_life "$status"
}
