"""The commands `mm tokenizer train`, `eval`, `compare`, `check` and `extend`, one module each.

`mm tokenizer show` is in ../vocabulary.py. The modules share `sample.py`, which draws text from jsonl files.
`layouts.py` and `unigram.py` are used by `train.py`.
"""
