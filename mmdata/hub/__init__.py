"""`mm fetch`: downloads of dataset files and tokenizers that can be resumed and are verified.

Read `fetch.py` first. `plan.py` decides by mm.lock (`lockfile.py`) what to download, `sources.py` makes requests to the
Hugging Face Hub, ModelScope, a folder or a web address, `transfer.py` downloads one file and `partial.py` stores it.
"""
