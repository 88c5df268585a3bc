"""From batches to weights: model, losses, the one training loop, checkpoints, chat."""
