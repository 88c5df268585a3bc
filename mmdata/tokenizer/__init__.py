"""Loading tokenizers and turning text into token ids, with the fastest encoder that is exact.

`vocabulary.py` says what ids stand for, `text.py` measures the text itself, and `toolkit/` has the commands `mm tokenizer ...`.
"""
