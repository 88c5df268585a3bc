"""Conversion of jsonl lines to token ids and the ranges of tokens that are trained on.

Begin with `rows.py`, which parses a line, and `encoder.py`, which encodes rows: most of them many at a time, with
`columns.py`, `forms.py` and `fast.py`, the others with jinja2, with `reference.py` and the folder `template`.
"""
