"""Training PSR adapters: triplets, sampling, filtering, objectives, initialisation, the Trainer."""

from peft_psr.facts import AdapterFacts, Part, Score
from peft_psr.model_card import write_model_card

from .arguments import PSRTrainingArguments
from .collator import TripletCollator
from .draws import Completion, Draw, Failure, PromptPair, Sampler
from .filtering import filter_triplets
from .initialization import initialize_psr_weights
from .model_card import training_facts
from .sampling import LocalSampler, sample_completions
from .summary import TrainingSummary
from .trainer import PSRTrainer
from .triplets import Triplet, add_instruction, generate_triplets, read_triplets, write_triplets


__all__ = [
    "AdapterFacts",
    "Draw",
    "Failure",
    "LocalSampler",
    "PSRTrainer",
    "PSRTrainingArguments",
    "Part",
    "PromptPair",
    "Completion",
    "Sampler",
    "Score",
    "TrainingSummary",
    "Triplet",
    "TripletCollator",
    "add_instruction",
    "filter_triplets",
    "generate_triplets",
    "initialize_psr_weights",
    "read_triplets",
    "sample_completions",
    "training_facts",
    "write_model_card",
    "write_triplets",
]
