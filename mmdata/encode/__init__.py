"""From a jsonl line to token ids and trained spans: row schemas, chat templates, encoding.

Begin at `rows.py` (line to row) and `encoder.py` (rows to ids).
"""
