"""Text generation and evaluation: forward passes with a KV cache, sampling, chat, loss on held-out data, and exams
(questions with known answers).

Begin with `engine.py`, which generates text. The HTTP server is in `serve/`.
"""
