"""Models: loading, the seam at the vocabulary head, sampling, and what they cost."""
