"""The commands that prepare data, one module each, and what they print with.

Only `cli.py` imports this package.
"""
