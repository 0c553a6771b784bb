"""A turn of a conversation, and the text in it."""

from typing import Any


Message = dict[str, Any]
"""One turn of a conversation in the chat format: `{"role": "system" | "user" | "assistant", "content": str}`.

The content may also be a list of parts, as multimodal templates take it: `[{"type": "text", "text": str}]`.
"""


def content_text(message: Message) -> str:
    """The text of a turn, whether it is given as such or in parts.

    Raises:
        ValueError: there is no content, or something in it is no text.
    """
    content = message.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)
        for part in content
    ):
        return "".join(part["text"] for part in content)
    raise ValueError(
        f"The content of a {message.get('role')!r} turn must be text, or a list of parts such as "
        f'{{"type": "text", "text": "..."}}; got {content!r:.200}.'
    )
