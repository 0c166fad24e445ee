"""A game of several turns: guess a number from higher and lower."""

from __future__ import annotations


class GuessNumber:
    """The player calls `guess` until the number is right; the episode is worth 1 if it gets there, else 0."""

    def reset(self, secret: int) -> None:
        """Begin with the number of the data's column `secret`, so that a group plays the same game."""
        self.secret, self.done = secret, False

    def guess(self, number: int) -> str:
        """
        Guess the number.

        Args:
            number: The guess.
        """
        self.done = number == self.secret
        return "right" if self.done else "higher" if number < self.secret else "lower"

    def get_reward(self) -> float:
        """What the episode is worth."""
        return float(self.done)
