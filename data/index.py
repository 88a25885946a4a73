"""What images a data set holds: found once, by all cores, and kept in one SQLite file for all runs.

The first process looks whether the data set has changed since, and if so looks at every image's header.
The other processes, and later runs, read what it wrote.
"""

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
import stat
import sys
import tarfile
import threading
import typing
import zlib

import numpy as np
from PIL import ExifTags, Image
from tqdm import tqdm

from data import files

INDEX = os.path.join("runs", "index")  # the folder of all indexes, below the working directory

# Pillow would hand PostScript to Ghostscript, and knows many formats that nobody has tried here.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
ENDINGS = tuple(end for end, name in Image.registered_extensions().items() if name in FORMATS)
FORMATS = tuple(name for name in FORMATS if name in Image.OPEN)  # an older Pillow has no AVIF
UNREAD = {*Image.registered_extensions(), ".heic", ".heif"}  # Pillow does not know an iPhone's
TAR = re.compile(r"\.(tar|tar\.\w+|tgz)$", re.IGNORECASE)
METADATA = ("metadata.jsonl", "metadata.csv")

TEXT = dict(encoding="utf-8-sig", errors="surrogateescape")  # what is not UTF-8 is found again by its escapes
TABLES = """PRAGMA journal_mode = off; PRAGMA synchronous = off; PRAGMA cache_size = -1000000;
CREATE TABLE captions (number INTEGER PRIMARY KEY, text TEXT UNIQUE); INSERT INTO captions VALUES (0, '');
CREATE TABLE images (file BLOB, offset INT, length INT);
CREATE TABLE sizes (part INTEGER PRIMARY KEY, content BLOB);
CREATE TABLE about (stamp TEXT, digest TEXT, skipped TEXT);"""
PART = 1_000_000  # images of a row of `sizes`, int32 of height, width and caption for each
CHECKED = 4096  # bytes at each end of an image by which the digest knows it, beside its size

SECONDS = 1 if sys.stderr.isatty() else 60  # between two updates: in a log file each is a line
progress = functools.partial(tqdm, disable=files.RANK > 0, mininterval=SECONDS, maxinterval=60)


def in_processes(function, jobs):
    """Yield function(*job) of every job, in order, from as many processes as there are cores.

    They are forked from a process that has only imported this module: it has no GPU and no threads.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    jobs = iter(jobs)
    with concurrent.futures.ProcessPoolExecutor(mp_context=context) as pool:
        while True:
            some = list(itertools.islice(jobs, 64))
            if not some:
                return
            if len(some) == 1:  # not worth a process
                yield function(*some[0])
                continue
            futures = [pool.submit(function, *job) for job in some]
            for future in futures:
                yield future.result()


# -- finding: which files a source means ---------------------------------------------------------------------


def canonical(source):
    """Return a source of images in one spelling, whatever the working directory and the links above it."""
    if source == "shapes":
        return source
    path = os.path.abspath(os.path.expanduser(source))
    if os.path.isdir(path):
        return os.path.realpath(path)
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))


class Candidate(typing.NamedTuple):
    """An image file and its caption; None: the caption is in the .txt beside it."""

    path: str
    caption: str | None


def root_of(source):
    """Return the folder that the names of a data set's files are relative to."""
    root = canonical(source)
    while not os.path.isdir(root):
        root = os.path.dirname(root)
    return root


def walk(folder, skipped, seen):
    """Yield the files in a folder and below, in order; hidden ones are passed over, links are followed.

    A folder that links lead to twice, or in a circle, is read once.
    skipped: Counter of what is not read.  seen: set of the folders that are.
    """
    real = os.path.realpath(folder)
    if real in seen:
        skipped["a link to a folder that is read already"] += 1
        return
    seen.add(real)
    try:
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        skipped[f"a folder that cannot be read ({type(error).__name__})"] += 1
        return
    for entry in found:
        if entry.name.startswith("."):
            continue
        is_folder = os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
        if is_folder:
            yield from walk(entry.path, skipped, seen)
        else:
            yield entry.path


