"""What methods share: how edits are trained, and what they are computed from."""
