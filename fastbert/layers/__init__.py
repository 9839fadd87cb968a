"""The fused layer and embeddings, and the arithmetic that they are given."""