class Source:
    """How a data set is read, decided from what its folder or pattern holds.

    kind: "metadata", "pairs" (images with a .txt beside each) or "shards": the first of them that is there.
    paths: the metadata file, or the shards.  given: what the source names.  root: see `root_of`.
    Raises ValueError if nothing has that name, or a single file of another kind.
    """

    def __init__(self, source):
        path = canonical(source)
        self.root = root_of(source)
        self.given = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        if not self.given:
            raise ValueError(f"{source} is neither a folder nor a pattern (* ? [], no braces) of tar shards")
        self.paths = [path for path in self.given if path.lower().endswith((".jsonl", ".csv"))]
        for name in reversed(METADATA):
            if os.path.isfile(os.path.join(path, name)):
                self.paths = [os.path.join(path, name)]
        if len(self.paths) == 1:
            self.kind = "metadata"
            return
        self.kind = "pairs"
        if next(self.pairs(collections.Counter()), None) is not None:
            return
        self.paths = [path for path in self.files(collections.Counter()) if TAR.search(path)]
        if self.paths:
            self.kind = "shards"
        elif os.path.isfile(path):
            raise ValueError(
                f"{source} is a file, but no tar shard and no metadata; give the folder it is in"
            )

    def files(self, skipped):
        """Yield the paths of all files that the source names, in order."""
        seen = set()
        for path in self.given:
            if os.path.isdir(path):
                yield from walk(path, skipped, seen)
            else:
                yield path

    def pairs(self, skipped):
        """Yield a Candidate for each image with a .txt beside it."""
        for path in self.files(skipped):
            stem, ending = os.path.splitext(path)
            if ending.lower() in ENDINGS:
                if os.path.exists(stem + ".txt"):
                    yield Candidate(path, None)
                else:
                    skipped["an image without a .txt beside it"] += 1
            elif TAR.search(path):
                skipped["a tar file beside images with a .txt each: those are read"] += 1
            elif os.path.basename(path) in METADATA:
                skipped["metadata in a folder below: give that folder, to read it"] += 1
            elif ending.lower() in UNREAD and os.path.exists(stem + ".txt"):
                skipped[f"a format that is not read ({ending.lower()})"] += 1

    def named(self, skipped):
        """Yield a Candidate for each record of the metadata."""
        folder = os.path.dirname(self.paths[0])
        with open(self.paths[0], newline="", **TEXT) as file:
            for record in self.records(file):
                try:
                    name = record["file_name"]
                    caption = (record.get("text") or record["caption"]).strip()
                    outside = os.path.isabs(name) or ".." in name.split("/")
                except Exception:  # a record may hold anything
                    skipped["a line without file_name, or without text or caption"] += 1
                    continue
                if outside:
                    skipped["a file outside the folder"] += 1
                else:
                    yield Candidate(os.path.join(folder, name), caption)

    def records(self, file):
        """Yield the records of metadata.jsonl or .csv; None for a line that is none."""
        if self.paths[0].endswith(".csv"):
            csv.field_size_limit(2**31 - 1)
            yield from csv.DictReader(file)
            return
        for line in file:
            if line.strip():
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError):
                    yield None

    def candidates(self, skipped):
        """Yield the Candidates of a data set of loose files."""
        return self.named(skipped) if self.kind == "metadata" else self.pairs(skipped)

    def pieces(self, skipped):
        """Yield the pieces that are looked at on their own: (root, shard) or (root, [1,000 Candidates])."""
        if self.kind == "shards":
            for path in self.paths:
                yield self.root, path
            return
        candidates = self.candidates(skipped)
        while True:
            some = list(itertools.islice(candidates, 1000))
            if not some:
                return
            yield self.root, some

    def passed_over(self):
        """Count what lies beside metadata or shards and is not read: {why: count}."""
        reasons = collections.Counter()
        if self.kind == "pairs":  # counted as they are found
            return reasons
        read = set(self.paths)
        if self.kind == "metadata":
            read.update(candidate.path for candidate in self.named(collections.Counter()))
        for path in self.files(reasons):
            name = os.path.basename(path)
            if path in read:
                continue
            if name in METADATA:
                reasons["another metadata file"] += 1
            elif TAR.search(name):
                reasons["a tar file beside metadata: that is read"] += 1
            elif name.lower().endswith(ENDINGS) and self.kind == "metadata":
                reasons["an image that the metadata does not name"] += 1
            elif name.lower().endswith(ENDINGS):
                reasons["an image beside tar shards: those are read"] += 1
        return reasons

    def stamp(self):
        """Return a hash of the names, sizes and dates of all files that are used: has anything changed?"""
        digest = hashlib.sha256(TABLES.encode())  # an index of an older form counts as changed
        if self.kind == "shards":
            for path in self.paths:
                digest.update(repr((path, size_and_date(path))).encode())
            return digest.hexdigest()
        candidates = self.candidates(collections.Counter())
        for path, caption in progress(candidates, "checking for changes", delay=10):
            if caption is None:
                caption = size_and_date(os.path.splitext(path)[0] + ".txt")
            digest.update(repr((path, size_and_date(path), caption)).encode())
        return digest.hexdigest()


