"""Generating text and measuring a model: decoding, sampling, held-out loss, questions.

Begin at `engine.py`; `serve/` is the HTTP server.
"""
