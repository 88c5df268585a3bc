"""`mm serve`: OpenAI's HTTP interface and a chat page.

Begin at `app.py`; `worker.py` is the thread that generates.
"""
