"""Watching a run: events, meters, the metrics record, the terminal and the trackers."""
