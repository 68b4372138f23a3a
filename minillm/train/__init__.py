"""Training: the loop, MiniLLM and its baselines."""
