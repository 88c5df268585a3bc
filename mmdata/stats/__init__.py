"""`mm stats`: the figures of a dataset or a jsonl file.

Begin at `stats.py`; `report/` draws the figures as an HTML page.
"""
