"""Conversion of jsonl lines to token ids and the ranges of tokens that are trained on.

Begin with `rows.py`, which parses a line to a row, and `encoder.py`, which encodes rows. Most conversations and pairs
are rendered many at a time, by `columns.py` and `blocks.py`. The others are rendered with jinja2, by `reference.py`,
`template.py` and `traced.py`. The results of the faster code are checked against those of jinja2.
"""
