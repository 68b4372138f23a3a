"""What a run leaves behind: its directory, checkpoints, exports, metrics."""
