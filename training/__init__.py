"""Training PSR adapters: triplets, sampling, filtering, objectives, initialisation, the Trainer."""

from typing import TYPE_CHECKING

from peft_psr._lazy import lazily


if TYPE_CHECKING:
    from peft_psr.hub.facts import AdapterFacts, Part, Score
    from peft_psr.hub.model_card import write_model_card
    from peft_psr.training.data.collator import TripletCollator
    from peft_psr.training.data.draws import Completion, Draw, Failure, PromptPair, Sampler
    from peft_psr.training.data.filtering import filter_triplets
    from peft_psr.training.data.placement import add_instruction
    from peft_psr.training.data.triplets import Triplet, read_triplets, write_triplets
    from peft_psr.training.runs.train.results import training_facts
    from peft_psr.training.runs.triplets.generate import generate_triplets
    from peft_psr.training.sampling.local import LocalSampler, sample_completions
    from peft_psr.training.starts.initialization import initialize_psr_weights
    from peft_psr.training.trainer.arguments import PSRTrainingArguments
    from peft_psr.training.trainer.summary import TrainingSummary
    from peft_psr.training.trainer.trainer import PSRTrainer

__getattr__, __dir__ = lazily(
    __name__,
    {
        "peft_psr.hub.facts": "AdapterFacts Part Score",
        "peft_psr.hub.model_card": "write_model_card",
        "peft_psr.training.data.collator": "TripletCollator",
        "peft_psr.training.data.draws": "Completion Draw Failure PromptPair Sampler",
        "peft_psr.training.data.filtering": "filter_triplets",
        "peft_psr.training.data.placement": "add_instruction",
        "peft_psr.training.data.triplets": "Triplet read_triplets write_triplets",
        "peft_psr.training.runs.train.results": "training_facts",
        "peft_psr.training.runs.triplets.generate": "generate_triplets",
        "peft_psr.training.sampling.local": "LocalSampler sample_completions",
        "peft_psr.training.starts.initialization": "initialize_psr_weights",
        "peft_psr.training.trainer.arguments": "PSRTrainingArguments",
        "peft_psr.training.trainer.summary": "TrainingSummary",
        "peft_psr.training.trainer.trainer": "PSRTrainer",
    },
)

__all__ = [
    "AdapterFacts", "Completion", "Draw", "Failure", "LocalSampler", "PSRTrainer", "PSRTrainingArguments", "Part",
    "PromptPair", "Sampler", "Score", "TrainingSummary", "Triplet", "TripletCollator", "add_instruction",
    "filter_triplets", "generate_triplets", "initialize_psr_weights", "read_triplets", "sample_completions",
    "training_facts", "write_model_card", "write_triplets",
]  # fmt: skip
