"""Reads what a unigram tokenizer needs from a SentencePiece model, a Protocol Buffers message.

The message is `ModelProto` of sentencepiece_model.proto in github.com/google/sentencepiece. A few
of its fields are enough, so they are read here and neither the package sentencepiece nor protobuf
is needed. The encoding: protobuf.dev/programming-guides/encoding.
"""

import dataclasses
import struct
from collections.abc import Iterator
from pathlib import Path

_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3  # ModelProto
_PIECE, _SCORE, _TYPE = 1, 2, 3  # ModelProto.SentencePiece
_MODEL_TYPE, _BYTE_FALLBACK = 3, 35  # TrainerSpec
_CHARSMAP = 2  # NormalizerSpec
_UNIGRAM = 1  # TrainerSpec.ModelType, the default
_UNKNOWN = 2  # SentencePiece.Type


@dataclasses.dataclass(frozen=True)
class UnigramModel:
    """A unigram model.

    Attributes:
        pieces: each piece with its log probability, by id.
        unknown_id: the id of what no piece covers.
        byte_fallback: what no piece covers becomes bytes, which are pieces too.
        charsmap: compiled replacements of characters, empty if there are none.
    """

    pieces: list[tuple[str, float]]
    unknown_id: int
    byte_fallback: bool
    charsmap: bytes


def read_unigram(path: Path) -> UnigramModel:
    """Reads a SentencePiece model.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no such message, a truncated one, no unigram model, or not one unknown piece.
    """
    pieces: list[tuple[str, float]] = []
    unknown: list[int] = []
    kind, byte_fallback, charsmap = _UNIGRAM, False, b""
    try:
        for number, value in _fields(path.read_bytes()):
            if number == _PIECES:
                piece = dict(_fields(_message(value)))
                if piece.get(_TYPE) == _UNKNOWN:
                    unknown.append(len(pieces))
                text = _message(piece.get(_PIECE, b"")).decode()
                (score,) = struct.unpack("<f", _message(piece.get(_SCORE, bytes(4))))
                pieces.append((text, score))
            elif number == _TRAINER:
                trainer = dict(_fields(_message(value)))
                kind = trainer.get(_MODEL_TYPE, _UNIGRAM)
                byte_fallback = bool(trainer.get(_BYTE_FALLBACK, 0))
            elif number == _NORMALIZER:
                charsmap = _message(dict(_fields(_message(value))).get(_CHARSMAP, b""))
    except (ValueError, struct.error) as error:
        raise ValueError(f"{path}: not a SentencePiece model: {error}") from error
    if kind != _UNIGRAM:
        raise ValueError(f"{path}: the model type must be {_UNIGRAM} (unigram), got {kind}")
    if len(unknown) != 1:
        raise ValueError(f"{path}: one piece must be the unknown one, got {len(unknown)}")
    return UnigramModel(pieces, unknown[0], byte_fallback, charsmap)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yields number and value of each field of a message: an int, or bytes not yet interpreted."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, wire = divmod(key, 8)
        if wire == 0:
            value, position = _varint(data, position)
            yield number, value
            continue
        if wire == 2:
            size, position = _varint(data, position)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {position}")
        if position + size > len(data):
            raise ValueError(f"truncated at byte {len(data)}")
        yield number, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """The number at a position, seven bits a byte, and the position after it."""
    value = shift = 0
    while True:
        if position >= len(data) or shift > 63:
            raise ValueError(f"no number at byte {position}")
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position


def _message(value: int | bytes) -> bytes:
    """The bytes of a field that must not be a number."""
    if isinstance(value, int):
        raise ValueError(f"bytes expected, got the number {value}")
    return value
