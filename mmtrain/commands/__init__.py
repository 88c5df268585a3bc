"""The commands that train and use a model, one module each.

Only `cli.py` imports this package.
"""
