"""Local pages to look at rows, and to start, watch, compare and ask runs. Their truth is the run directories."""
