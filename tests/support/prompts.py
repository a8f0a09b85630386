"""Prompts that several tests need."""

LONG = "please write a short story about a lighthouse keeper who finds a message in a bottle on the northern shore"
