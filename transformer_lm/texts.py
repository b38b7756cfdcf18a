"""What the model writes, as text files."""

from collections.abc import Sequence
from pathlib import Path

from shared_utils.runs import write_text


def printable(text: str) -> str:
    """The text with "?" for each byte that is no UTF-8: `Bytes.decode` keeps those as Python's surrogate escapes."""
    return text.encode("utf-8", "replace").decode()


def write_texts(path: str | Path, texts: Sequence[str]) -> None:
    """Write printable texts one below the other, a line of three dashes between two. Errors: as `runs.write_text`."""
    write_text(path, "\n\n---\n\n".join(texts) + "\n")
