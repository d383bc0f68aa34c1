"""Text generation: the token engine, sampling, and models loaded with their prompt contract."""
