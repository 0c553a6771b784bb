"""`psr evaluate axbench`: concepts brought into answers."""
