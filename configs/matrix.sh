#!/bin/sh
# The two packaged models, each onto itself and both directions: four runs, and results/matrix/index.html.
# It may be killed at any instant; the same command goes on.
set -e
cd "$(dirname "$0")/.."
for config in example_config.json configs/matrix/*.json; do
    python run_experiment.py --config "$config"
done
python -m tools.compare_runs results/gemma_to_smol results/smol_to_gemma results/gemma_to_gemma results/smol_to_smol
