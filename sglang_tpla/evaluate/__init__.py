"""Evaluation measures how far TPLA decoding is from plain MLA, where, and because of which layers."""
