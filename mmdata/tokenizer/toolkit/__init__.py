"""`mm tokenizer`: train, evaluate, compare, check, show and extend tokenizers.

One module a command, and what several of them share.
"""
