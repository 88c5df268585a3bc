"""The commands that prepare data, one module each, and what all commands share: `options` builds the command line,
`terminal` prints. Only `cli.py` and `mmtrain.commands` import this package."""
