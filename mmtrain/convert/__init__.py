"""Conversion of models to and from the formats of other programs: transformers, llama.cpp (GGUF), MiniMind's `.pth`
files, and the evaluation harness of EleutherAI.

Begin with `export.py` (export) and `foreign.py` (import).
"""
