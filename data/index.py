"""What images a data set holds: found once, by all cores, and kept in one file of sqlite's."""

import collections
import concurrent.futures
import contextlib
import csv
import functools
import glob
import hashlib
import itertools
import json
import multiprocessing
import os
import pathlib
import re
import sqlite3
import sys
import tarfile
import threading

import numpy as np
from PIL import ExifTags, Image
from tqdm import tqdm

from data.files import RANK, rank_zero_first, write_atomically

UTF8 = dict(encoding="utf-8-sig", errors="surrogateescape")
TABLES = """PRAGMA journal_mode = off; PRAGMA synchronous = off;
CREATE TABLE captions (number INTEGER PRIMARY KEY, text TEXT UNIQUE); INSERT INTO captions VALUES (0, '');
CREATE TABLE images (file BLOB, offset INT, length INT, height INT, width INT, caption INT);
CREATE TABLE about (skipped TEXT);"""
INSERT = "INSERT INTO images VALUES (?, ?, ?, ?, ?, (SELECT number FROM captions WHERE text = ?))"

seconds = 1 if sys.stderr.isatty() else 60  # in a log file
progress = functools.partial(tqdm, disable=RANK > 0, mininterval=seconds, maxinterval=60)


def in_processes(function, jobs, what):
    """Yields function(*job) of every job, in order, from as many processes as there are cores; a single job
    is done here. They are forked from a process that has only imported this module: no GPU, no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    jobs = iter(progress(jobs, desc=what))
    with concurrent.futures.ProcessPoolExecutor(mp_context=context) as pool:
        while some := list(itertools.islice(jobs, 64)):
            yield from (pool.map if len(some) > 1 else map)(function, *zip(*some))


def canonical(source):
    """A source of images as it is noted: one spelling of a folder, or of a pattern."""
    return source if source == "shapes" else os.path.realpath(os.path.expanduser(source))


def find_pieces(source):
    """Pieces, [(path of a shard,) or (records,)], and the files that tell whether a data set has changed.

    source: a folder with metadata.jsonl or metadata.csv (Hugging Face's imagefolder: file_name, and text or
    caption), or of tar shards, or of images with a .txt beside each, whichever it has first; a pattern of tar
    shards (WebDataset's). Links are followed, hidden files passed over.
    """
    inside, itself = os.path.join(glob.escape(source), ""), glob.escape(source)
    patterns = f"{inside}metadata.jsonl", f"{inside}metadata.csv", f"{inside}**/*", itself, source
    found = (sorted(glob.glob(pattern, recursive=True)) for pattern in patterns)
    paths = next(filter(None, found), None)
    if paths is None:
        raise ValueError(f"{source} is neither a folder nor a pattern (* ? [], no braces) of tar shards")
    if shards := [path for path in paths if re.search(r"\.(tar|tar\.\w+|tgz)$", path)]:
        return [(path,) for path in shards], shards
    is_metadata = len(paths) == 1 and paths[0].endswith((".jsonl", ".csv"))
    records = read_metadata(paths[0]) if is_metadata else read_folder(paths)
    return iter(lambda: (list(itertools.islice(records, 1000)),), ([],)), paths


# -- readers: each yields (file, caption, offset, length, what to open) of an image, or why it is skipped --
def caption_of(record):
    return (record.get("text") or record["caption"]).strip()


def read_metadata(path):
    with open(path, newline="", **UTF8) as file:
        for record in csv.DictReader(file) if path.endswith(".csv") else filter(str.strip, file):
            try:
                record = json.loads(record) if isinstance(record, str) else record
                name, caption = record["file_name"], caption_of(record)
                outside = os.path.isabs(name) or ".." in name.split("/")
                file = os.path.join(os.path.dirname(path), name)
                yield "a file outside the folder" if outside else (file, caption, 0, -1, file)
            except Exception:  # a record may hold anything
                yield "a line without file_name, or without text or caption"


def read_folder(paths):
    for path in map(pathlib.Path, paths):
        if path.suffix.lower() in Image.registered_extensions():
            text, why = path.with_suffix(".txt"), "no .txt beside it"
            yield (path, text.read_text(**UTF8).strip(), 0, -1, path) if text.exists() else why


def key_of(member):
    """WebDataset's: the path of a tar's member up to the first dot of its last part. None: it is passed over,
    as are hidden files (a Mac's ._ among them), __MACOSX and __meta__."""
    folder, _, name = member.name.removeprefix("./").rpartition("/")
    hidden = name.startswith(".") or re.search(r"(^|/)__(MACOSX|[^/]*__)([./]|$)", member.name)
    return None if hidden or "." not in name or not member.isfile() else (folder, name.split(".")[0])


def read_shard(path):
    """The samples of a tar file, which stays packed: an image is `length` bytes of it, at `offset`."""
    try:
        with tarfile.open(path, "r:") as tar:
            for _, members in itertools.groupby(filter(key_of, tar), key_of):
                parts = {m.name.rpartition("/")[2].partition(".")[2].lower(): m for m in members}
                try:
                    image = next(
                        m for kind, m in parts.items() if f".{kind}" in Image.registered_extensions()
                    )
                    text = tar.extractfile(parts.get("txt") or parts["json"]).read().decode(*UTF8.values())
                    caption = caption_of({"text": text} if "txt" in parts else json.loads(text))
                    yield path, caption, image.offset_data, image.size, tar.extractfile(image)
                except Exception:
                    yield "no image, or no caption beside it"
    except (tarfile.TarError, OSError) as error:
        yield f"not a whole tar file, or a compressed one ({error})"


def list_images(piece):
    """A piece -> [(file, offset, length, height, width, caption)], and {why skipped: count}."""
    found, skipped = [], collections.Counter()
    for record in read_shard(piece) if isinstance(piece, str) else piece:
        if isinstance(record, str):
            skipped[record] += 1
        elif not record[1] or re.search("[\ud800-\udfff]", record[1]):  # no UTF-8, half an emoji
            skipped["a caption that is empty, or no text"] += 1
        else:
            file, caption, offset, length, opened = record
            try:
                with Image.open(opened) as image:  # not a PNG's own getexif, which decodes it
                    turned = Image.Image.getexif(image).get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
                    as_seen = image.format == "TIFF" or not turned
                    height, width = image.size[::-1] if as_seen else image.size
                found.append((os.fsencode(file), offset, length, height, width, caption))
            except Exception as error:  # decoders raise anything
                skipped[f"not readable as an image ({type(error).__name__})"] += 1
    return found, skipped


def write_index(pieces, what, path):
    """All usable images, a row each; a caption that many share is kept once, 0 is the empty one."""
    skipped = collections.Counter()
    with contextlib.closing(sqlite3.connect(path)) as file, file:
        file.executescript(TABLES)
        for found, reasons in in_processes(list_images, pieces, what):
            file.executemany("INSERT OR IGNORE INTO captions (text) VALUES (?)", (row[5:] for row in found))
            file.executemany(INSERT, found)
            skipped.update(reasons)
        file.execute("INSERT INTO about VALUES (?)", (json.dumps(skipped),))


class Index:
    """What a data set holds: looked at by the first process, unless `folder` has an index of these files.
    Attributes: images (n, 3) of height, width, caption; count: of captions; skipped {why: count}; digest: of
    the files' names, sizes and dates.
    """

    def __init__(self, source, folder):
        pieces, paths = find_pieces(canonical(source))
        stamps = (f"{path!r} {os.path.getsize(path)} {os.stat(path).st_mtime_ns}" for path in paths)
        self.digest = hashlib.sha256("".join(stamps).encode()).hexdigest()[:16]
        path = os.path.join(folder, f"index-{self.digest}.sqlite")
        with rank_zero_first():
            if not os.path.exists(path):
                write_atomically(path, functools.partial(write_index, pieces, f"looking at {source}"))
        uri, self.lock = pathlib.Path(path).absolute().as_uri(), threading.Lock()
        try:
            self.file = sqlite3.connect(f"{uri}?mode=ro&immutable=1", uri=True, check_same_thread=False)
            rows = self.file.execute("SELECT height, width, caption FROM images")
            self.images = np.fromiter(rows, np.dtype((np.int32, 3)))
            self.count, skipped = self.read("SELECT max(number) + 1, about.* FROM captions, about")
            self.skipped = collections.Counter(json.loads(skipped))
        except (sqlite3.Error, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}); remove it, and it is made again") from error

    def read(self, query, *values):
        with self.lock:
            return self.file.execute(query, values).fetchone()

    def bytes_of(self, k):
        """Image k, as it lies in its file."""
        query = "SELECT file, offset, length FROM images WHERE rowid = ?"
        path, offset, length = self.read(query, int(k) + 1)
        with open(os.fsdecode(path), "rb") as file:
            file.seek(offset)
            return file.read(length)

    def caption(self, number):
        return self.read("SELECT text FROM captions WHERE number = ?", int(number))[0]
