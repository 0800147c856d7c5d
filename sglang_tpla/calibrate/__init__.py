"""Calibration: statistics of a model's latents and queries -> slicing maps -> one artifact.

``corpus`` chooses the text, ``statistics`` streams second moments, ``transforms`` turns them into maps in
closed form, ``learn`` optimises maps on a layer's output error, ``artifact`` is the file everything else
reads.
"""
