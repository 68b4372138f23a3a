"""What travels between a teacher's server and its clients: tensors in the safetensors format, which holds numbers and
nothing that could run.

Legend: B sequences, L tokens of all of them, N positions whose next token counts, H hidden.
"""

import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from minillm.data.examples import Batch, collate
from minillm.foreign import foreign
from minillm.model.check import PROBE
from minillm.model.head import CausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FLOAT8 = torch.float8_e4m3fn
OF_THE_PLACE = ("_name_or_path", "transformers_version")
"""What a configuration says of the place where it is, not of the model."""
MODEL_HEADER = "x-minillm-model"
"""Of every answer: the fingerprint of the model that gave it."""


class Refused(ValueError):
    """Something that came over the network and is not what it should be; the message says what was expected."""


class Question(NamedTuple):
    """Sequences, and the positions in them whose states are asked for."""

    ids: Tensor
    """[L] int32, the tokens of all sequences, one after the other."""
    lengths: Tensor
    """[B] int32, of the sequences."""
    positions: Tensor
    """[N] int64, indices into `ids`, rising."""

    @classmethod
    def of(cls, batch: Batch) -> "Question":
        """The sequences of a batch, those that share a row one by one, in the order of `batch.targets`."""
        exists = batch.attention_mask.cpu().bool()
        ids, place = batch.input_ids.cpu()[exists], exists.flatten().cumsum(0) - 1
        if batch.position_ids is None:
            lengths = exists.sum(1)
        else:
            starts = (batch.position_ids.cpu()[exists] == 0).nonzero()[:, 0]
            lengths = torch.diff(starts, append=torch.tensor([len(ids)]))
        return cls(ids.int(), lengths.int(), place[batch.positions.cpu()])

    @classmethod
    def read(cls, body: bytes, rows: int, longest: int) -> "Question":
        """Raises Refused for anything but sequences of at most `longest` ids below `rows`, and positions in them."""
        found = read_tensors(body, {"ids": torch.int32, "lengths": torch.int32, "positions": torch.int64})
        question = cls(**found)
        check_sequences(question.ids, question.lengths, rows, longest)
        positions = question.positions
        if len(positions) and not 0 <= int(positions.min()) <= int(positions.max()) < len(question.ids):
            raise Refused(f"positions must lie in [0, {len(question.ids)}), the tokens that were sent")
        if not bool((positions[1:] > positions[:-1]).all()):
            raise Refused("positions must rise")
        return question

    def parts(self, limit: int) -> "Iterator[Question]":
        """The same in questions of at most `limit` tokens, each of whole sequences; one that is longer is alone."""
        ends, first = self.lengths.long().cumsum(0), 0
        while first < len(ends):
            start = int(ends[first] - self.lengths[first])
            last = max(first + 1, int(torch.searchsorted(ends, start + limit, right=True)))
            stop = int(ends[last - 1])
            inside = (self.positions >= start) & (self.positions < stop)
            yield Question(self.ids[start:stop], self.lengths[first:last], self.positions[inside] - start)
            first = last

    def sequences(self) -> list[list[int]]:
        return [part.tolist() for part in self.ids.split(self.lengths.tolist())]


def batch_of(sequences: Sequence[Sequence[int]], asked: Sequence[Sequence[int]]) -> Batch:
    """Right-padded rows whose states `asked` of each sequence are to be read."""
    batch = collate(sequences, [[] for _ in sequences])
    width = batch.input_ids.shape[1]
    flat = [row * width + column for row, columns in enumerate(asked) for column in columns]
    positions = torch.tensor(flat, dtype=torch.long)
    batch.predict.view(-1)[positions] = True
    return batch._replace(positions=positions, targets=torch.zeros_like(positions))


def check_sequences(ids: Tensor, lengths: Tensor, rows: int, longest: int) -> None:
    """Raises Refused for token ids out of range, and lengths that do not fit them or are above `longest`."""
    if not len(lengths) or int(lengths.min()) < 1 or int(lengths.sum(dtype=torch.long)) != len(ids):
        raise Refused("lengths must be at least 1 and add up to the number of ids, and there must be some")
    if int(lengths.max()) > longest:
        raise Refused(f"a sequence has {int(lengths.max())} tokens; this teacher reads at most {longest}")
    if not 0 <= int(ids.min()) <= int(ids.max()) < rows:
        raise Refused(f"token ids must lie in [0, {rows}); found {int(ids.min())} to {int(ids.max())}")


