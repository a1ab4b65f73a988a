"""Render prompts as each model reads them: in its chat template, or as plain text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from texts.chat import Messages, as_words, plain_text, prompt_text, question
from texts.personas import Persona

Turn = Sequence[str]  # (question, response)


@dataclass(frozen=True)
class Prompting:
    """How a run shows prompts to its models.

    tokenizers: side -> tokenizer. chat_sides: the sides that are shown their chat template. system_prompt: of
        the run, put before every question to the target. variables: of the chat templates.
    """

    tokenizers: Mapping[str, PreTrainedTokenizerBase]
    chat_sides: tuple[str, ...]
    system_prompt: str | None
    variables: Mapping[str, Any] = field(default_factory=dict)

    @property
    def asks_questions(self) -> bool:
        """Whether prompts are questions to a chat target, or text prefixes that it continues."""
        return "target" in self.chat_sides

    @property
    def default_responder(self) -> str:
        """The side that responds to questions whose responses both models read."""
        return "target" if self.asks_questions else "source"

    @property
    def responders(self) -> dict[str, str]:
        """Side -> whose responses its persona vectors are made from: its own where it can be asked."""
        return {name: name if name in self.chat_sides else self.default_responder for name in self.tokenizers}

    def question(self, side: str, text: str, system_prompt: str | None = None) -> str:
        """Return a question as a side's model reads it: in its chat template, else as plain text."""
        return self._rendered(side, question(text, system_prompt))

    def conversation(self, side: str, earlier: Sequence[Turn], text: str) -> str:
        """Return a question behind earlier turns as a side's model reads it, under the run's system prompt.

        Without an earlier turn, it is what `prompt` returns to a chat target.
        """
        *system, asked = question(text, self.system_prompt)
        turns = [
            {"role": role, "content": content}
            for turn in earlier
            for role, content in zip(("user", "assistant"), turn, strict=True)
        ]
        return self._rendered(side, [*system, *turns, asked])

    def _rendered(self, side: str, messages: Messages) -> str:
        if side in self.chat_sides:
            return prompt_text(self.tokenizers[side], messages, variables=self.variables)
        return as_words(self.tokenizers[side], plain_text(messages))

    def instructed(self, side: str, text: str, instruction: str) -> str:
        """Return a question under an instruction as a side's model reads it, up to where it would respond.

        A chat template has the instruction as its system prompt; plain text has it before the question.
        """
        if side in self.chat_sides:
            return self.question(side, text, instruction)
        return self.question(side, f"{instruction}\n\n{text}")

    def prompt(self, side: str, prompt: str, persona: Persona | None = None) -> str:
        """Return a test or development prompt as a side's model reads it.

        persona: which the prompting baseline asks for in words; every other condition sees the same prompt.
        """
        if not self.asks_questions:
            if persona is not None:
                prompt = f"{persona.description or f'The text is {persona.name}.'}\n\n{prompt}"
            return as_words(self.tokenizers[side], prompt)
        if persona is None:
            return self.question(side, prompt, self.system_prompt)
        instruction = f"Answer in this style. {persona.description or persona.name}"
        if persona.instructions:
            instruction, _ = persona.instructions[0]
        return self.question(side, prompt, self.with_instruction(instruction))

    def with_instruction(self, instruction: str | None) -> str | None:
        """Return the run's system prompt with an instruction after it."""
        return "\n\n".join(filter(None, [self.system_prompt, instruction])) or None
