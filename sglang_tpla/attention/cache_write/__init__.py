"""Kernels that normalise, project, rotate and write new tokens into the paged latent cache."""
