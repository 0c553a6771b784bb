"""The model beneath an adapter: loading it, its decoder layers, its cache, the other adapters on it."""
