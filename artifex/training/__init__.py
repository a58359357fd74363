"""What `artifex.train` is made of: the state, the compiled step, metrics and the run folder."""
