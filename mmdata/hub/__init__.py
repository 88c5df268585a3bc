"""`mm fetch`: downloads of dataset files and tokenizers that can be resumed and are verified.

Read `fetch.py` first. `plan.py` reads mm.lock and decides what to download, `sources.py` makes requests to the Hugging
Face Hub, ModelScope, a folder or a web address, and `transfer.py` downloads one file.
"""
