"""The formats of a cached token's row, in memory and on the wire; attention and transfer share them."""
