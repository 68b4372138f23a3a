"""What is measured of a model on held-out prompts: measure.py decides, one file per family of metrics measures.

`Evaluation` (result.py) is the result everywhere: around the stages of a run, in `minillm evaluate` and in a study.
"""
