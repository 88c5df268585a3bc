"""`mm pack`: convert jsonl files to packed Arrow shards.

Start reading at `pipeline.py`. `part.py` packs one part of the input; `options.py` declares the options of `mm pack`.
"""
