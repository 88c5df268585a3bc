"""Packed datasets on disk: the manifest, memory-mapped reading, verification, and the loaders that training reads from.

Begin at `dataset.py` and `loader.py`. The format is specified in shards/README.md.
"""
