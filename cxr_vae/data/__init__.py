"""From a folder of X-rays to batches: sources → tars and index (shards) → reader → stream → dataset."""
