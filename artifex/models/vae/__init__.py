"""Autoencoders: continuous, discrete, and the one of latent diffusion."""
