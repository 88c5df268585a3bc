"""The commands that train and use models, one module each. Only `cli.py` imports this package."""
