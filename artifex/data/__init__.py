"""Data sources. A batch is a pure function of (seed, step), on one process or many."""


class DataError(ValueError):
    """Data that turned out to be bad only when it was drawn, in the middle of a run."""
