"""Records of a run and their display: metrics, trackers, history, and the HTML run report.

Begin with `metrics.py` (written while training) and `history.py` (read afterwards).
"""
