#!/usr/bin/env bash
# What the scripts of this folder that train have in common; they source it. Two functions:
#
#   as_a_job "$@"    outside a job: submits the script that called it and ends; inside one: goes to the project's root
#   fit "$@"         python -m llm fit, one process a GPU on all nodes of the job; ends the script with fit's status
#
# A fit that is told to stop (SIGUSR1 before the time limit, SIGTERM at pre-emption) saves and ends with status 75. The
# job is then put back into the queue, and its next life goes on from there; with any other status the job ends. What
# Slurm is ending already is left to it: it queues a job again after the loss of a node, and not after scancel.
#
# Variables: CONFIG; RUN (run.folder), STORE (data.store), TIMEOUT (strategy.timeout, seconds a collective may take),
# PYTHON. For `bash slurm/SCRIPT.sh` also NODES, GPUS (a node), PARTITION, ACCOUNT, QOS, TIME, which become options of
# sbatch; sbatch itself reads SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_QOS and SBATCH_TIMELIMIT.

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
    local job=$SLURM_JOB_ID pattern=%x-%j life=${SLURM_RESTART_COUNT:-0}
    if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
        job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID pattern=%x-%A_%a  # what scontrol calls a task of an array
    fi
    local logs=slurm/logs/$SLURM_JOB_NAME-$job
    local cores=${SLURM_CPUS_PER_TASK:-1} ranks=${SLURM_NTASKS_PER_NODE:-1}
    export OMP_NUM_THREADS=$cores PYTHONUNBUFFERED=1
    # Where a collective fails or takes longer than strategy.timeout, torch ends the process (3 is its default, 0 would
    # wait for ever) once each rank has written down its last 2,000 collectives.
    export TORCH_NCCL_ASYNC_ERROR_HANDLING=3 TORCH_NCCL_DUMP_ON_TIMEOUT=1 TORCH_FR_BUFFER_SIZE=2000
    export TORCH_FR_DUMP_TEMP_FILE=$logs-life$life-collectives-rank
    local mark=$logs-life$life-stopped  # see rank.py

    echo "$(date '+%F %T') job $job, life $life: $SLURM_NNODES nodes x $ranks ranks, logs in $logs-rank*.log"
    local words=(fit --config "$CONFIG" --resume auto --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$ranks")
    words+=(${RUN:+--run.folder "$RUN"} ${STORE:+--data.store "$STORE"} ${TIMEOUT:+--strategy.timeout "$TIMEOUT"} "$@")
    ((life == 0)) || words+=(--resume auto)  # the checkpoint that "$@" may name was where the first life began
    trap : USR1 TERM  # they are for the ranks; this shell has to outlive them
    local status=0
    # srun does not take --cpus-per-task over from sbatch, since Slurm 22.05.
    srun --kill-on-bad-exit=1 --cpus-per-task="$cores" --cpu-bind=cores \
        --open-mode=append --output="slurm/logs/$pattern-rank%t.log" \
        "${PYTHON:-.venv/bin/python}" slurm/rank.py "$mark" "${words[@]}" || status=$?
    trap '' USR1 TERM  # Slurm sends TERM to a job that it queues again, too
    if [[ -e $mark ]]; then
        rm "$mark"
        status=75  # EX_TEMPFAIL, as fit has it
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
