#!/usr/bin/env bash
# A run's newest checkpoint -> an exported folder -> ARC, PIQA, OpenBookQA and HellaSwag at 0, 1 and 5 shots: the tasks of
# Burns et al. 2025. One GPU.
#
#   RUN=runs/1b/values bash slurm/evaluate.sh                              # submits itself
#   RUN=runs/1b/values DATA=/scratch/evals bash slurm/evaluate.sh          # nodes without a network, see below
#   RUN=runs/1b/values STEP=20000 TASKS=piqa SHOTS=0 sbatch slurm/evaluate.sh --limit 200
#
# What follows the name of the script goes to `python -m evals run`. The checkpoint (or that of STEP) is exported to
# RUN/exports/step-N, and every step that was ever exported there is evaluated and drawn over training; `evals compare`
# finds the last. With OUT=FOLDER the export goes there and is evaluated alone. Results: evals/lm_eval.json in the export,
# one after another as they are done; a job that is queued again, or given again, goes on after the last of them. DATA is
# a folder that `python -m evals prefetch DATA` filled where there is a network. SUITE, TASKS and SHOTS: the options of
# `evals run`; the suite is `paper`.
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
source "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}/slurm/launch.sh"
RUN=${RUN:?give the run folder, as in RUN=runs/1b/values}
as_a_job "$@"

PYTHON=${PYTHON:-.venv/bin/python}

"$PYTHON" -m llm export "$RUN" ${OUT:+"$OUT"} ${STEP:+--step "$STEP"}
models=(--checkpoints "$RUN")
[ -z "${OUT:-}" ] || models=("$OUT")
# shellcheck disable=SC2086  # several words each
exec "$PYTHON" -m evals run "${models[@]}" --suite "${SUITE:-paper}" ${TASKS:+--tasks $TASKS} ${SHOTS:+--shots $SHOTS} \
    ${DATA:+--data "$DATA"} "$@"
