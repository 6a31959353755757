"""Inference: pipelines, embeddings, exported functions, inspection of activations."""
