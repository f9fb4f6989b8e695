#!/usr/bin/env bash
# The grid experiments of Kim et al. 2023, Figures 3 and 4: eight alphas, three numbers of maps, three seeds, shared out
# over the tasks of an array; a task is one GPU, and trains its share one run after the other.
#
#   sbatch slurm/grid_sweep.sh                                             # 72 runs by 24 tasks
#   TASKS=72 sbatch --array=1-72 slurm/grid_sweep.sh                       # a run a task
#   sbatch slurm/grid_sweep.sh --act gelu_sigmoid relu leaky_relu sigmoid tanh --maps 32      # Figure 3c's others
#   RUNS=/scratch/grid sbatch --array=7 slurm/grid_sweep.sh                # task 7 once more
#
# What follows the name of the script takes the place of the alphas and maps and goes to `python -m small.grid sweep`. A
# task that was killed, requeued or given twice does no harm: a run goes on after its last trial. `python -m small.grid
# figures RUNS` draws what is there, at any time.
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
cd "${SLURM_SUBMIT_DIR:-.}"  # the project's root: Slurm runs a copy of this file from elsewhere

PYTHON=${PYTHON:-.venv/bin/python}
RUNS=${RUNS:-runs/grid/paper}
TASKS=${TASKS:-24}  # the last number of --array

[ $# -gt 0 ] || set -- --alpha 0 0.01 0.05 0.1 0.5 1 5 10 --maps 32 48 64
exec "$PYTHON" -m small.grid sweep --out "$RUNS" --task "$SLURM_ARRAY_TASK_ID/$TASKS" "$@"
