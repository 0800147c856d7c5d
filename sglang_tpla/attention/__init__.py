"""Decode attention over a paged latent cache: one interface and its backends, ours and FlashInfer's."""
