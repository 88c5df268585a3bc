"""Reading and writing files: lines of plain and compressed files, Arrow files, files at URLs, and worker processes.

Start reading at `files.py`. It is the only module that writes files atomically, hashes them and locks them.
"""
