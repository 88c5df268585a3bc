"""The server of `mm serve`: OpenAI's HTTP API and a chat page. Begin with `app.py`; `api.py` reads requests,
`responses.py` builds responses, and `worker.py` is the thread that generates."""
