"""Bytes to batches: shards, decoding, augmentation, tokenizers. Knows nothing of models."""
