"""What the entries are given: options, their validation, and which rows count."""
