"""Measures models: held-out loss, tasks, sample generations, and lm-evaluation-harness."""
