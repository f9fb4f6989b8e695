#!/usr/bin/env bash
# GPT-2 124M on OpenWebText with NMDA, alpha 10, as in Kim et al. 2023, Appendix A.9: 1 node x 8 GPUs.
#
#   bash slurm/gpt2_124m_nmda.sh                                           # submits itself
#   CONFIG=configs/gpt2_124m_gelu.yaml bash slurm/gpt2_124m_nmda.sh        # what it is compared with
#   GPUS=4 PARTITION=gpu bash slurm/gpt2_124m_nmda.sh                      # fewer GPUs, the same 480 rows a step
#   sbatch --time=96:00:00 slurm/gpt2_124m_nmda.sh                         # by sbatch, in the project's root
#
# What follows the name of the script goes to `python -m llm fit`; the variables are told in launch.sh.
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
source "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}/slurm/launch.sh"
as_a_job "$@"
CONFIG=${CONFIG:-configs/gpt2_124m_nmda10.yaml}
fit "$@"
