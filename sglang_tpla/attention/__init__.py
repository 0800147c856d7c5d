"""Decode attention over a paged latent cache: one interface, a PyTorch reference, FlashInfer, and our Hopper
kernel.
"""
