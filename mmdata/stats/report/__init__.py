"""Reports of `mm stats` and `mm report`, as one HTML file (in English or Chinese) or in the terminal.

`page.py` has the building blocks (tables, cards, plots) and writes the HTML file; the report on training runs
(`mmtrain.log.report`) uses it too. `data.py` (with `texts.py` and `charts.py`), `compare.py` and `tokenizer.py` build
reports on data and tokenizers.
"""
