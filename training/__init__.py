"""Training PSR adapters: triplets, sampling, filtering, objectives, initialisation, the Trainer."""

from .arguments import PSRTrainingArguments
from .collator import TripletCollator
from .initialization import initialize_psr_weights
from .sampling import sample_completions
from .trainer import PSRTrainer
from .triplets import Triplet, add_instruction, filter_triplets, generate_triplets, read_triplets, write_triplets


__all__ = [
    "PSRTrainer",
    "PSRTrainingArguments",
    "Triplet",
    "TripletCollator",
    "add_instruction",
    "filter_triplets",
    "generate_triplets",
    "initialize_psr_weights",
    "read_triplets",
    "sample_completions",
    "write_triplets",
]
