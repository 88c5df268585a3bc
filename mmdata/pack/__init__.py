"""`mm pack`: convert jsonl files to packed Arrow shards.

Start reading at `pipeline.py`. `inputs.py` cuts the inputs into parts, `part.py` packs one of them; `options.py` declares the options of `mm pack`.
"""
