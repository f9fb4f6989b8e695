#!/usr/bin/env bash
# GPT-2 124M on OpenWebText with NMDA (alpha 10), as in Kim et al. 2023, Appendix A.9: 1 node x 8 GPUs.
#
#   bash slurm/gpt2_124m_nmda.sh                                           # submits itself
#   CONFIG=configs/gpt2_124m_gelu.yaml bash slurm/gpt2_124m_nmda.sh        # the baseline
#   GPUS=4 PARTITION=gpu bash slurm/gpt2_124m_nmda.sh                      # fewer GPUs, still 480 sequences per step
#   sbatch --time=96:00:00 slurm/gpt2_124m_nmda.sh                         # with sbatch, from the repository root
#
# Arguments after the script name go to `python -m llm fit`. launch.sh lists the variables.
#SBATCH --job-name=gpt2-124m
#SBATCH --nodes=1
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
CONFIG=${CONFIG:-configs/gpt2_124m_nmda10.yaml}
fit "$@"
