"""Compiles a run for hardware that is absent and reports memory, collectives and time."""
