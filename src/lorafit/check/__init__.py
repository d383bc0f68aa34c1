"""What is known before a run starts: whether it fits, what it will take, and for how long."""
