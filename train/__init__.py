"""Pretraining and fine-tuning of the models in `modernbert_jax`: python -m train."""
