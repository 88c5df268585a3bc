"""What a run records and shows: metrics, trackers, history, and the HTML run report.

Begin at `metrics.py` (written while training) and `history.py` (read afterwards).
"""
