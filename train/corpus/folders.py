"""Which files of a folder are read, also behind links, and of what kind they are."""

import itertools
import os
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import Literal

type Kind = Literal["text", "jsonl", "parquet"]

SUFFIXES: dict[Kind, tuple[str, ...]] = {
    "text": (".txt", ".md", ".rst", ".py"),
    "jsonl": (".jsonl", ".ndjson"),
    "parquet": (".parquet",),
}
"""The files of a folder that are read, by kind; upper case is the same."""

_ABOUT = re.compile(
    r"(readme.*|licen[sc]e|notice|changelog|citation|contributing|code_of_conduct)\.(txt|md|rst)",
    re.IGNORECASE,
)
"""Names of texts about data."""


def find_files(folder: Path, kind: Kind | None = None, pattern: str | None = None) -> list[str]:
    """Finds the files to read in a folder, as `train.corpus.open_source` describes it.

    Args:
        folder: where to look.
        kind: of the files; None is every kind.
        pattern: what they match; None is a suffix of the kind.

    Returns:
        Their paths as `list_files` gives them.

    Raises:
        ValueError: there are none.
    """
    names = list_files(folder)
    if pattern is None:
        suffixes = SUFFIXES[kind] if kind else tuple(itertools.chain(*SUFFIXES.values()))
        names = [n for n in names if n.lower().endswith(suffixes) or _is_lost(folder / n)]
        wanted = f"end in {', '.join(suffixes)}"
        if kind is None and {_kind_of(name) for name in names} & {"jsonl", "parquet"}:
            names = [name for name in names if not _ABOUT.fullmatch(name.rpartition("/")[2])]
    else:
        names = [name for name in names if matches(name, pattern)]
        wanted = f"match {pattern!r}"
    if not names:
        raise ValueError(
            f"{folder} has no files whose names {wanted}; choose others as kind or pattern "
            "(--kind, --pattern)"
        )
    return names


def kind_of_all(path: Path, names: Sequence[str]) -> Kind:
    """Returns the kind that all files have by their suffixes.

    Args:
        path: the folder, or the only file.
        names: the files.

    Raises:
        ValueError: a suffix of no kind, or several kinds.
    """
    example: dict[Kind, str] = {}
    for name in names:
        if (kind := _kind_of(name)) is not None:
            example.setdefault(kind, name)
        elif not _is_lost(path / name):
            raise _unknown_kind(path, name)
    if len(example) > 1:
        found = ", ".join(f"{kind} ({name})" for kind, name in example.items())
        raise ValueError(
            f"{path} has files of several kinds, {found}; choose one as kind (--kind), or files "
            "as pattern (--pattern)"
        )
    if not example:
        raise _unknown_kind(path, names[0])
    return next(iter(example))


def list_files(folder: Path) -> list[str]:
    """Lists the files in a folder and in the folders in it, but for hidden ones.

    Links to folders are followed. The content of a folder that several paths lead to is listed
    once: with the path that has no link, or else with the first.

    Args:
        folder: where to begin.

    Returns:
        The paths from `folder` on, with forward slashes, in order. Links that lead nowhere are
        among them.
    """
    found: list[str] = []
    seen: set[str] = set()
    starts = [str(folder)]
    for start in starts:  # which grows: links wait until all folders without links were seen
        for parent, folders, files in os.walk(start):
            real = os.path.realpath(parent)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not _is_hidden(name))
            inside = [os.path.join(parent, name) for name in folders]
            starts += [path for path in inside if os.path.islink(path)]
            inside = [Path(parent, name) for name in files if not _is_hidden(name)]
            found += [path.relative_to(folder).as_posix() for path in inside if _is_read(path)]
    return sorted(found)


def leads_nowhere(path: Path) -> bool:
    """Returns whether this is a link to what is not there, or to itself."""
    return os.path.islink(path) and not os.path.exists(path)


def matches(name: str, pattern: str) -> bool:
    """Returns whether a path matches a pattern, as `Path.glob` has them.

    Args:
        name: a path with forward slashes.
        pattern: one with `*`, `?` and `[...]` inside a name, and `**` for any number of folders.
    """
    return _match(PurePath(name).parts, PurePath(pattern).parts)


def _is_lost(path: Path) -> bool:
    """Whether a link leads nowhere and may have led to a folder."""
    return not path.suffix and leads_nowhere(path)


def _kind_of(name: str) -> Kind | None:
    """The kind of a file by its suffix."""
    kinds: list[Kind] = [kind for kind in SUFFIXES if name.lower().endswith(SUFFIXES[kind])]
    return kinds[0] if kinds else None


def _unknown_kind(path: Path, name: str) -> ValueError:
    choices = ", ".join(SUFFIXES)
    return ValueError(
        f"cannot tell the kind of {name} in {path}; give it as kind (--kind): one of {choices}"
    )


def _match(parts: Sequence[str], patterns: Sequence[str]) -> bool:
    if not patterns:
        return not parts
    rest = patterns[1:]
    if patterns[0] == "**":
        return any(_match(parts[skipped:], rest) for skipped in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], patterns[0]) and _match(parts[1:], rest)


def _is_read(path: Path) -> bool:
    """Whether this is a file or, to be refused, a link that leads nowhere; no pipe or socket."""
    return os.path.isfile(path) or leads_nowhere(path)


def _is_hidden(name: str) -> bool:
    return name.startswith(".")
