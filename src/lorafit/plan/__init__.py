"""Predicts time and memory of a run, and picks settings that fit."""
