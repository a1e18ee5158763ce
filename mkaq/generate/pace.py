"""How fast a text was written."""

from dataclasses import dataclass


@dataclass
class Pace:
    """The speed of a generation, filled in while it runs.

    Attributes:
        prompt_tokens: Tokens read.
        prompt_seconds: Time until the first new token.
        tokens: New tokens.
        seconds: Time for those after the first.
    """

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    tokens: int = 0
    seconds: float = 0.0

    def describe(self) -> str:
        """One line for people."""
        later = max(0, self.tokens - 1)
        speed = f", {later / self.seconds:.1f} tokens/s" if later and self.seconds else ""
        return (
            f"{self.prompt_tokens} tokens read in {self.prompt_seconds:.2f} s, {self.tokens} written{speed}"
        )
