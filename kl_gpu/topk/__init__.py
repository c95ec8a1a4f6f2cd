"""A teacher known by its K best tokens."""
