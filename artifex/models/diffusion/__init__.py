"""Diffusion: one corruption equation, any schedule, prediction, weighting, network and sampler."""
