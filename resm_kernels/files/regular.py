"""Opens and reads regular files only, up to a limit."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from resm_kernels.files.structure import shortened

COPY_BYTES: Final = 1 << 28
"""The largest file that is read whole: a tokenizer's files have a tenth of it."""

MAX_NAME: Final = 255
MAX_PATH: Final = 4095
"""The longest name, and the longest path, in bytes, that Linux and macOS allow."""

_PIECE: Final = 1 << 24
_KINDS: Final = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)

FilePath = str | os.PathLike[str]

# Windows has neither of the first two, and would change the ends of lines without the third.
_READING: Final = os.O_RDONLY | sum(getattr(os, flag, 0) for flag in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))


def expanded(path: FilePath, raising: type[ValueError], where: str) -> Path:
    """Return a path that a user or a file states, with `~` expanded; that of an unknown user stays as it is.

    Args:
        raising: The kind of the error.
        where: What the error calls the path, such as the key that states it.

    Raises:
        raising: The path has a NUL byte, a character that no file name can have, or a name of more than 255 bytes.
    """
    text = os.path.expanduser(os.fspath(path))
    if problem := path_problem(text):
        raise raising(f"{where}: {problem}")
    return Path(text)


def path_problem(text: str) -> str | None:
    """Return why no file or folder can have this path; None if one can."""
    try:
        names = os.fsencode(text).split(b"/")
    except UnicodeEncodeError as error:
        return f"got {shortened(text)}, but no file name can have the character \\u{ord(text[error.start]):04x}"
    if any(b"\0" in name for name in names):
        return f"got {shortened(text)}, which has a NUL byte; need the name of a file or folder"
    if longest := max((len(name) for name in names if len(name) > MAX_NAME), default=0):
        return f"got {shortened(text)}, which has a name of {longest} bytes; need at most {MAX_NAME}"
    length = sum(map(len, names)) + len(names)
    if length > MAX_PATH:
        return f"got {shortened(text)}, a path of {length} bytes; need at most {MAX_PATH}"
    return None


def open_regular(file: FilePath, raising: type[ValueError], missing: str = "") -> int:
    """Open a regular file for reading and return its descriptor; symbolic links are followed.

    Opening a pipe would wait for a writer, and opening a device may do anything, so the kind of the file is looked up
    before. A file that is exchanged for a pipe meanwhile does not block either.

    Args:
        file: The file.
        raising: The kind of the error.
        missing: What the error about a missing file says after "no such file".

    Raises:
        raising: The file is missing, is no regular file, or must not be read.
    """
    try:
        mode = os.stat(file).st_mode
        if stat.S_ISREG(mode):
            fd = os.open(file, _READING)
            mode = os.fstat(fd).st_mode
            if stat.S_ISREG(mode):
                return fd
            os.close(fd)
    except FileNotFoundError:
        raise raising(f"{file}: {_missing(file)}{f'; {missing}' if missing else ''}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL byte, or half of a surrogate pair
        raise raising(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "no regular file")
    raise raising(f"{file}: is {kind}, need a regular file")


def _missing(file: FilePath) -> str:
    return "is a link to a file that does not exist" if os.path.islink(file) else "no such file"


def check_regular(file: FilePath, raising: type[ValueError], missing: str = "") -> None:
    """Raise an error unless `open_regular` opens the file."""
    os.close(open_regular(file, raising, missing))


def read_bytes(file: FilePath, raising: type[ValueError], *, limit: int = COPY_BYTES, missing: str = "") -> bytes:
    """Return the content of a regular file of at most `limit` bytes.

    Memory is taken for what is read, not for the size that the file claims to have.

    Raises:
        raising: The file is larger, or cannot be opened or read.
    """
    with opened(file, raising, missing) as fd:
        size = os.fstat(fd).st_size
        content = read_up_to(fd, limit + 1) if size <= limit else b""
    if max(size, len(content)) > limit:
        raise raising(f"{file}: has {max(size, len(content))} bytes or more, need at most {limit}")
    return content


@contextlib.contextmanager
def opened(file: FilePath, raising: type[ValueError], missing: str = "") -> Iterator[int]:
    """Open a regular file, as `open_regular` does, and close it at the end; errors of reading are of this kind too."""
    fd = open_regular(file, raising, missing)
    try:
        yield fd
    except OSError as error:
        raise raising(f"{file}: cannot be read: {error.strerror or error}") from error
    finally:
        os.close(fd)


def read_up_to(fd: int, length: int) -> bytes:
    """Return the next bytes of a file, at most `length`; fewer only at its end.

    Memory is taken for what is read. A file of the system that has nothing to read yet is an OSError.
    """
    pieces: list[bytes] = []
    while length > 0 and (piece := os.read(fd, min(length, _PIECE))):
        pieces.append(piece)
        length -= len(piece)
    return b"".join(pieces)


def read_text(file: FilePath, raising: type[ValueError], *, limit: int, missing: str = "") -> str:
    """Return the content of a regular file as text; see `read_bytes` and `decoded`."""
    return decoded(read_bytes(file, raising, limit=limit, missing=missing), str(file), raising)


def decoded(content: bytes, where: str, raising: type[ValueError]) -> str:
    """Return bytes in UTF-8 as text, without the byte-order mark that they may begin with.

    Raises:
        raising: They are not UTF-8; the message begins with `where` and names the byte.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The codec counts from the end of a byte-order mark.
        at = error.start + (len(content) - len(error.object))
        raise raising(
            f"{where}: byte {at} is 0x{content[at]:02x}, which is not UTF-8 ({error.reason}); save the file as UTF-8"
        ) from None
