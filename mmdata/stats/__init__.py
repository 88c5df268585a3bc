"""`mm stats`: the figures of a dataset or a jsonl file.

Begin at `stats.py`. `scan` reads rows and tokens into tallies (`frames`, `tokens`, `tally`), `figures` reads figures and warnings from them.
"""
