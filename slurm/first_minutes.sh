#!/usr/bin/env bash
# The first minutes on GPUs: short runs of the 1B model on one GPU, one node and two nodes, which check themselves, and
# a table of them to paste into a report. No run takes more than four minutes.
#
#   bash slurm/first_minutes.sh                                            # submits three jobs, one after the other
#   SIZES=one-gpu bash slurm/first_minutes.sh                              # only that of one GPU
#   PARTITION=gpu ACCOUNT=mine GPUS=4 bash slurm/first_minutes.sh          # nodes of four GPUs
#   bash slurm/first_minutes.sh table                                      # the table so far
#
# A job skips the parts that OUT/results has already: to repeat one, delete its file. Arguments after the script name go
# to `python -m llm fit` of every part. Variables, in addition to those of launch.sh: OUT (default:
# runs/first_minutes), SIZES, STORE (default: one of built-in stories, which the first job makes in OUT), MINUTES that a
# part may take (default: 4).
#SBATCH --job-name=first-minutes
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=00:45:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.log
set -euo pipefail
scripts=$(dirname "$0")
[[ -e $scripts/launch.sh ]] || scripts=$SLURM_SUBMIT_DIR/slurm  # Slurm runs a copy of this file from elsewhere
source "$scripts/launch.sh"

export OUT=${OUT:-runs/first_minutes}
CONFIG=${CONFIG:-configs/1b_values.yaml} MINUTES=${MINUTES:-4}

# Submit a job for each size, each after the one before, whose results it compares with.
submit() {
    cd "$scripts/.."
    leave_job
    local size job before=
    for size in ${SIZES:-one-gpu one-node two-nodes}; do
        local gpus=${GPUS:-8} nodes=1 memory=0
        [[ $size != one-gpu ]] || gpus=1 memory=64G
        [[ $size != two-nodes ]] || nodes=2
        job=$(sbatch --parsable --nodes="$nodes" --gpus-per-node="$gpus" --ntasks-per-node="$gpus" --mem="$memory" \
            ${before:+"--dependency=afterany:$before"} ${PARTITION:+"--partition=$PARTITION"} \
            ${ACCOUNT:+"--account=$ACCOUNT"} ${QOS:+"--qos=$QOS"} ${TIME:+"--time=$TIME"} \
            slurm/first_minutes.sh "$size" "$@")
        before=${job%%;*}
        echo "$size: job $before, log slurm/logs/first-minutes-$before.log"
    done
}

# part NAME BESIDE WORDS...: one fit, with BESIDE at work next to it, and its result in OUT/results/NAME.json.
part() {
    local name=$1 beside=$2 begin=$SECONDS status=0
    RUN=$OUT/$name
    shift 2
    [[ ! -e $OUT/results/$name.json ]] || return 0
    case $name in
        resume) RUN=$OUT/one-gpu ;;
        requeue) [[ $ATTEMPT != 0 ]] || rm -rf "$RUN" ;;
        *) rm -rf "$RUN" ;;  # what a job that was ended left of it
    esac
    [[ $name == requeue ]] || rm -f "$OUT/after"
    "$beside" &
    local helper=$!
    local placement="{class_path: llm.bench.placement.Placement, init_args: {out: $RUN/ranks}}"
    SLURM_TIMELIMIT=$MINUTES train "${COMMON[@]}" --trainer.callbacks+="$placement" "$@" || status=$?
    kill -KILL "$helper" 2> /dev/null && wait "$helper" 2> /dev/null || true
    [[ ! -e $OUT/acted ]] || echo $(($(date +%s) - $(< "$OUT/acted"))) > "$OUT/after"
    rm -f "$OUT/acted"
    if [[ $name == requeue && $status == 75 ]]; then
        queue_again "stopped and saved"
        exit "$status"
    fi
    "$PYTHON" -m llm.bench.first_minutes record "$OUT" "$name" "$status" "$((SECONDS - begin))" \
        "$(cat "$OUT/after" 2> /dev/null)" "$LOGS" "$ATTEMPT"
    rm -f "$LOGS-srun"
    [[ $name == one-gpu ]] || rm -rf "$RUN/checkpoints"  # 15 GB each
}

