"""Grids and random searches over the settings of a run."""
