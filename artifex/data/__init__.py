"""Data sources. A batch is a pure function of (seed, step), on one process or many."""
