#!/usr/bin/env bash
# Nemotron-CC-HQ -> token store, in 100 parallel tasks. The task that ends last finishes the store.
#
#   sbatch slurm/prepare_nemotron.sh                                    # with the defaults below
#   SOURCE=/data/nemotron-cc STORE=/scratch/nemotron sbatch --account=mine slurm/prepare_nemotron.sh --deduplicate
#   sbatch --array=7,12 slurm/prepare_nemotron.sh                       # repeat tasks 7 and 12
#   TASKS=400 sbatch --array=1-400 slurm/prepare_nemotron.sh            # another number of tasks
#
# Killed, requeued or repeated tasks do no harm: the same command makes only what is missing. Arguments after the script
# name go to `python -m llm prepare`; see its --help.
#SBATCH --job-name=prepare-nemotron
#SBATCH --array=1-100
#SBATCH --cpus-per-task=16
#SBATCH --mem=32G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=slurm/logs/%x-%A_%a.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"  # the repository root: Slurm runs a copy of this file from elsewhere

PYTHON=${PYTHON:-.venv/bin/python}
SOURCE=${SOURCE:-data/nemotron-cc}                # holds quality=*/kind=*/kind2=*/*.jsonl.zstd
STORE=${STORE:-data/nemotron}
TOKENIZER=${TOKENIZER:-meta-llama/Llama-3.1-8B}   # or a folder, for nodes without a network
WHERE=${WHERE:-quality=high}                      # parts of the path, for example "quality=high kind=actual"
TOKENS=${TOKENS:-87e9}                            # 40,000 steps x 512 x 4,096 = 83.9e9, with a reserve for the estimate
SEED=${SEED:-1}
TASKS=${TASKS:-100}                               # the last number of --array

where=()
for part in $WHERE; do where+=(--path-filter "$part"); done

exec "$PYTHON" -m llm prepare "$SOURCE" --out "$STORE" --tokenizer "$TOKENIZER" \
    "${where[@]}" --id-key warc_record_id --subset-tokens "$TOKENS" --seed "$SEED" --validation-fraction 0.0005 \
    --task "$SLURM_ARRAY_TASK_ID/$TASKS" "$@"
