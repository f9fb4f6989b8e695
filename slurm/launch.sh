#!/usr/bin/env bash
# Functions for the scripts that source this file:
#
#   as_a_job "$@"    in a job script: change to the repository root; in the shell of an interactive allocation (salloc,
#                    srun --pty): use that allocation; anywhere else: submit the calling script and exit
#   fit "$@"         run python -m llm fit, one process per GPU on all nodes of the job; exit with its status
#   train "$@"       the same, but return its status (75: stopped and saved) and leave the job as it is
#
# On SIGUSR1 (before the time limit) or SIGTERM (preemption), fit saves a checkpoint and exits with status 75. The job
# then requeues itself, and the restart resumes from that checkpoint. If ranks fail, llm/runs/failure.py says which and
# why, and the job requeues itself if this attempt wrote a checkpoint. A job that Slurm is already ending is left to
# Slurm, which requeues it after the loss of a node but not after scancel.
#
# Variables: CONFIG, RUN (run.folder), STORE (data.store), TIMEOUT (strategy.timeout: how long a collective may take, in
# seconds), PYTHON. `bash slurm/SCRIPT.sh` also turns NODES, GPUS (per node), PARTITION, ACCOUNT, QOS and TIME into
# options of sbatch. sbatch itself reads SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_QOS and SBATCH_TIMELIMIT.

PYTHON=${PYTHON:-.venv/bin/python}
BATCH=

