#!/usr/bin/env bash
# The 8M pair of Burns et al. 2025 on TinyStories, three seeds per variant: six tasks with one GPU each. Tasks 1 and 2
# are classic and values of seed 1, tasks 3 and 4 of seed 2, tasks 5 and 6 of seed 3.
#
#   bash slurm/tinystories_8m.sh                                           # submits itself
#   sbatch --array=1,2 slurm/tinystories_8m.sh                             # only the pair of seed 1
#   sbatch --array=1-10 slurm/tinystories_8m.sh                            # five seeds
#   STORE=/scratch/tinystories RUNS=/scratch/runs PARTITION=gpu bash slurm/tinystories_8m.sh
#
# The runs are RUNS/VARIANT-seedN. Arguments after the script name go to `python -m llm fit`. launch.sh lists the other
# variables.
#SBATCH --job-name=tinystories-8m
#SBATCH --array=1-6
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%A_%a.log
set -euo pipefail
scripts=$(dirname "$0")
[[ -e $scripts/launch.sh ]] || scripts=$SLURM_SUBMIT_DIR/slurm  # Slurm runs a copy of this file from elsewhere
source "$scripts/launch.sh"
as_a_job "$@"

VARIANTS=(classic values)
number=$((SLURM_ARRAY_TASK_ID - 1))
variant=${VARIANTS[number % 2]} seed=$((number / 2 + 1))

CONFIG=configs/tinystories_8m_$variant.yaml
RUN=${RUNS:-runs/tinystories_8m}/$variant-seed$seed
fit --seed_everything "$seed" "$@"
