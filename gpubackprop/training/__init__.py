"""Training: the loop over epochs and mini-batches, data sources, callbacks, evaluation, checkpoints."""
