"""One file per method. `base.py` has the protocols."""