as_a_job() {
    if [[ ! -e $(dirname "$0")/launch.sh ]]; then  # Slurm runs a copy of the script from elsewhere
        BATCH=yes
        cd "${SLURM_SUBMIT_DIR:-.}"
        return
    fi
    cd "$(dirname "$0")/.."
    local script=slurm/${0##*/}
    if [[ -n ${SLURM_JOB_ID:-} && ${ENVIRONMENT:-} != BATCH ]]; then  # Slurm sets ENVIRONMENT in job scripts
        echo "running in the interactive allocation $SLURM_JOB_ID; to submit a job from here: sbatch $script"
        return
    fi
    leave_job
    exec sbatch ${NODES:+"--nodes=$NODES"} ${GPUS:+"--gpus-per-node=$GPUS" "--ntasks-per-node=$GPUS"} \
        ${PARTITION:+"--partition=$PARTITION"} ${ACCOUNT:+"--account=$ACCOUNT"} ${QOS:+"--qos=$QOS"} \
        ${TIME:+"--time=$TIME"} "$script" "$@"
}

# Drop the variables of the job that this shell is in: sbatch would pass them on to a new job.
leave_job() {
    local name
    if [[ -n ${SLURM_JOB_ID:-} ]]; then
        for name in "${!SLURM_@}"; do [[ $name == SLURM_CONF ]] || unset "$name"; done
    fi
}

fit() {
    local status=0
    train "$@" || status=$?
    if ((status == 75)); then
        queue_again "stopped and saved"
    elif ((status != 0)) && "$PYTHON" -m llm.runs.failure "$LOGS" "$ATTEMPT" "$SLURM_JOB_ID" "${WORDS[@]}"; then
        queue_again "failed after a checkpoint"
    fi
    rm -f "$LOGS-srun"
    exit "$status"
}

train() {
    # Of a job that this one was submitted from, sbatch passes on the task of an array and the number of restarts.
    local record array
    record=$(scontrol show job "$SLURM_JOB_ID" --oneliner | grep "^JobId=$SLURM_JOB_ID ") || record=
    array=$(grep -o ' ArrayTaskId=[0-9]*' <<< "$record" | head -n 1) || true
    ATTEMPT=$(grep -o ' Restarts=[0-9]*' <<< "$record" | head -n 1) || true
    ATTEMPT=${ATTEMPT#*=} ATTEMPT=${ATTEMPT:-0} JOB=$SLURM_JOB_ID
    [[ -z $array ]] || JOB=${SLURM_ARRAY_JOB_ID}_${array#*=}  # scontrol's name for an array task
    # By these names Lightning knows a shell, in which it would start all ranks itself.
    local name=${SLURM_JOB_NAME:-fit}
    [[ $name != interactive && $name != bash ]] || name=fit
    LOGS=slurm/logs/$name-$JOB
    local nodes=${SLURM_NNODES:-1} cores=${SLURM_CPUS_PER_TASK:-1}
    local ranks=${SLURM_NTASKS_PER_NODE:-$((${SLURM_NTASKS:-$nodes} / nodes))}
    local gpus=${SLURM_GPUS_ON_NODE:-${SLURM_GPUS_PER_NODE:-0}}  # the latter in a shell outside the nodes

    # What the submitting shell left for other launchers: Lightning would take this address for that of rank 0.
    unset MASTER_ADDR MASTER_PORT RANK LOCAL_RANK NODE_RANK GROUP_RANK WORLD_SIZE LOCAL_WORLD_SIZE
    export SLURM_JOB_NAME=$name SLURM_RESTART_COUNT=$ATTEMPT OMP_NUM_THREADS=$cores
    export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
    # If a collective fails or exceeds strategy.timeout, each rank writes down its last 2,000 collectives, then torch
    # aborts the process (3, its default; 0 would wait forever).
    export TORCH_NCCL_ASYNC_ERROR_HANDLING=3 TORCH_NCCL_DUMP_ON_TIMEOUT=1 TORCH_FR_BUFFER_SIZE=2000
    export TORCH_FR_DUMP_TEMP_FILE=$LOGS-attempt$ATTEMPT-collectives-rank
    local mark=$LOGS-attempt$ATTEMPT-stopped  # see rank.py

    echo "$(date '+%F %T') job $JOB, attempt $ATTEMPT: $nodes nodes x $ranks ranks, logs in $LOGS-rank*.log"
    WORDS=(fit --config "$CONFIG" --resume auto --trainer.num_nodes "$nodes" --trainer.devices "$ranks")
    [[ $gpus == 0 ]] || WORDS+=(--trainer.accelerator gpu)  # or it would train on the CPUs if it found no GPU
    WORDS+=(${RUN:+--run.folder "$RUN"} ${STORE:+--data.store "$STORE"} ${TIMEOUT:+--strategy.timeout "$TIMEOUT"} "$@")
    ((ATTEMPT == 0)) || WORDS+=(--resume auto)  # a checkpoint named in "$@" is only for the first attempt

    local step=(--job-name="$name" --nodes="$nodes" --ntasks="$((nodes * ranks))" --ntasks-per-node="$ranks")
    # Since Slurm 22.05, srun does not inherit --cpus-per-task from sbatch. Neighbouring ranks share a socket, as
    # neighbouring GPUs do.
    step+=(--cpus-per-task="$cores" --cpu-bind=cores --distribution=block:block)
    [[ $gpus == 0 ]] || step+=(--gpu-bind=none)  # every rank sees all GPUs of its node and takes its own
    [[ -n $BATCH ]] || step+=(--overlap)         # the step of `srun --pty` holds the allocation
    trap : USR1 TERM  # meant for the ranks; this shell must outlive them
    local status=0 messages tee
    exec {messages}> >(trap '' USR1 TERM; exec tee "$LOGS-srun" >&2)
    tee=$!
    srun "${step[@]}" --kill-on-bad-exit=1 --open-mode=append --output="$LOGS-rank%t.log" \
        "$PYTHON" slurm/rank.py "$mark" "${WORDS[@]}" 2>&"$messages" {messages}>&- || status=$?
    exec {messages}>&-
    trap '' USR1 TERM  # Slurm also sends TERM to a job that it requeues
    wait "$tee" || true
    if [[ -e $mark ]]; then
        rm "$mark"
        status=75  # EX_TEMPFAIL, fit's status
    fi
    return "$status"
}

# Requeue the job, after what "$1" says.
queue_again() {
    local record state
    if [[ -z $BATCH ]]; then
        echo "$1; an interactive allocation is not queued again: repeat the command to resume"
        return
    fi
    record=$(scontrol show job "$JOB" --oneliner) || true
    state=$(grep -o 'JobState=[A-Z_]*' <<< "$record") || true
    if [[ -n $state && $state != JobState=RUNNING ]]; then
        echo "$1; Slurm has ended the job already ($state) and decides what becomes of it"
    elif [[ -n $state ]] && scontrol requeue "$JOB"; then
        echo "$1; job $JOB is queued again"
    else
        record=${record#*Command=} record=${record%% WorkDir=*}
        echo "$1, but job $JOB cannot be queued again: resume with sbatch ${record:-slurm/SCRIPT.sh}"
    fi
}
