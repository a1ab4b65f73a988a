"""What a run is: configuration, inputs, models, conditions, plan, executors; it computes no result."""
