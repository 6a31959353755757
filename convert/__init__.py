"""Checkpoints between HF's layout, Orbax and Composer: `python -m convert --help`."""
