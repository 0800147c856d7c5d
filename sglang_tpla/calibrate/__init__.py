"""Calibration makes slicing maps, and one artifact, from statistics of a model's latents and queries.

`transforms` turns second moments into maps in closed form, `learn_layer` refines a map on its layer's output error,
`layout_search` and `sketch_search` choose widths, and `pipeline` puts the steps together.
"""
