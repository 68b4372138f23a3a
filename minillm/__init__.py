"""MiniLLM: distillation of language models by sequence-level reverse KL (arXiv 2306.08543)."""
