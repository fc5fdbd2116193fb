"""The error of everything that reads or writes checkpoints."""

from collections.abc import Sequence


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; ``problems`` lists everything found, one line each."""

    def __init__(self, message: str, problems: Sequence[str] = ()):
        self.problems = tuple(problems)
        super().__init__("\n".join([message, *(f"  {problem}" for problem in self.problems)]))
