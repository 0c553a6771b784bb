"""What a source of prompts is: one object that gives pairs of prompts and says what of it can be chosen.

To add one: a subclass of `Source` in a file of its own, and its name in `registry`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from peft_psr.training.data.draws import PromptPair
from peft_psr.training.data.placement import Placement


Split = Literal["train", "test"]


@dataclass(frozen=True)
class Selection:
    """What is wanted of a source: the fields of a recipe of these names."""

    data: str | None = None  # file, folder or Hub data set; `None` for what the source has by itself
    data_revision: str | None = None  # branch, tag or commit of a data set on the Hub
    traits: tuple[str, ...] = ()  # by name; all if empty
    instructions: int | None = None  # At most so many a trait; all by default
    questions: int | None = None  # At most so many a trait; all by default
    placement: Placement = "system"  # where the instruction stands; see `add_instruction`
    split: Split = "train"  # "train" or "test"
    negatives: bool = False  # pairs whose steered prompt asks for the opposite too

    def chosen(self, known: Sequence[str], where: str) -> list[str]:
        """The traits that are wanted, of those `known`; `ValueError`, naming `where`, if one is not there."""
        unknown = [name for name in self.traits if name not in known]
        if unknown:
            raise ValueError(f"traits: {where} has no {', '.join(map(repr, unknown))}; there are: {', '.join(known)}.")
        return list(self.traits or known)


class Source(ABC):
    """Where pairs of prompts come from. What is said here holds for most; a subclass says what is otherwise.

    A recipe that chooses what a source has no choice of is refused before `pairs` is called.

    Attributes:
        needs_data: It has nothing by itself: `data` must be given.
        has_test_split: It has questions that are held out from training, to measure trait scores and faithfulness on.
        has_negatives: It has instructions that ask for a trait's opposite.
        takes_instruction: An instruction stands apart from the question, so that there is a choice of `placement`;
            where not, the prompts hold their instructions.
        one_instruction: A trait has one instruction, so that there is no choice of how many.
        embedded_words: Its prompts are all in the words of the embedded model's grammar, which knows no others: what
            is measured beside them has to be too.
        judge: The judge that is made for its prompts and scores no others, by name.
    """

    needs_data: bool = False
    has_test_split: bool = False
    has_negatives: bool = False
    takes_instruction: bool = True
    one_instruction: bool = False
    embedded_words: bool = False
    judge: str | None = None

    @abstractmethod
    def pairs(self, wanted: Selection) -> list[PromptPair]:
        """The prompts, in the order in which results will stand, each with an id of its own.

        Raises:
            FileNotFoundError: the data are not there.
            ValueError: a file is malformed, an instruction in it is empty, or a trait is unknown.
        """

    def judge_prompts(self, wanted: Selection) -> dict[str, str]:
        """{trait: what a language model is asked as its judge}, of the traits that have such a prompt of their own.

        The placeholders are `{question}` and `{answer}`. Raises what `pairs` does.
        """
        return {}

    def trait_name(self, pair: PromptPair) -> str:
        """What a recipe's `traits` call the trait of a pair."""
        return pair.trait

    @property
    def no_choice(self) -> tuple[str, ...]:
        """Fields of a recipe of which it has no choice; a recipe leaves them at their default."""
        has = {
            "instructions": self.takes_instruction and not self.one_instruction,
            "placement": self.takes_instruction,
            "split": self.has_test_split,
        }
        return tuple(name for name, choice in has.items() if not choice)
