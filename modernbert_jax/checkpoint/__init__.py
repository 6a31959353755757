"""Checkpoints: Hugging Face folders, Orbax directories, hub ids."""
