"""Embeddings of a corpus: rows of files, tokens, the fused encoder, and shards that are whole or not there."""
