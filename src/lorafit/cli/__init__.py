"""The command line: one file per command. Each imports what it needs when it runs."""
