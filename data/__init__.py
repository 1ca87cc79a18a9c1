"""Text to batches: sources -> prepare (tokenizer, shards, manifest) -> packing -> stream."""
