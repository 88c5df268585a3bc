"""`mm pack`: jsonl files to packed Arrow shards.

Begin at `pipeline.py`; `part.py` packs one part of the input, `options.py` declares what `mm pack` takes.
"""