nothing() { :; }

# Wait until the run has trained "$1" steps; write down when what follows is done to it.
after_steps() {
    until [[ -e $RUN/metrics.csv && $(wc -l < "$RUN/metrics.csv") -gt $1 ]]; do sleep 0.2; done
    date +%s > "$OUT/acted"
}

signal_a_step() { after_steps 3 && scancel --signal=USR1 "$SLURM_JOB_ID"; }

signal_first_step() {  # the blocks are compiled in it
    until [[ -e $RUN/run.json ]]; do sleep 0.2; done
    date +%s > "$OUT/acted" && scancel --signal=USR1 "$SLURM_JOB_ID"
}

stop_last_rank() {
    after_steps 3
    local place
    place=$("$PYTHON" -m llm.bench.first_minutes last-rank "$RUN/ranks")  # NODE PROCESS
    srun --overlap --nodes=1 --ntasks=1 --nodelist="${place% *}" --output=/dev/null kill -STOP "${place#* }"
}

if [[ ${1:-} == table ]]; then
    cd "$scripts/.."
    exec "$PYTHON" -m llm.bench.first_minutes table "$OUT"
elif [[ $scripts == "$(dirname "$0")" ]]; then
    submit "$@"
    exit
fi
size=$1 ATTEMPT=${SLURM_RESTART_COUNT:-0}
shift
as_a_job
mkdir -p "$OUT/results"
if [[ -z ${STORE:-} ]]; then
    STORE=$OUT/store
    "$PYTHON" -m llm prepare stories --documents 30000 --train-tokenizer 1024 --out "$STORE"
fi
devices=$((SLURM_NNODES * SLURM_NTASKS_PER_NODE))
COMMON=(--trainer.max_steps 30 --trainer.log_every_n_steps 1 --run.loggers "[csv]")
COMMON+=(--data.batch_size 32 --data.validate_every 10 --data.validation_rows 32 --run.keep_every null)
COMMON+=(--run.checkpoint_every 1000 --model.schedule.warmup_steps 5 --model.schedule.cooldown_steps 5)
endless=100000  # steps: another than the last one ends the part
full=(--trainer.max_steps 20 --data.batch_size "$((32 * devices))")  # a step of the real run on 16 GPUs
case $size in
    one-gpu)
        part one-gpu nothing "$@"
        part resume nothing --trainer.max_steps 36 "$@"
        part ddp nothing --strategy.name ddp "$@"
        part rows-8 nothing --data.micro_batch_size 8 "$@"
        ;;
    one-node)
        part one-node nothing "$@"
        part signal signal_a_step --trainer.max_steps "$endless" "$@"
        part signal-first signal_first_step --trainer.max_steps "$endless" "$@"
        ;;
    two-nodes)
        export NCCL_DEBUG=INFO NCCL_DEBUG_SUBSYS=INIT,NET  # which network it uses
        part nodes-fsdp2 nothing "${full[@]}" "$@"
        part stage-1 nothing "${full[@]}" --strategy.name deepspeed --strategy.stage 1 "$@"
        part stage-2 nothing "${full[@]}" --strategy.name deepspeed --strategy.stage 2 "$@"
        part nodes-ddp nothing "${full[@]}" --strategy.name ddp "$@"
        TIMEOUT=${TIMEOUT:-60} part stop stop_last_rank --trainer.max_steps "$endless" "$@"
        # The last one: the job requeues itself, and in its next attempt the run resumes for 10 steps.
        if ((ATTEMPT == 0)); then
            part requeue signal_a_step --trainer.max_steps "$endless" "$@"
        else
            saved=$(ls "$OUT/requeue/checkpoints" | grep -o '^step-[0-9]*$' | tail -n 1)
            part requeue nothing --trainer.max_steps "$((10#${saved#step-} + 10))" "$@"
        fi
        ;;
esac
"$PYTHON" -m llm.bench.first_minutes table "$OUT"
