"""The backends, their interface, and the registry that loads them."""
