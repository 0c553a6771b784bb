"""`psr evaluate ifeval`: instructions followed without standing in the prompt."""
