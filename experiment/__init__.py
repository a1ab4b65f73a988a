"""What an experiment is made of, above the components; `run_experiment.py` puts it together."""
