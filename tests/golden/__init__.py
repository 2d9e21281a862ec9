"""Tiny random models with reference logits; `make_oracle.py` made the files in this folder."""
