"""Rows as columns, and which of them to leave out.

`features` computes the columns of a batch of rows, `frames` reads files into polars frames of these columns, and `where`
evaluates conditions on them. `dedup` finds duplicates and overlap with excluded files; `grams` hashes the pieces by which texts are
compared.
"""
