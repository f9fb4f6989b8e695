#!/usr/bin/env bash
# Export a run's newest checkpoint and evaluate it on the tasks of Burns et al. 2025 (ARC, PIQA, OpenBookQA, HellaSwag)
# at 0, 1 and 5 shots. One GPU.
#
#   RUN=runs/1b/values bash slurm/evaluate.sh                              # submits itself
#   RUN=runs/1b/values DATA=/scratch/evals bash slurm/evaluate.sh          # for nodes without a network, see DATA
#   RUN=runs/1b/values STEP=20000 TASKS=piqa SHOTS=0 sbatch slurm/evaluate.sh --limit 200
#
# Arguments after the script name go to `python -m evals run`. The job exports the newest checkpoint, or that of STEP,
# to RUN/exports/step-N. It then evaluates every step exported there and plots accuracy over training. `evals compare`
# reads the results of the last step. With OUT=FOLDER, the job exports to FOLDER and evaluates only that.
#
# Each result goes to evals/lm_eval.json in the export as soon as it is done; a requeued or repeated job skips finished
# results. DATA is a folder that `python -m evals prefetch DATA` filled on a machine with a network. SUITE, TASKS and
# SHOTS are options of `evals run` (default suite: paper).
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.log
set -euo pipefail
scripts=$(dirname "$0")
[[ -e $scripts/launch.sh ]] || scripts=$SLURM_SUBMIT_DIR/slurm  # Slurm runs a copy of this file from elsewhere
source "$scripts/launch.sh"
RUN=${RUN:?give the run folder, as in RUN=runs/1b/values}
as_a_job "$@"

PYTHON=${PYTHON:-.venv/bin/python}

"$PYTHON" -m llm export "$RUN" ${OUT:+--out "$OUT"} ${STEP:+--step "$STEP"}
models=(--checkpoints "$RUN")
[ -z "${OUT:-}" ] || models=("$OUT")
# shellcheck disable=SC2086  # several words each
exec "$PYTHON" -m evals run "${models[@]}" --suite "${SUITE:-paper}" ${TASKS:+--tasks $TASKS} ${SHOTS:+--shots $SHOTS} \
    ${DATA:+--data "$DATA"} "$@"