def size_and_date(path):
    """Return a file's size in bytes and its date of change, or None if it is not there."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return None
    return found.st_size, found.st_mtime_ns


# -- looking: what the files hold ----------------------------------------------------------------------------
# Readers yield (name, offset, length, caption, open file) for an image, or a string: why it is skipped.


def read_files(candidates):
    """Read image files, each with its caption."""
    for path, caption in candidates:
        try:
            if caption is None:
                caption = pathlib.Path(os.path.splitext(path)[0] + ".txt").read_text(**TEXT).strip()
            found = os.stat(path)
            if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for ever
                yield "not a file"
                continue
            with open(path, "rb") as file:
                yield path, 0, found.st_size, caption, file
        except FileNotFoundError:
            yield "a file that is not there, or a link that leads nowhere"
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            yield f"a file that cannot be read ({type(error).__name__})"


def read_shard(path):
    """Read the samples of a tar file. It stays packed: an image is `length` bytes of it, at `offset`."""
    try:
        with tarfile.open(path, "r:") as tar:
            members = (member for member in tar if sample_key(member) is not None)
            for _, group in itertools.groupby(members, sample_key):
                yield from read_samples(path, tar, list(group))
            if not is_end(tar):
                yield "a tar file that is damaged, cut short or joined with another: its first part is read"
    except (tarfile.TarError, OSError) as error:
        yield f"not a whole tar file, or a compressed one ({error})"


def is_end(tar):
    """Return True if only zeros follow what was read of a tar file; tarfile stops at a bad header too."""
    tar.fileobj.seek(tar.offset)
    rest = iter(lambda: tar.fileobj.read(2**20), b"")
    only_zeros = all(not chunk.strip(b"\0") for chunk in rest)
    return only_zeros and tar.fileobj.tell() > tar.offset


def sample_key(member):
    """Return WebDataset's key of a tar's member: its folder, and its name up to the first dot.

    None for what is passed over: hidden files (a Mac's ._ among them), __MACOSX, __meta__, folders.
    """
    parts = member.name.removeprefix("./").split("/")
    name = parts[-1]
    reserved = [part for part in parts if re.match(r"__MACOSX$|__.*__(\.|$)", part)]
    if reserved or name.startswith(".") or "." not in name or not member.isfile():
        return None
    return parts[:-1], name.split(".")[0]


def read_samples(path, tar, members):
    """Pair images with captions among members that share a key.

    Names that agree up to their last dot are a pair: a.png and a.txt, a.v0.png and a.v0.txt. Beside a.png,
    a.seg.png is a part of the same sample, as in WebDataset, and no image of its own.
    """
    stems = collections.defaultdict(dict)  # name without its ending -> {ending: member}
    for member in members:
        stem, ending = os.path.splitext(os.path.basename(member.name))
        stems[stem][ending.lower()] = member
    images = {}
    captions = {}
    for stem, parts in stems.items():
        found = [part for ending, part in parts.items() if ending in ENDINGS]
        if found:
            images[stem] = found[0]
        if ".txt" in parts or ".json" in parts:
            captions[stem] = parts.get(".txt") or parts[".json"]
    whole = [stem for stem in stems if stem in images and stem in captions]
    for stem in whole:
        try:
            text = tar.extractfile(captions[stem]).read().decode(**TEXT)
            if captions[stem].name.lower().endswith(".json"):
                record = json.loads(text)
                text = record.get("text") or record["caption"]
            image = images[stem]
            yield path, image.offset_data, image.size, text.strip(), tar.extractfile(image)
        except Exception:  # a caption may hold anything
            yield "no image, or no caption beside it"
    alone = [stem for stem in stems if not any(f"{stem}.".startswith(f"{other}.") for other in whole)]
    without_caption = sum(stem in images for stem in alone)
    without_image = sum(stem in captions for stem in alone)
    missing = max(without_caption, without_image)  # b.left.png and b.txt were meant as one sample
    if not whole:
        missing = max(missing, 1)
    for _ in range(missing):
        yield "no image, or no caption beside it"


def look_at(file, length):
    """Return height and width of an open image as a person sees it, and a checksum of its two ends."""
    checksum = zlib.crc32(file.read(CHECKED))
    file.seek(max(0, length - CHECKED))
    checksum = zlib.crc32(file.read(CHECKED), checksum)
    file.seek(0)
    with Image.open(file, formats=FORMATS) as image:
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)  # a PNG's own would decode it
        width, height = image.size
        if orientation in (5, 6, 7, 8) and image.format != "TIFF":  # Pillow has turned a TIFF already
            return width, height, checksum
        return height, width, checksum


def list_images(root, piece):
    """Look at a piece. Return [(file, offset, length, checksum, height, width, caption)], {why: count}.

    piece: the path of a shard, or a list of Candidates.  file: its name relative to root, as bytes.
    """
    found = []
    skipped = collections.Counter()
    samples = read_shard(piece) if isinstance(piece, str) else read_files(piece)
    for sample in samples:
        if isinstance(sample, str):
            skipped[sample] += 1
            continue
        path, offset, length, caption, file = sample
        if not caption or re.search("[\ud800-\udfff]", caption):  # no UTF-8, half an emoji
            skipped["a caption that is empty, or no text"] += 1
            continue
        try:
            height, width, checksum = look_at(file, length)
        except Exception as error:  # decoders raise anything
            skipped[f"not readable as an image ({type(error).__name__})"] += 1
            continue
        name = os.fsencode(os.path.relpath(path, root))
        found.append((name, offset, length, checksum, height, width, caption))
    return found, skipped


# -- keeping -------------------------------------------------------------------------------------------------


def write_index(source, stamp, what, path):
    """Look at all images of a Source and write them to an SQLite file, in order.

    A caption that many images share is kept once; caption 0 is the empty one.
    """
    skipped = source.passed_over()
    digest = hashlib.sha256()
    sizes = []
    # Nobody else writes this file, and some network drives have no locks.
    without_lock = f"{pathlib.Path(path).absolute().as_uri()}?nolock=1"
    with contextlib.closing(sqlite3.connect(without_lock, uri=True)) as file, file:
        file.executescript(TABLES)
        for found, reasons in progress(in_processes(list_images, source.pieces(skipped)), what):
            skipped.update(reasons)
            numbers = []
            for name, offset, length, checksum, height, width, caption in found:
                digest.update(repr((name, offset, length, checksum, caption)).encode())
                file.execute("INSERT OR IGNORE INTO captions (text) VALUES (?)", (caption,))
                number = file.execute("SELECT number FROM captions WHERE text = ?", (caption,)).fetchone()[0]
                file.execute("INSERT INTO images VALUES (?, ?, ?)", (name, offset, length))
                numbers.append((height, width, number))
            sizes.append(np.array(numbers, np.int32).reshape(-1, 3))
        sizes = np.concatenate(sizes) if sizes else np.zeros((0, 3), np.int32)
        for part, start in enumerate(range(0, len(sizes), PART)):
            file.execute("INSERT INTO sizes VALUES (?, ?)", (part, sizes[start : start + PART].tobytes()))
        row = stamp, digest.hexdigest()[:16], json.dumps(skipped)
        file.execute("INSERT INTO about VALUES (?, ?, ?)", row)


def path_of(source):
    """Return the path of the index of a source."""
    where = hashlib.sha256(canonical(source).encode(errors="surrogateescape")).hexdigest()[:16]
    return os.path.join(INDEX, f"index-{where}.sqlite")


class Index:
    """What a data set holds, in the order of its files.

    images: (n, 3), int32: height, width, number of the caption.  caption_count: how many captions there are.
    skipped: Counter {why: count}.  digest: the data set's name, made of what its images and captions are:
    relative names, sizes in bytes, both ends of each image, all captions; of no date and no absolute path.
    Raises ValueError if there is no such source; if the index's file is damaged.
    """

    def __init__(self, source):
        self.path = path_of(source)
        self.lock = threading.Lock()
        with files.rank_zero_first():
            if files.RANK == 0:
                self.bring_up_to_date(source)
        self.root = root_of(source)
        try:
            self.file = self.open()
            parts = self.file.execute("SELECT content FROM sizes ORDER BY part").fetchall()
            self.images = np.frombuffer(b"".join(part for (part,) in parts), np.int32).reshape(-1, 3)
            self.digest, skipped = self.read("SELECT digest, skipped FROM about")
            self.skipped = collections.Counter(json.loads(skipped))
            self.caption_count = self.read("SELECT max(number) + 1 FROM captions")[0]
        except (sqlite3.Error, TypeError, ValueError) as error:
            raise self.damaged(error) from error

    def bring_up_to_date(self, source):
        """Write the index, unless there is one and the files have not changed since."""
        found = Source(source)
        stamp = found.stamp()
        noted = None
        if os.path.exists(self.path):
            try:
                with contextlib.closing(self.open()) as file:
                    noted = file.execute("SELECT stamp FROM about").fetchone()[0]
            except (sqlite3.Error, TypeError) as error:
                raise self.damaged(error) from error
        if noted != stamp:
            write = functools.partial(write_index, found, stamp, f"looking at {source}")
            files.write_atomically(self.path, write)

    def open(self):
        """Open the file for reading by any thread; it never changes, it is only replaced."""
        uri = f"{pathlib.Path(self.path).absolute().as_uri()}?mode=ro&immutable=1"
        return sqlite3.connect(uri, uri=True, check_same_thread=False)

    def damaged(self, error):
        if not os.path.exists(self.path):
            reason = "which the first process has written, is not here: all nodes share the working directory"
            return ValueError(f"{self.path}, {reason}")
        return ValueError(f"{self.path} is damaged ({error}); remove it, and it is made again")

    def read(self, query, *values):
        with self.lock:
            return self.file.execute(query, values).fetchone()

    def bytes_of(self, k):
        """Return the bytes of image k, as they lie in its file."""
        query = "SELECT file, offset, length FROM images WHERE rowid = ?"
        name, offset, length = self.read(query, int(k) + 1)
        path = os.path.join(self.root, os.fsdecode(name))
        with open(path, "rb") as file:
            file.seek(offset)
            content = file.read(length)
        if len(content) < length:
            raise OSError(f"{path} has become shorter since it was looked at")
        return content

    def caption(self, number):
        """Return the text of a caption."""
        return self.read("SELECT text FROM captions WHERE number = ?", int(number))[0]
