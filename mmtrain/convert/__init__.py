"""Conversion from and to other programs: transformers, llama.cpp (GGUF), MiniMind's .pth, the evaluation harness.

Begin with `export.py` and `foreign.py` (import).
"""
