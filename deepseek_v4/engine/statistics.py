"""What an engine has done and how long it took."""

import dataclasses


@dataclasses.dataclass
class Statistics:
    """Work so far. Seconds are wall-clock and leave compilation out.

    ``host_seconds`` is processor time of the engine's own thread, which does not count while it waits for the device:
    the device works meanwhile, so it costs nothing as long as it is less than a step takes. ``sequence_seconds`` adds
    up, over the requests, the time from the first new token to the last one; ``first_token_seconds`` the time from
    submission to the first.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    requests: int = 0
    first_tokens: int = 0
    prefill_calls: int = 0
    decode_steps: int = 0
    row_steps: int = 0
    accepted_drafts: int = 0
    proposed_drafts: int = 0
    steps: int = 0
    seconds: float = 0.0
    host_seconds: float = 0.0
    sequence_seconds: float = 0.0
    sequence_tokens: int = 0
    first_token_seconds: float = 0.0
    compile_seconds: float = 0.0

    @property
    def decode_rate(self) -> float:
        """New tokens per second, over all sequences."""
        return self.new_tokens / self.seconds if self.seconds else 0.0

    @property
    def prompt_rate(self) -> float:
        """Prompt tokens read per second, beside the decoding."""
        return self.prompt_tokens / self.seconds if self.seconds else 0.0

    @property
    def sequence_rate(self) -> float:
        """New tokens per second of one sequence, from its first token on."""
        return self.sequence_tokens / self.sequence_seconds if self.sequence_seconds else 0.0

    @property
    def host_overhead(self) -> float:
        """Seconds of host work per engine step."""
        return self.host_seconds / self.steps if self.steps else 0.0

    @property
    def host_share(self) -> float:
        """Host work as a share of the elapsed time."""
        return self.host_seconds / self.seconds if self.seconds else 0.0

    @property
    def acceptance(self) -> float:
        """Share of the proposed drafts that were kept."""
        return self.accepted_drafts / self.proposed_drafts if self.proposed_drafts else 0.0

    @property
    def tokens_per_step(self) -> float:
        """New tokens per decode step of a row."""
        return (self.row_steps + self.accepted_drafts) / self.row_steps if self.row_steps else 0.0
