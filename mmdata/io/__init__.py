"""Reading and writing files: lines of plain and compressed files, Arrow files, URLs, and worker processes.

Imports only `mmdata.errors`.
"""
