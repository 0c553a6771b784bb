"""Steering methods of others, one a file, each as its source describes it, trained on the same triplets as ours."""
