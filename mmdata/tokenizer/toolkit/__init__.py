"""The commands `mm tokenizer train`, `eval`, `compare`, `check` and `extend`, a module each (`show` is in ../vocabulary.py).

They share `sample.py`, which draws text from jsonl files; `layouts.py` and `unigram.py` belong to training.
"""
