"""HTML reports in one file each: the page, its tables and plots, and the data report in English and Chinese.

`page.py` knows nothing of datasets; the run report (`mmtrain.log.report`) uses it too.
"""
