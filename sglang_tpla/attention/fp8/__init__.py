"""Decode attention over FP8 latent rows."""
