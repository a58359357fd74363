"""Scores and pictures of generated images: a classifier, the Fréchet distance on its features, and grids."""
