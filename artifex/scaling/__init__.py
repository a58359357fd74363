"""Scaling: logical axes, meshes, strategies, placement and checkpoints. Import the module you need."""
