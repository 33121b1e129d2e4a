"""Messages in a tokenizer's chat template."""

from __future__ import annotations

from typing import Any


def chat_ids(messages: list[dict[str, Any]], tokenizer: Any) -> list[int]:
    """Ids of messages (dicts with "role" and "content"), up to where the answer begins.

    Args:
        messages: of a conversation.
        tokenizer: with a chat template.
    """
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]
