"""The proof at the end of a run: what is on disk is what was trained."""
