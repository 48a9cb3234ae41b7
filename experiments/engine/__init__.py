"""What runs an experiment: command lines, progress, records, checkpoints."""
