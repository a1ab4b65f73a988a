#!/bin/sh
# The two packaged models, each onto itself and both directions: four runs, and results/matrix/index.html.
# It may be killed at any instant; the same command goes on.
set -e
cd "$(dirname "$0")/.."
for config in configs/matrix/*.json; do
    python run_experiment.py --config "$config"
done
python -m tools.compare_runs --out results/matrix \
    results/matrix/gemma_to_smol results/matrix/smol_to_gemma results/matrix/gemma_to_gemma results/matrix/smol_to_smol
