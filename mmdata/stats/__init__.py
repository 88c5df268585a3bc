"""`mm stats`: measure a packed dataset or a jsonl file, and report the results.

`stats.py` has the entry points. They call `scan`, which reads rows and tokens into the frames of a `Tally`, and
`figures`, which computes the reported numbers and warnings from these by polars expressions.
"""
