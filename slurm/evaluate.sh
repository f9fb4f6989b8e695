#!/usr/bin/env bash
# A run's newest checkpoint -> an exported folder -> ARC, PIQA, OpenBookQA and HellaSwag, single- and five-shot as in the
# residual-streams paper. One GPU.
#
#   RUN=runs/1b/values bash slurm/evaluate.sh                              # submits itself; exports to out/1b/values
#   RUN=runs/1b/values DATA=/scratch/evals bash slurm/evaluate.sh          # nodes without a network: see evals run --help
#   RUN=runs/1b/values STEP=20000 TASKS=piqa SHOTS=0 sbatch slurm/evaluate.sh --limit 200
#
# What follows the name of the script goes to `python -m evals run`. An export that is there is used as it is; where the
# run has gone on since, give another OUT. Results: OUT/evals/lm_eval.json, one after another as they are done.
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
OUT=${OUT:-out/${RUN#runs/}${STEP:+-step$STEP}}
TASKS=${TASKS:-arc_easy arc_challenge piqa openbookqa hellaswag}
SHOTS=${SHOTS:-1 5}

"$PYTHON" -m llm export "$RUN" "$OUT" ${STEP:+--step "$STEP"}
# shellcheck disable=SC2086  # several words each
exec "$PYTHON" -m evals run "$OUT" --tasks $TASKS --shots $SHOTS ${DATA:+--data "$DATA"} "$@"
