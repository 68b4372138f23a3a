"""Servers that a run depends on, and that are gone."""


class ServerLost(RuntimeError):
    """A server that samples or teaches does not answer any more; the message names it and says what to do.

    `everywhere` says that all processes of the run have this error at the same place, so that they can save together.
    """

    def __init__(self, words: str, everywhere: bool = False) -> None:
        super().__init__(words)
        self.everywhere = everywhere
