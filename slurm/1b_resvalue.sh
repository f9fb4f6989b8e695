#!/usr/bin/env bash
# The 1B model of Burns et al. 2025 with a residual value stream: the other half of the pair of 1b_classic.sh, on the
# same data in the same order.
#
#   bash slurm/1b_resvalue.sh                                              # submits itself: 2 nodes x 8 GPUs
#   NODES=4 PARTITION=gpu ACCOUNT=mine bash slurm/1b_resvalue.sh
#   sbatch --nodes=4 slurm/1b_resvalue.sh --run.checkpoint_every 250       # with sbatch, from the repository root
#
# Arguments after the script name go to `python -m llm fit`. launch.sh lists the variables.
#SBATCH --job-name=1b-resvalue
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=48:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.log
set -euo pipefail
scripts=$(dirname "$0")
[[ -e $scripts/launch.sh ]] || scripts=$SLURM_SUBMIT_DIR/slurm  # Slurm runs a copy of this file from elsewhere
source "$scripts/launch.sh"
as_a_job "$@"
CONFIG=${CONFIG:-configs/1b_values.yaml}
fit "$@"
