"""Lists of prompts: plain text, or GenEval's metadata."""

import json
import os


def read_prompts(path):
    """A .txt with one prompt per line, or a .jsonl with a "prompt" in each, as GenEval's -> records.

    The text is UTF-8, or UTF-16 that begins with its mark. Empty lines are passed over; a line that is no
    prompt raises ValueError.
    """
    kind = os.path.splitext(path)[1].lower()
    if kind not in (".txt", ".jsonl"):
        raise ValueError(f"{path} must be a .txt or a .jsonl, and be called so")
    with open(path, "rb") as file:
        begins_as_utf16 = file.read(2) in (b"\xff\xfe", b"\xfe\xff")
    encoding = "utf-16" if begins_as_utf16 else "utf-8-sig"
    records = []
    with open(path, encoding=encoding, errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            record = read_record(line, kind)
            if record is None or not is_prompt(record["prompt"]):
                what = 'a .txt has text in UTF-8, a .jsonl a JSON object with a "prompt" in each line'
                raise ValueError(f"{path}, line {number}, has no prompt: {what}")
            records.append(record)
    if not records:
        raise ValueError(f"{path} holds no prompts")
    return records


def read_record(line, kind):
    """Turn a line of a .txt or .jsonl into {"prompt": ..., what else it has}; None if it has no prompt."""
    if kind == ".txt":
        return dict(prompt=line.strip())
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        return None
    return record


def is_prompt(text):
    """Return True if `text` can be drawn: not empty, no broken encoding, no other format's first line."""
    try:
        text.encode()  # raises for bytes that were no UTF-8, and for half of an emoji
    except UnicodeEncodeError:
        return False
    return bool(text.strip()) and "\0" not in text and not text.startswith(('{"', "{\\rtf"))
