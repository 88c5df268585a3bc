"""Models to and from other programs: transformers, llama.cpp (GGUF), MiniMind's .pth.

Begin at `export.py` and `foreign.py` (import).
"""
