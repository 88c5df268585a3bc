"""`mm fetch`: download dataset files and tokenizers, resumed and verified.

Begin at `fetch.py`; `plan.py` reads mm.lock and decides what to download, `transfer.py` downloads one file from `sources.py`.
"""
