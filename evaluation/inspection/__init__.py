"""Looking at single tokens: where an adapter acts, and what an instruction moves."""
