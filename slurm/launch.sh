#!/usr/bin/env bash
# Functions for the scripts that source this file:
#
#   as_a_job "$@"    outside a job: submit the calling script and exit; inside a job: change to the repository root
#   fit "$@"         run python -m llm fit, one process per GPU on all nodes of the job; exit with its status
#
# On SIGUSR1 (before the time limit) or SIGTERM (preemption), fit saves a checkpoint and exits with status 75. The job
# then requeues itself, and the restart resumes from that checkpoint. With any other status the job ends. A job that
# Slurm is already ending is left to Slurm, which requeues it after the loss of a node but not after scancel.
#
# Variables: CONFIG, RUN (run.folder), STORE (data.store), TIMEOUT (strategy.timeout: how long a collective may take, in
# seconds), PYTHON. `bash slurm/SCRIPT.sh` also turns NODES, GPUS (per node), PARTITION, ACCOUNT, QOS and TIME into
# options of sbatch. sbatch itself reads SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_QOS and SBATCH_TIMELIMIT.

as_a_job() {
    if [[ -n ${SLURM_JOB_ID:-} ]]; then
        cd "${SLURM_SUBMIT_DIR:-.}"  # Slurm runs a copy of the script from elsewhere
        return
    fi
    cd "$(dirname "$0")/.."
    exec sbatch ${NODES:+"--nodes=$NODES"} ${GPUS:+"--gpus-per-node=$GPUS" "--ntasks-per-node=$GPUS"} \
        ${PARTITION:+"--partition=$PARTITION"} ${ACCOUNT:+"--account=$ACCOUNT"} ${QOS:+"--qos=$QOS"} \
        ${TIME:+"--time=$TIME"} "slurm/$(basename "$0")" "$@"
}

fit() {
    local job=$SLURM_JOB_ID pattern=%x-%j attempt=${SLURM_RESTART_COUNT:-0}
    if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
        job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID pattern=%x-%A_%a  # scontrol's name for an array task
    fi
    local logs=slurm/logs/$SLURM_JOB_NAME-$job
    local cores=${SLURM_CPUS_PER_TASK:-1} ranks=${SLURM_NTASKS_PER_NODE:-1}
    export OMP_NUM_THREADS=$cores PYTHONUNBUFFERED=1
    # If a collective fails or exceeds strategy.timeout, each rank writes down its last 2,000 collectives, then torch
    # ends the process (3, its default; 0 would wait forever).
    export TORCH_NCCL_ASYNC_ERROR_HANDLING=3 TORCH_NCCL_DUMP_ON_TIMEOUT=1 TORCH_FR_BUFFER_SIZE=2000
    export TORCH_FR_DUMP_TEMP_FILE=$logs-attempt$attempt-collectives-rank
    local mark=$logs-attempt$attempt-stopped  # see rank.py

    echo "$(date '+%F %T') job $job, attempt $attempt: $SLURM_NNODES nodes x $ranks ranks, logs in $logs-rank*.log"
    local words=(fit --config "$CONFIG" --resume auto --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$ranks")
    words+=(${RUN:+--run.folder "$RUN"} ${STORE:+--data.store "$STORE"} ${TIMEOUT:+--strategy.timeout "$TIMEOUT"} "$@")
    ((attempt == 0)) || words+=(--resume auto)  # a checkpoint named in "$@" is only for the first attempt
    trap : USR1 TERM  # meant for the ranks; this shell must outlive them
    local status=0
    # Since Slurm 22.05, srun does not inherit --cpus-per-task from sbatch.
    srun --kill-on-bad-exit=1 --cpus-per-task="$cores" --cpu-bind=cores \
        --open-mode=append --output="slurm/logs/$pattern-rank%t.log" \
        "${PYTHON:-.venv/bin/python}" slurm/rank.py "$mark" "${words[@]}" || status=$?
    trap '' USR1 TERM  # Slurm also sends TERM to a job that it requeues
    if [[ -e $mark ]]; then
        rm "$mark"
        status=75  # EX_TEMPFAIL, fit's status
        queue_again "$job"
    fi
    exit "$status"
}

queue_again() {
    local record state
    record=$(scontrol show job "$1" --oneliner) || true
    state=$(grep -o 'JobState=[A-Z_]*' <<< "$record") || true
    if [[ -n $state && $state != JobState=RUNNING ]]; then
        echo "stopped and saved; Slurm has ended the job already ($state) and decides what becomes of it"
    elif [[ -n $state ]] && scontrol requeue "$1"; then
        echo "stopped and saved; job $1 is queued again"
    else
        record=${record#*Command=} record=${record%% WorkDir=*}
        echo "stopped and saved, but job $1 cannot be queued again: go on with sbatch ${record:-slurm/SCRIPT.sh}"
    fi
}
