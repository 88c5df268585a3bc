"""The generated data and the recipe of `mm demo`: `items.py` makes questions with answers, `corpus.py` files of them."""
