"""What can be wrong with a conversation or a completion.

Each type is also the built-in type that the released encoder raises in the same situation, so code written
against either catches both. `ChatError` catches all of them.
"""


class ChatError(Exception):
    """Base of every error of this package."""


class ChatFormatError(ChatError, AssertionError):
    """An unknown option value, or a message or completion whose structure is wrong."""


class MessageTypeError(ChatError, TypeError):
    """A value of the wrong type, such as a user message whose content is None."""


class UnknownRoleError(ChatError, NotImplementedError):
    """A message to render has a role that the prompt format does not know."""


class ToolArgumentsError(ChatError, AttributeError):
    """The arguments of a tool call are valid JSON but not a JSON object."""


class ToolCallFormatError(ChatError, ValueError):
    """A tool-call block of a completion does not follow the DSML grammar or is unfinished."""
