"""From bytes to batches: rows, templates, packing, shards, loader. Never needs torch."""
