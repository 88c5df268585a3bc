"""Packed datasets on disk: manifest, memory-mapped reading (dataset.py), verification, and the loaders for training
(loader.py). shards/README.md specifies the format.
"""
