"""`PSRTrainer`: its arguments, several adapters at once, checkpoints, the summary."""
