"""Models: pure torch, diffusers conventions."""
