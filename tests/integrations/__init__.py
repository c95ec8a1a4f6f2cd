"""The trainers that people use, with kl_gpu in them; their packages are those of the extra `integrations`."""
