"""`psr evaluate persona`: trait against coherence."""
