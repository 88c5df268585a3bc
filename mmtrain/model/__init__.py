"""The transformer, its parts, its batches and its losses.

Begin at `model.py`; nothing here reads files or knows of several processes.
"""
