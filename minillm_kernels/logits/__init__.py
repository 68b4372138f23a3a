"""Losses, statistics and samples of logits that exist."""
