"""The operators under `torch.ops.kl_gpu`: schemas, fakes, and the hand-off to a backend."""
