"""`psr evaluate side-effects`: what changes besides the trait."""
