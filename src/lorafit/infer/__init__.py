"""Answering with a model: the token engine, sampling, and models loaded with their prompt contract."""
