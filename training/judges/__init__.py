"""Who scores completions: the embedded model's grammar, a language model here or at a server, IFEval's checkers."""
