"""`mm stats`: measure a packed dataset or a jsonl file, and report the results.

`stats.py` has the entry points. They call `scan`, which reads rows and tokens and counts them in `Tally` objects (with
`frames`, `tokens` and `tally`), and `figures`, which computes the reported numbers and warnings from these.
"""
