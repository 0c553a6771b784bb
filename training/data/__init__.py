"""Triplets and what becomes of them: pairs of prompts, placement of the instruction, filtering, batches."""
