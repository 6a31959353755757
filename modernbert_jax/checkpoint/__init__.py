"""Checkpoints: Hugging Face folders, Orbax directories and hub ids."""
