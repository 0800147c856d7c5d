"""TPLA decode layers, a latent-cache transfer agent and paged latent attention for SGLang.

Importing this package has no side effects: no CUDA, no SGLang, no sockets, no threads.
"""

__version__ = "0.1.0"
