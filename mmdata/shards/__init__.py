"""Packed datasets on disk. Start at dataset.py (memory-mapped reading) and loader.py (training). Format: README.md."""
