"""DeepSpeed training that every recipe shares: settings, launching, checkpoints, the log."""
