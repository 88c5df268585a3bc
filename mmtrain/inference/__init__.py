"""Text generation (begin with `engine.py`), chat, loss on held-out data, and exams. The HTTP server is in `serve/`."""
