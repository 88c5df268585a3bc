"""Reports: sections of typed tables, cards and plots, drawn as one HTML file (English or Chinese) or in the terminal.

`page.py` knows nothing of datasets; the report on runs (`mmtrain.log.report`) uses it too.
"""
