"""Where documents come from: a file or a folder of texts, of JSON lines, or of Parquet files.

Documents are read one after the other, so memory holds one of them (of Parquet, a few). Their order
is that of the files' paths and, within a file, of its lines or rows. It is the same on every
machine.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from train.corpus.damage import OnDamage, refuse
from train.corpus.folders import SUFFIXES, Kind, find_files, kind_of_all, leads_nowhere
from train.corpus.readers import pyarrow_library, read_json_lines, read_parquet, read_text


@dataclasses.dataclass(frozen=True)
class Document:
    """A text to learn from.

    Attributes:
        name: where it is, for messages: "part/a.jsonl, line 3" for instance.
        text: Unicode without halves of surrogate pairs; may be empty.
        split_key: decides whether it is held out. Documents with equal keys stay together.
    """

    name: str
    text: str = dataclasses.field(repr=False)
    split_key: str = dataclasses.field(repr=False)


class Source(Protocol):
    """Documents in an order that never changes."""

    def documents(self, on_damage: OnDamage = refuse) -> Iterator[Document]:
        """Reads all documents; damage goes to `on_damage`, and is passed over if that returns."""
        ...

    def fingerprint(self) -> str:
        """Returns what changes when the documents do, without reading them."""
        ...


@dataclasses.dataclass(frozen=True)
class FileSource:
    """Documents in files.

    Equal texts are held out together, whatever files they are in.

    Attributes:
        root: the folder that the paths start from.
        paths: the files, relative and with forward slashes, in order.
        kind: "text": a file is a document. "jsonl": a line is one, an object that has the text in a
            field. "parquet": a row is one, with the text in a column. All in UTF-8.
        field: the field or column.
    """

    root: Path
    paths: tuple[str, ...] = dataclasses.field(repr=False)
    kind: Kind
    field: str = "text"

    def documents(self, on_damage: OnDamage = refuse) -> Iterator[Document]:
        """Reads all documents.

        Args:
            on_damage: gets an error for each file, line or row that is damaged, and may raise it.
                If it returns, reading goes on: after the line or the row, or with the next file if
                nothing more can be read in this one.

        Raises:
            DamagedDataError: by default, at the first damage.
        """
        for path in self.paths:
            file = self.root / path
            match self.kind:
                case "text":
                    texts = read_text(file, path, on_damage)
                case "jsonl":
                    texts = read_json_lines(file, path, self.field, on_damage)
                case "parquet":
                    texts = read_parquet(file, path, self.field, on_damage)
            for name, text in texts:
                yield Document(name, text, split_key=text)

    def fingerprint(self) -> str:
        """Returns a hash of the files' paths, sizes and times of change, the kind and the field.

        Raises:
            OSError: a file is gone.
        """
        files = [(path, self.root / path) for path in self.paths]
        field = None if self.kind == "text" else self.field
        return fingerprint_files(files, [self.kind, field])


def open_source(
    path: Path, *, kind: Kind | None = None, field: str = "text", pattern: str | None = None
) -> FileSource:
    """Finds the files of a source.

    Links to folders are followed, and each folder is read once. A link that leads nowhere is
    damage, as a file that cannot be read is; without a suffix, too, for it may have led to a
    folder.

    Args:
        path: a file, or a folder with everything in it that is not hidden.
        kind: as in `FileSource`; None tells it by the suffix, as in `SUFFIXES`. Beside JSON lines
            or Parquet, texts named README, LICENSE and the like are then about the data and not
            read.
        field: the field of JSON lines, or the column of Parquet, that has the text.
        pattern: the files of the folder to read, for example "**/*.tex"; None reads those with a
            suffix of the kind.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: the folder has no such files or files of several kinds, or the kind is unknown.
        ImportError: Parquet needs pyarrow, which is not installed.
    """
    path = Path(path)
    if kind is not None and kind not in SUFFIXES:
        raise ValueError(f"kind must be one of {', '.join(SUFFIXES)}, got {kind!r}")
    if path.is_file():
        root, names = path.parent, [path.name]
    elif path.is_dir():
        root, names = path, find_files(path, kind, pattern)
    else:
        raise FileNotFoundError(f"no such file or folder: {path}")
    kind = kind or kind_of_all(path, names)
    if kind == "parquet":
        pyarrow_library()  # that it is missing should not show after an hour
    return FileSource(root, tuple(names), kind, field)


def fingerprint_files(files: Sequence[tuple[str, Path]], settings: Sequence[object]) -> str:
    """Returns a hash of files' names, sizes and times of change, and of settings.

    Raises:
        OSError: a file is gone.
    """
    digest = hashlib.sha256(json.dumps(list(settings)).encode())
    for name, path in files:
        about = path.lstat() if leads_nowhere(path) else path.stat()
        digest.update(json.dumps([name, about.st_size, about.st_mtime_ns]).encode())
    return digest.hexdigest()
