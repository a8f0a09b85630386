"""Kubealign's pipeline steps: a folder per stage, what they share in `common`, the training engine in `training`."""
