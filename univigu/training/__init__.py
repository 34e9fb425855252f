"""Training: what needs Lightning."""
