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
import urllib.parse

import numpy as np
from PIL import ExifTags, Image
from tqdm import tqdm

from data.files import RANK, rank_zero_first, write_atomically

PACKED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"(\xb5": "zstd"}  # how such files begin
UTF8 = dict(encoding="utf-8-sig", errors="surrogateescape")
NO_RECORD = (ValueError, KeyError, TypeError, AttributeError, RecursionError, StopIteration)
TABLES = """PRAGMA journal_mode = off; PRAGMA synchronous = off; BEGIN;
CREATE TABLE captions (number INTEGER PRIMARY KEY, text TEXT UNIQUE); INSERT INTO captions VALUES (0, '');
CREATE TABLE images (file BLOB, offset INT, length INT, height INT, width INT, caption INT);
CREATE TABLE about (skipped TEXT);"""
INSERT = "INSERT INTO images VALUES (?, ?, ?, ?, ?, (SELECT number FROM captions WHERE text = ?))"

# refreshed once a second, in a log file once a minute
refreshed = dict(mininterval=1 if sys.stderr.isatty() else 60, maxinterval=60)
progress = functools.partial(tqdm, disable=RANK > 0, **refreshed)
csv.field_size_limit(2**31 - 1)


class Skip(Exception):
    """Why an image is left out."""


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
    paths = [source] if os.path.exists(source) else sorted(glob.glob(source, recursive=True))
    if os.path.isdir(source):
        inside = os.path.join(glob.escape(source), "")
        paths = sorted(glob.glob(f"{inside}metadata.csv") + glob.glob(f"{inside}metadata.jsonl"))[-1:]
        below = [] if paths else sorted(glob.glob(f"{inside}**/*", recursive=True))
        paths = paths or [path for path in below if re.search(r"\.(tar|tar\.\w+|tgz)$", path)]
        if not paths:
            return in_pieces(read_folder(below)), below
    if not paths:
        raise ValueError(f"{source} is neither a folder nor a pattern (* ? [], no braces) of tar shards")
    if paths[0].endswith((".jsonl", ".csv")):
        return in_pieces(read_metadata(paths[0])), paths
    return [(path,) for path in paths], paths


def in_pieces(records):
    return iter(lambda: (list(itertools.islice(records, 1000)),), ([],))


# -- readers: each yields (file, caption[, offset, length, what to open]) of an image, or a Skip --


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
                yield Skip("a file outside the folder") if outside else (file, caption)
            except NO_RECORD:
                yield Skip("a line without file_name, or without text or caption")


def read_folder(paths):
    for path in map(pathlib.Path, paths):
        if path.suffix.lower() in Image.registered_extensions():
            text = path.with_suffix(".txt")
            yield (path, text.read_text(**UTF8).strip()) if text.exists() else Skip("no .txt beside it")


def key_of(member):
    """WebDataset's: the path of a tar's member up to the first dot of its last part. None: it is passed over,
    as are hidden files (a Mac's ._ among them), __MACOSX and __meta__."""
    folder, _, name = member.name.removeprefix("./").rpartition("/")
    hidden = name.startswith(".") or re.search(r"(^|/)__(MACOSX|[^/]*__)([./]|$)", member.name)
    return None if hidden or "." not in name or not member.isfile() else (folder, name.split(".")[0])


def read_shard(path):
    """The samples of a tar file, which stays packed: an image is `length` bytes of it, at `offset`."""
    seen = set()
    try:
        with open(path, "rb") as file:
            if packed := PACKED.get(file.read(2)):
                raise tarfile.ReadError(f"compressed with {packed}: uncompress it first")
        with tarfile.open(path, "r:") as tar:
            for key, members in itertools.groupby(filter(key_of, tar), key_of):
                members = [(m.name.rpartition("/")[2].partition(".")[2].lower(), m) for m in members]
                parts = dict(members)
                if key in seen or len(parts) < len(members):
                    yield Skip("a key that occurs twice, or whose files lie apart")
                    continue
                seen.add(key)
                try:
                    image = next(m for suffix, m in members if f".{suffix}" in Image.registered_extensions())
                    text = tar.extractfile(parts.get("txt") or parts["json"]).read().decode(*UTF8.values())
                    caption = caption_of({"text": text} if "txt" in parts else json.loads(text))
                    yield path, caption, image.offset_data, image.size, tar.extractfile(image)
                except NO_RECORD:
                    yield Skip("no image, or no caption beside it")
    except (tarfile.TarError, OSError) as error:
        yield Skip(f"not a whole tar file ({error})")


# -- the index -----------------------------------------------------------------------------------------------


def list_images(piece):
    """A piece -> [(file, offset, length, height, width, caption)], and {why skipped: count}."""
    found, skipped = [], collections.Counter()
    for record in read_shard(piece) if isinstance(piece, str) else piece:
        try:
            if isinstance(record, Skip):
                raise record
            file, caption, *place = record
            if not caption:
                raise Skip("an empty caption")
            if re.search("[\udc80-\udcff]", caption):  # what surrogateescape makes of other bytes
                raise Skip("text that is not UTF-8")
            offset, length, opened = place or (0, os.path.getsize(file), file)
            with Image.open(opened) as image:  # not a PNG's own getexif, which decodes it
                turned = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
                as_seen = not turned or image.format == "TIFF"
                height, width = image.size[::-1] if as_seen else image.size
            caption = caption.encode(errors="replace").decode()  # half of an emoji is no text
            found.append((os.fsencode(file), offset, length, height, width, caption))
        except Skip as reason:
            skipped[str(reason)] += 1
        except Exception as error:  # decoders raise anything
            skipped[f"not readable as an image ({type(error).__name__})"] += 1
    return found, skipped


def write_index(pieces, what, path):
    """All usable images of a data set, a row each; a caption that many share is kept once, 0 is the
    empty one."""
    skipped = collections.Counter()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as file:
        file.executescript(TABLES)
        for found, reasons in in_processes(list_images, pieces, what):
            captions = ((row[-1],) for row in found)
            file.executemany("INSERT OR IGNORE INTO captions (text) VALUES (?)", captions)
            file.executemany(INSERT, found)
            skipped.update(reasons)
        file.execute("INSERT INTO about VALUES (?)", (json.dumps(skipped),))
        file.execute("COMMIT")


class Index:
    """What a data set holds: looked at by the first process, unless `folder` has an index of files of these
    names, sizes and dates.

    Attributes: images (n, 3) of height, width, caption; count: of captions; skipped {why: count}; digest: of
    those names, sizes and dates.
    """

    def __init__(self, source, folder):
        pieces, paths = find_pieces(canonical(source))
        stamps = (f"{path!r} {os.path.getsize(path)} {os.stat(path).st_mtime_ns}" for path in paths)
        self.digest = hashlib.sha256("".join(stamps).encode()).hexdigest()[:16]
        path = os.path.join(folder, f"index-{self.digest}.sqlite")
        with rank_zero_first():
            if not os.path.exists(path):
                write = functools.partial(write_index, pieces, f"looking at the images of {source}")
                write_atomically(path, write)
        uri, self.lock = f"file:{urllib.parse.quote(path)}?mode=ro&immutable=1", threading.Lock()
        try:
            self.file = sqlite3.connect(uri, uri=True, check_same_thread=False)
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
