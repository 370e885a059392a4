"""How an instruction becomes a prompt: one form for training, fitting, judging and tracing."""

from __future__ import annotations


def instruction_prompt(instruction: str, more: str | None = None) -> str:
    """The instruction, the input behind an empty line where there is one, and a line end.

    Args:
        instruction (`str`): what is to be done.
        more (`str`, *optional*): what it is to be done with.
    """
    return "\n\n".join(part for part in (instruction, more) if part) + "\n"
