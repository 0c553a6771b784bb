"""What is measured of a steered model: scores, strength, faithfulness, side effects."""
