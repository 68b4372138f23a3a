"""Teacher mixing over the network: rows that a student writes are read bit by bit, each time behind what was read
before, whose keys and values the server keeps.

A session is one `Decoder` on the server. It may be dropped at any time, for others that were used more lately or with
the server; then the client, which has the tokens, sends all of them once more.

Legend: B rows, g tokens read at once, K room for tokens, H hidden.
"""

from collections import OrderedDict
from typing import Protocol
from uuid import uuid4

import torch
from torch import Tensor

from minillm.model.decoder import Decoder
from minillm.model.head import CausalLM
from minillm.model.masks import decodes_by_sdpa


class Gone(Exception):
    """The session is not on this server, or not as the client left it."""


class Sessions:
    """The decoders of a server, together of at most `max_tokens` tokens; for one thread."""

    def __init__(self, lm: CausalLM, max_tokens: int) -> None:
        self.lm, self.max_tokens = lm, max_tokens
        self.open: OrderedDict[str, Decoder] = OrderedDict()

    @torch.no_grad()
    def read(self, name: str, past: int, ids: Tensor, exists: Tensor, keep: Tensor) -> Tensor:
        """[B, g, H] the states after `ids` [B, g], on the CPU.

        Args:
            name: of the session.
            past: tokens that each row has been read of, with its padding; 0 begins the session anew.
            exists: [B, K] bool, what is no padding; read where a session begins.
            keep: the rows of the session that go on, in this order; empty: all.

        Raises Gone.
        """
        device, decoder = self.lm.device, self.open.pop(name, None)  # gone, should anything fail
        if past == 0:
            decoder = Decoder(self.lm, exists.to(device), not bool(exists[:, : ids.shape[1]].all()))
        elif decoder is None or decoder.length != past:
            raise Gone
        elif len(keep):
            if int(keep.max()) >= len(decoder.exists):
                raise Gone
            decoder.keep(keep.to(device))
        if len(decoder.exists) != len(ids) or decoder.length + ids.shape[1] > decoder.exists.shape[1]:
            raise Gone
        with decodes_by_sdpa(self.lm):
            states = decoder.read(ids.long().to(device))
        self.open[name] = decoder
        while sum(len(each.exists) * each.length for each in self.open.values()) > self.max_tokens:
            self.open.popitem(last=False)
        return states.cpu()


class Reads(Protocol):
    """A client, by what a RemoteDecoder asks of it."""

    def read_on(self, session: str, past: int, ids: Tensor, exists: Tensor, keep: Tensor) -> Tensor:
        """As `Sessions.read`, on the client's device."""

    def logits(self, states: Tensor) -> Tensor:
        """[..., V] of states [..., H]."""


class RemoteDecoder:
    """What `Decoder` is, of a teacher on a server."""

    def __init__(self, teacher: Reads, exists: Tensor) -> None:
        """exists: [B, K] as in `Padded`."""
        self.teacher, self.exists, self.session = teacher, exists.cpu(), uuid4().hex
        self.ids, self.read_before = torch.zeros(len(exists), 0, dtype=torch.int32), 0
        self.kept = torch.zeros(0, dtype=torch.long)
        """Of the rows that the server has, those that go on; empty: all."""

    def read(self, ids: Tensor) -> Tensor:
        """[B, g, H] the states after each of the tokens `ids` [B, g]."""
        new = ids.int().cpu()
        self.ids = torch.cat([self.ids, new], dim=1)
        try:
            states = self.teacher.read_on(self.session, self.read_before, new, self.exists, self.kept)
        except Gone:
            everything = self.teacher.read_on(self.session, 0, self.ids, self.exists, self.kept[:0])
            states = everything[:, -new.shape[1] :]
        self.read_before, self.kept, self.state = self.ids.shape[1], self.kept[:0], states[:, -1]
        return states

    def logits(self) -> Tensor:
        """[B, V] of the token that comes next."""
        return self.teacher.logits(self.state)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, in this order."""
        here = rows.cpu()
        self.kept = self.kept[here] if len(self.kept) else here
        self.ids, self.exists, self.state = self.ids[here], self.exists[here], self.state[rows]
