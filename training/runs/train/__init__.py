"""A run of `psr train`: an adapter for each trait."""
