"""Where pairs of prompts come from: the embedded grammar, persona traits, IFEval, AxBench."""
