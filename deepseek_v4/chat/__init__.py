"""The DeepSeek-V4 prompt format: messages to prompt text, and completion text back to a message."""

from deepseek_v4.chat.encode import encode_messages, render_messages
from deepseek_v4.chat.errors import (
    ChatError,
    ChatFormatError,
    MessageTypeError,
    ToolArgumentsError,
    ToolCallFormatError,
    UnknownRoleError,
)
from deepseek_v4.chat.parse import parse_message_from_completion_text

__all__ = [
    "ChatError",
    "ChatFormatError",
    "MessageTypeError",
    "ToolArgumentsError",
    "ToolCallFormatError",
    "UnknownRoleError",
    "encode_messages",
    "parse_message_from_completion_text",
    "render_messages",
]
