"""Hydra's view of bitgrid: a launcher and a sweeper. Light: every Hydra program in the environment imports these modules."""
