"""Masked-LM pretraining in phases."""
