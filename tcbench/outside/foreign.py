"""Files that others made, as they are found: what stands in a file's place, and text and JSON in marked encodings."""

import codecs
import re
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from tcbench.errors import UserError

Kind = TypeVar("Kind")

_HEAD = 512  # bytes that tell what a file is

_STAND_INS = {
    b"version https://git-lfs": "a Git LFS pointer; run `git lfs pull` in its clone, or download the file itself",
    b"\x1f\x8b": "a gzip archive; unpack it",
    b"BZh": "a bzip2 archive; unpack it",
    b"\xfd7zXZ": "an xz archive; unpack it",
    b"7z\xbc\xaf": "a 7z archive; unpack it",
    b"Rar!": "a RAR archive; unpack it",
    b"\x89HDF": "an HDF5 file, as Keras writes; get the one for PyTorch",
    b"\x93NUMPY": "an array of NumPy; get the file itself",
    b"GGUF": "a GGUF file of quantised weights; get the original ones",
    b"%PDF": "a PDF document; get the file itself",
}
"""By their first bytes, what is often found under the name of another file."""

_WEB_PAGE = re.compile(rb"\s*<(!doctype html|html|head|body|\?xml)", re.IGNORECASE)


def head_of(path: Path) -> bytes:
    """A file's first bytes, up to 512.

    Raises:
        UserError: the file is missing or may not be read.
    """
    try:
        with open(path, "rb") as file:
            return file.read(_HEAD)
    except FileNotFoundError as error:
        raise UserError(f"{path}: not found; download it or correct the path") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); correct its permissions or the path") from error


def refuse_stand_in(path: Path, wanted: str) -> None:
    """Raise UserError if a file that should be `wanted` ("a checkpoint") is missing or empty, or plainly another thing.

    Such are what a failed download or a clone without its large files leaves: a web page, a message, a pointer of Git
    LFS; or an archive that is still packed.
    """
    head = head_of(path)
    if not head:
        found = "empty; get it again"
    elif _WEB_PAGE.match(head):
        found = "a web page, such as a login or an error; download the file itself"
    elif known := next((what for magic, what in _STAND_INS.items() if head.startswith(magic)), None):
        found = known
    elif (text := _as_text(head)) is not None:
        found = f"text that begins {text!r}; get the file itself"
    else:
        return
    raise UserError(f"{path}: not {wanted}: it is {found}")


def _as_text(head: bytes) -> str | None:
    """The first words of what can be read as text."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # its last character may be cut off
    except UnicodeDecodeError:
        return None
    printable = all(char.isprintable() or char in "\r\n\t" for char in text)
    return text.strip()[:40].partition("\n")[0] if printable else None


def read_text(path: Path) -> str:
    """A text in UTF-8, with or without a byte order mark, or in UTF-16 with one; ends of lines of any kind become \\n.

    Raises:
        UserError: the file is missing, may not be read, or is in another encoding.
    """
    marks = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    encoding = "utf-16" if head_of(path).startswith(marks) else "utf-8-sig"
    try:
        return Path(path).read_text(encoding=encoding)
    except UnicodeError as error:
        raise UserError(f"{path}: is no text in UTF-8 ({error}); save it in that encoding") from error


def read_json_as(path: Path, kind: type[Kind], what: str) -> Kind:
    """JSON that must have a form; fields that the form does not name are passed over.

    Args:
        path: of the file, a text as `read_text` reads it.
        kind: the form: a model of pydantic, or a list or mapping of such.
        what: what the file should be, "captions of MSCOCO".

    Raises:
        UserError: names the first field that is missing or of another type; as `read_text`.
    """
    try:
        return TypeAdapter(kind).validate_json(read_text(path))
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, problem["loc"]))
        reason = f"{where}: {problem['msg']}" if where else problem["msg"]
        raise UserError(f"{path}: not {what} ({reason}); get it again or correct it") from error
