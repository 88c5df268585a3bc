"""Packed datasets on disk: memory-mapped reading (dataset.py) and the loaders for training (loader.py), see README.md."""
