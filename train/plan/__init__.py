"""Compiles a training step for devices you do not have; reports memory, collectives, hours."""
