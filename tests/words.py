"""Commands for test_data.cpp and test_tokenizer.cpp, which read words that end at blanks (words.h)."""
import os
import tempfile
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)


def words(*commands):
    """A line for each. A blank in the name of a folder becomes the byte 0x1f."""
    lines = "\n".join(commands) + "\n"
    for folder in (ROOT, tempfile.gettempdir(), os.environ.get("OLMOE_DATA", "")):
        lines = lines.replace(folder, folder.replace(" ", "\x1f")) if folder else lines
    return lines
