"""Experiments: each file has get_config() and says source, command, hardware and numbers."""
