#!/usr/bin/env bash
# The 1B model of 1b_classic.sh with NMDA (alpha 10) in its gated FFN. No paper has this run: see its config.
#
#   bash slurm/1b_nmda.sh                                                  # submits itself: 2 nodes x 8 GPUs
#   RUN=runs/1b/nmda2 bash slurm/1b_nmda.sh --decoder.nmda_alpha 2.0
#   sbatch --nodes=4 slurm/1b_nmda.sh                                      # with sbatch, from the repository root
#
# Arguments after the script name go to `python -m llm fit`. launch.sh lists the variables.
#SBATCH --job-name=1b-nmda
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
CONFIG=${CONFIG:-configs/1b_nmda.yaml}
fit "$@"
