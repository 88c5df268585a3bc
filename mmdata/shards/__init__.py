"""Packed datasets on disk: the manifest, memory-mapped reading, verification, and the loaders that training reads from.

Start reading at `dataset.py` and `loader.py`. shards/README.md specifies the format.
"""
