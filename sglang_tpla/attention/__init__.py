"""Decode attention over a paged latent cache (one interface, our backends and FlashInfer's), and cache writes."""
