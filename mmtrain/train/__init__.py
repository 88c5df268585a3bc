"""`mm train`: plan a run, start it, and the training loop.

Begin at `loop.py`; `plan.py` reads and checks everything before the first step.
"""
