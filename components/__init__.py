"""Kubealign's pipeline steps: each stage in its folder, what they share in `common`, the training engine in `training`."""
