#!/bin/bash
# One task of the array does one shard of a sweep. Fetch the models first: compute nodes may have
# no network.
#     sbatch --array=1-8 examples/slurm_sweep.sh examples/sweep.toml
#SBATCH --job-name=sweep
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --time=08:00:00
set -euo pipefail
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
exec python cli.py sweep "$1" --shard "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"
