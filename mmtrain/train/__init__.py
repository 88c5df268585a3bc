"""The code of `mm train`: plan a run, start it, and the training loop.

Start reading at `loop.py`. `plan.py` opens and checks datasets, checkpoints and options before the first step.
"""
