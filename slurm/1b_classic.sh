#!/usr/bin/env bash
# The 1B model of Burns et al. 2025, classic, on the store of prepare_nemotron.sh: 2 nodes x 8 GPUs.
#
#   bash slurm/1b_classic.sh                                               # submits itself
#   NODES=4 PARTITION=gpu ACCOUNT=mine TIME=24:00:00 bash slurm/1b_classic.sh
#   sbatch --nodes=4 slurm/1b_classic.sh                                   # the same by sbatch, in the project's root
#   STORE=/scratch/nemotron RUN=/scratch/runs/classic bash slurm/1b_classic.sh --run.checkpoint_every 250
#
# What follows the name of the script goes to `python -m llm fit`. The variables are told in launch.sh, and what becomes
# of the job at its time limit in docs/cluster.md.
#SBATCH --job-name=1b-classic
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
source "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}/slurm/launch.sh"
as_a_job "$@"
CONFIG=${CONFIG:-configs/1b_classic.yaml}
fit "$@"
