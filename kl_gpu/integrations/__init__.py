"""kl_gpu's losses in the trainers people already use, a module per trainer; none is imported here.

Every module imports where its trainer is not installed; what needs it says so when it is used, and
`pip install kl_gpu[integrations]` brings those that a package registry has.
"""
