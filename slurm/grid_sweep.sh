#!/usr/bin/env bash
# The grid experiments of Kim et al. 2023, Figures 3 and 4: eight alphas, three numbers of maps, three seeds. A job
# array divides the runs; each task has one GPU and trains its runs one after the other.
#
#   sbatch slurm/grid_sweep.sh                                             # 72 runs in 24 tasks
#   TASKS=72 sbatch --array=1-72 slurm/grid_sweep.sh                       # one run per task
#   sbatch slurm/grid_sweep.sh --act gelu_sigmoid relu leaky_relu sigmoid tanh --maps 32      # the others of Figure 3c
#   RUNS=/scratch/grid sbatch --array=7 slurm/grid_sweep.sh                # repeat task 7
#
# Arguments after the script name replace the alphas and maps and go to `python -m small.grid sweep`. Killed, requeued
# or repeated tasks do no harm: each run resumes after its last finished trial. `python -m small.grid figures RUNS`
# draws the results so far.
#SBATCH --job-name=grid-sweep
#SBATCH --array=1-24
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%A_%a.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"  # the repository root: Slurm runs a copy of this file from elsewhere

PYTHON=${PYTHON:-.venv/bin/python}
RUNS=${RUNS:-runs/grid/paper}
TASKS=${TASKS:-24}  # the last number of --array

[ $# -gt 0 ] || set -- --alpha 0 0.01 0.05 0.1 0.5 1 5 10 --maps 32 48 64
exec "$PYTHON" -m small.grid sweep --out "$RUNS" --task "$SLURM_ARRAY_TASK_ID/$TASKS" "$@"
