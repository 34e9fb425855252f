"""Uni-flow in pure torch: times, random draws, the video flow and the three text flows."""
