"""A session on a GPU, and what is made of its results: `python -m bench gpu`."""
