"""Calibration: statistics of a model's latents and queries, slicing maps, one artifact.

`transforms` turns second moments into maps in closed form, `learn_layer` refines a map on its layer's output error,
`layout_search` and `sketch_search` choose widths, `pipeline` puts the steps together.
"""
