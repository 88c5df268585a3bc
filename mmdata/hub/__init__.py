"""`mm fetch`: download dataset files and tokenizers, resumed and verified.

Begin at `fetch.py`; `plan.py` decides what to download, `transfer.py` downloads one file.
"""
