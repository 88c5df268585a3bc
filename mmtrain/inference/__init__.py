"""Generation and evaluation: decoding, sampling, chat, held-out loss, questions with known answers.

Begin with `engine.py`; `serve/` is the HTTP server.
"""
