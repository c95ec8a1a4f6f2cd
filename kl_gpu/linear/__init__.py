"""Divergences from hidden states and LM heads."""
