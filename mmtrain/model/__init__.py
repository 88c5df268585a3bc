"""The transformer, its layers, its batches and its losses.

Start reading at `model.py`. The modules here neither read files nor use the ranks of a distributed run.
"""
