"""The report of a run: one HTML page that opens without a network, made from the run's files alone."""
