#!/usr/bin/env bash
# The 1B classic model of Burns et al. 2025 on the store that prepare_nemotron.sh makes: 2 nodes x 8 GPUs.
#
#   bash slurm/1b_classic.sh                                               # submits itself
#   NODES=4 PARTITION=gpu ACCOUNT=mine TIME=24:00:00 bash slurm/1b_classic.sh
#   sbatch --nodes=4 slurm/1b_classic.sh                                   # with sbatch, from the repository root
#   STORE=/scratch/nemotron RUN=/scratch/runs/classic bash slurm/1b_classic.sh --run.checkpoint_every 250
#
# Arguments after the script name go to `python -m llm fit`. launch.sh lists the variables; docs/cluster.md explains
# what happens at the time limit.
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
scripts=$(dirname "$0")
[[ -e $scripts/launch.sh ]] || scripts=$SLURM_SUBMIT_DIR/slurm  # Slurm runs a copy of this file from elsewhere
source "$scripts/launch.sh"
as_a_job "$@"
CONFIG=${CONFIG:-configs/1b_classic.yaml}
fit "$@"
