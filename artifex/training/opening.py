from artifex.train import open_run
