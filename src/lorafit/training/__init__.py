"""Training: the composition root, the one loop, optimizer and schedule, precision, checkpoints."""
