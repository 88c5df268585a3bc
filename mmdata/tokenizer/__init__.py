"""Loading tokenizers and turning text into token ids, with a fast encoder where it gives the same ids as the reference.

`tokenizer.py` loads and applies a tokenizer and `encoders.py` chooses the encoder. `vocabulary.py` shows what ids stand
for, `scripts.py` finds the script and language of texts, `hostile.py` makes difficult test strings, and
`toolkit/` has the commands `mm tokenizer ...`.
"""
