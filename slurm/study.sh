#!/usr/bin/env bash
# All runs of a study (docs/study.md): a job array for each size, with the nodes, GPUs and time that the study's YAML
# names, and the verdict once they have ended. A task trains one run and the branches that start from it.
#
#   bash slurm/study.sh configs/studies/values_nemotron.yaml               # submits all arrays
#   PARTITION=gpu ACCOUNT=mine bash slurm/study.sh configs/studies/values_nemotron.yaml
#   python -m llm study status configs/studies/values_nemotron.yaml
#
# Repeat the first command after an interruption: tasks whose runs are over end at once. With a search (`tune`), its
# arrays come first. OUT is the folder of the verdict. launch.sh lists the other variables; docs/cluster.md explains
# what happens at the time limit.
#SBATCH --job-name=study
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%A_%a.log
set -euo pipefail
source "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}/slurm/launch.sh"
STUDY=${1:?give the YAML of a study, such as configs/studies/values_nemotron.yaml}
PYTHON=${PYTHON:-.venv/bin/python}

submit() {
    sbatch --parsable ${PARTITION:+"--partition=$PARTITION"} ${ACCOUNT:+"--account=$ACCOUNT"} ${QOS:+"--qos=$QOS"} "$@"
}

after() { local IFS=:; [ $# -eq 0 ] || echo "--dependency=afterany:$*"; }

submit_all() {
    local arrays stage size tasks nodes gpus cpus time searches=() all=()
    arrays=$("$PYTHON" -m llm study tasks "$STUDY")
    while read -r stage size tasks nodes gpus cpus time; do
        local options=(--job-name="study-$size" --array="1-$tasks" --nodes="$nodes" --cpus-per-task="$cpus" --time="$time")
        options+=(--gpus-per-node="$gpus" --ntasks-per-node="$((gpus > 0 ? gpus : 1))")
        # shellcheck disable=SC2046  # one word or none
        [ "$stage" = tune ] || options+=($(after "${searches[@]}"))
        all+=("$(submit "${options[@]}" slurm/study.sh "$STUDY" "$stage" "$size" "$tasks")")
        [ "$stage" = main ] || searches+=("${all[-1]}")
        echo "$stage, $size: job ${all[-1]}, $tasks tasks of $nodes nodes x $gpus GPUs"
    done <<< "$arrays"
    # shellcheck disable=SC2046
    submit --job-name=study-verdict $(after "${all[@]}") --gpus-per-node=0 --cpus-per-task=1 --mem=8G --time=1:00:00 \
        --output=slurm/logs/%x-%j.log slurm/study.sh "$STUDY" verdict | sed 's/^/verdict: job /'
}

# The task's runs, one after the other, by `fit` of launch.sh. If one fails, the next one still has its turn; a run that diverges is a result.
train_task() {
    local configs config status failed=0
    local missing=("$PYTHON" -m llm study tasks "$STUDY" --stage "$1" --size "$2" --task "$SLURM_ARRAY_TASK_ID/$3")
    configs=$("${missing[@]}")
    trap : USR1 TERM  # meant for the ranks; this shell must outlive them
    for config in $configs; do
        status=0
        (RUN='' CONFIG=$config fit) || status=$?
        [ "$status" -ne 75 ] || exit 75  # stopped, and queued again
        [ "$status" -eq 0 ] || failed=$status
    done
    [ "$failed" -eq 0 ] || [ -n "$("${missing[@]}")" ] || failed=0
    exit "$failed"
}

if [[ -e $(dirname "$0")/launch.sh ]]; then  # else a job: Slurm runs a copy of the script from elsewhere
    cd "$(dirname "$0")/.."
    leave_job
    submit_all
    exit
fi
BATCH=yes
cd "${SLURM_SUBMIT_DIR:-.}"
if [[ ${2:-} == verdict ]]; then
    exec "$PYTHON" -m evals study "$STUDY" --out "${OUT:-runs/studies/$(basename "$STUDY" .yaml)/verdict}"
fi
train_task "${@:2}"
