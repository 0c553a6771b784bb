"""The embedded model's grammar as a source: traits, instructions and questions in the words that the model knows."""

from peft_psr.tiny_chat import TRAITS, instructions, prompt_messages, questions
from peft_psr.training.data.draws import PromptPair
from peft_psr.training.data.placement import add_instruction

from .base import Selection, Source


class EmbeddedSource(Source):
    """Every instruction of a trait with every question of the split; ids are `"formal/2/17"`."""

    has_test_split = True
    embedded_words = True
    judge = "grammar"

    def pairs(self, wanted: Selection) -> list[PromptPair]:
        """As `Source.pairs`."""
        names = wanted.chosen(list(TRAITS), "source: embedded")
        asked = [question.text for question in questions(wanted.split)][: wanted.questions]
        return [
            PromptPair(
                id=f"{name}/{i}/{q}",
                trait=name,
                prompt=prompt_messages(question),
                steered_prompt=add_instruction(prompt_messages(question), instruction, wanted.placement),
            )
            for name in names
            for i, instruction in enumerate(instructions(name, wanted.split)[: wanted.instructions])
            for q, question in enumerate(asked)
        ]


SOURCE = EmbeddedSource()
