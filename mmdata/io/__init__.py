"""Reading and writing files: lines of plain and compressed files, Arrow files, URLs, and worker processes.

Begin at `files.py`, the only place that writes atomically, hashes files and locks.
"""
