"""Records of training runs and their display: metrics, experiment trackers, run history, and the HTML report on runs.

Begin with `metrics.py` (written while training) and `history.py` (read afterwards).
"""
