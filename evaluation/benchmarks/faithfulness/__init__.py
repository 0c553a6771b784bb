"""`psr evaluate faithfulness`: how near a method comes to the prompt."""
