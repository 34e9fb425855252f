"""Data: tar shards of videos and texts, their filters, and the loaders that feed training and prediction."""
