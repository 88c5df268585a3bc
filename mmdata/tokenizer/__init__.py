"""Loading tokenizers, and turning text into token ids.

`toolkit/` trains, evaluates, checks and edits tokenizers: the commands `mm tokenizer ...`.
"""
