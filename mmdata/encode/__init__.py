"""From jsonl lines to token ids and trained spans.

Start with `rows.py` (a line as a row) and `encoder.py` (rows to ids). The columnar way goes through `columns.py` and
`blocks.py`; its check and fallback, `reference.py`, through `template.py` and `traced.py`.
"""
