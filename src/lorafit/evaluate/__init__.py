"""Measuring a model: loss on rows that were held out of training."""
