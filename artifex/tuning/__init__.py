"""Measures ways to run a model on the devices that are there, and keeps the best: `artifex.auto_tune`."""
