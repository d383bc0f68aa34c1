"""Observation of a run: events, meters, metrics, summary, terminal and trackers."""