def write_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    return save({name: tensor.contiguous() for name, tensor in tensors.items()})


def read_tensors(body: bytes, expected: Mapping[str, torch.dtype], dims: int = 1) -> dict[str, Tensor]:
    """The tensors of these names and types, of `dims` dimensions each. Raises Refused for anything else."""
    try:
        found = load(body)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:  # the types that torch lacks are KeyErrors
        raise Refused(f"the body is no safetensors file: {error}") from error
    told = {name: tensor.dtype for name, tensor in found.items()}
    if told != dict(expected) or any(tensor.dim() != dims for tensor in found.values()):
        raise Refused(f"the tensors are {told}; expected {dict(expected)}, each of {dims} dimension")
    return found


def pack_states(states: Tensor, wire: torch.dtype, compress: bool = False) -> bytes:
    """States [N, H] in this type. In float8, each is scaled by its own largest number, which travels along. Of wider
    numbers, signs and exponents can be compressed, which fill one byte of each; the other bytes are noise."""
    if wire != FLOAT8:
        states = states.to(wire).cpu().contiguous()
        if not compress:
            return write_tensors({"states": states})
        planes = states.view(torch.uint8).view(-1, wire.itemsize)
        exponents = zlib.compress(planes[:, -1].numpy().tobytes(), level=1)
        squeezed = torch.frombuffer(bytearray(exponents), dtype=torch.uint8)
        return write_tensors({"exponents": squeezed, "mantissas": planes[:, :-1].flatten()})
    return write_tensors(scaled_to_float8(states))


def scaled_to_float8(states: Tensor) -> dict[str, Tensor]:
    """`states` [N, H] in float8 and the `scale` [N, 1] float32 of each."""
    scale = states.float().abs().amax(1, keepdim=True).clamp(min=1e-30) / torch.finfo(FLOAT8).max
    return {"states": (states.float() / scale).to(FLOAT8).cpu(), "scale": scale.cpu()}


def unpack_states(
    body: bytes, wire: torch.dtype, dtype: torch.dtype, shape: tuple[int, int], compressed: bool = False
) -> Tensor:
    """The states in `dtype`, on the CPU. Raises Refused where they are not of this shape and wire type."""
    if compressed and wire != FLOAT8:
        return _unsqueezed(body, wire, shape).to(dtype)
    scaled = {"scale": torch.float32} if wire == FLOAT8 else {}
    found = read_tensors(body, {"states": wire} | scaled, dims=2)
    states = found["states"]
    if states.shape != shape or ("scale" in found and found["scale"].shape != (shape[0], 1)):
        raise Refused(f"the states are {list(states.shape)}; expected {list(shape)}")
    return (states.float() * found["scale"]).to(dtype) if scaled else states.to(dtype)


def _unsqueezed(body: bytes, wire: torch.dtype, shape: tuple[int, int]) -> Tensor:
    count, found = shape[0] * shape[1], read_tensors(body, {"exponents": torch.uint8, "mantissas": torch.uint8})
    with foreign("the exponents are not compressed as they should be", Refused):
        exponents = zlib.decompressobj().decompress(found["exponents"].numpy().tobytes(), count + 1)
    if len(exponents) != count or len(found["mantissas"]) != count * (wire.itemsize - 1):
        raise Refused(f"the states are {len(exponents)} numbers; expected {count}")
    planes = torch.empty(count, wire.itemsize, dtype=torch.uint8)
    planes[:, -1] = torch.frombuffer(bytearray(exponents), dtype=torch.uint8)
    planes[:, :-1] = found["mantissas"].view(count, -1)
    return planes.view(wire).view(shape)


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """What two tokenizers that give the same ids have in common."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items())).encode()
    return {"entries": len(tokenizer.get_vocab()), "vocabulary": digest(vocabulary), "probe": tokenizer.encode(PROBE)}


def fingerprint(lm: CausalLM) -> str:
    """Tells models apart: a digest of the configuration, and of both ends of every weight."""
    config = {key: value for key, value in lm.model.config.to_dict().items() if key not in OF_THE_PLACE}
    parts = [json.dumps(config, sort_keys=True, default=str).encode()]
    for name, weight in lm.model.state_dict().items():
        flat = weight.detach().flatten()
        ends: Tensor = torch.cat([flat[:256], flat[-256:]]).cpu().contiguous()
        parts += [f"{name} {weight.dtype} {tuple(weight.shape)}".encode(), ends.view(torch.uint8).numpy().tobytes()]
    return digest(*parts)


def digest(*parts: bytes) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()
