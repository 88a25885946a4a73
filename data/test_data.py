"""These tests protect people's images and what is made of them.

Every usable image is found, seen as a person sees it, paired with its own caption and latents, and comes once
an epoch; what is not used is counted; no file is lost or mixed up; the shapes world is what its captions say.
"""

import collections
import concurrent.futures
import contextlib
import datetime
import functools
import gzip
import hashlib
import io
import itertools
import json
import os
import pathlib
import sqlite3
import struct
import subprocess
import sys
import tarfile
import threading
import time
import types
import zlib
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers.image_processor import PixArtImageProcessor
from PIL import Image, ImageCms, ImageDraw

import t2md
from data import files, images, index, parts, shapes
from data.images import ImageData, to_pixels, to_rgb
from t2md import VAE, TextEncoder

PNG = io.BytesIO()
Image.new("RGB", (128, 128), "red").save(PNG, "PNG")
PNG = PNG.getvalue()


@pytest.fixture(autouse=True)
def single_process(monkeypatch, tmp_path_factory):
    """Index in this process, into a folder of the test's own."""
    monkeypatch.setattr(index, "in_processes", itertools.starmap)
    monkeypatch.setattr(index, "INDEX", str(tmp_path_factory.mktemp("index")))


def load(source, pixels=128, vae=None, text_encoder=None, cache=None, seed=0, **filters):
    """The images of a source; up to four times enlarged, as most here are small."""
    filters = {"enlarge": 4.0} | filters
    data = ImageData(str(source), pixels, vae, text_encoder, seed, cache, **filters)
    data.fill_cache()
    return data


def prompts_of(data):
    return [data.caption(k) for k in range(len(data.rows))]


# -- what is found -------------------------------------------------------------------------------------------


def write_images(folder):
    """A small imagefolder with every kind of trouble; the usable ones are red at the left edge, upright."""
    pixels = np.full((60, 90, 3), 255, np.uint8)
    pixels[:, :30] = (200, 30, 30)
    image = Image.fromarray(pixels)
    rotated = Image.Exif()
    grey16 = np.full((60, 90), 60000, np.uint16)
    rotated[274] = 6  # turn a quarter clockwise to see it upright
    grey16[:, :30] = 10000
    clear = image.convert("RGBA")
    clear.putalpha(Image.fromarray(np.uint8(np.arange(90) < 45)[None].repeat(60, 0) * 255))
    os.makedirs(folder / "images", exist_ok=True)
    saved = {
        "plain.png": image,
        "palette.png": image.quantize(8),
        "clear.png": clear,
        "grey.jpg": image.convert("L"),
        "cmyk.jpg": image.convert("CMYK"),
        "sixteen.png": Image.fromarray(grey16),
        "tall.png": image.rotate(-90, expand=True),
    }
    for name, picture in saved.items():
        picture.save(folder / "images" / name)
    image.rotate(90, expand=True).save(folder / "images" / "turned.jpg", exif=rotated)
    (folder / "images" / "broken.png").write_bytes(b"no image")
    whole = (folder / "images" / "cmyk.jpg").read_bytes()
    (folder / "images" / "half.jpg").write_bytes(whole[: len(whole) * 3 // 4])
    names = (*saved, "turned.jpg", "half.jpg", "broken.png", "absent.png")
    lines = [{"file_name": f"images/{name}", "text": f"this is {name}"} for name in names]
    lines += [{"file_name": "images/plain.png", "text": " "}, {"file_name": "images/plain.png"}]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\nnot json\n")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "folder").mkdir()
    write_images(tmp_path / "folder")
    return tmp_path / "folder"


def check_picture(prompt, picture, size):
    height, width = size
    assert picture.shape == (height, width, 3) and (height > width) == ("tall" in prompt)
    left = picture[:3, width // 2] if "tall" in prompt else picture[height // 2, :3]
    right = picture[-3:, -3:]
    if "sixteen" in prompt:
        assert np.allclose(left, 10000 // 257, atol=2) and np.allclose(right, 60000 // 257, atol=2)
    elif "grey" in prompt:
        assert np.allclose(left, left[0, 0]) and left.max() < 100 and right.min() > 250
    else:
        assert np.allclose(left, (200, 30, 30), atol=25) and right.min() > 250, prompt


@pytest.mark.parametrize("pixels", [128, 256, 512, 1024, 2048])
def test_buckets_are_diffusers(pixels):
    """As diffusers' pipelines choose them, and for a coarser patch the nearest that it divides."""
    heights, widths = np.random.default_rng(0).integers(20, 5000, (2, 1000))
    table = images.aspect_ratios(pixels)
    classify = PixArtImageProcessor.classify_height_width_bin
    expected = [classify(int(h), int(w), table) for h, w in zip(heights, widths)]
    assert list(map(tuple, images.nearest_buckets(heights, widths, pixels).tolist())) == expected
    if pixels > 128:
        published = getattr(images.tables, f"ASPECT_RATIO_{pixels}_BIN")
        assert {ratio: list(sides) for ratio, sides in table.items()} == published
    for multiple in (8, 32, 64):
        coarse = images.aspect_ratios(pixels, multiple)
        for ratio, sides in table.items():
            assert all(side > 0 and side % multiple == 0 for side in coarse[ratio])
            assert np.abs(np.subtract(coarse[ratio], sides)).max() <= multiple


def png_of(width, height):
    """A valid PNG of one white pixel whose header claims width x height."""
    buffer = io.BytesIO()
    Image.new("L", (1, 1), 255).save(buffer, "PNG")
    header = b"IHDR" + struct.pack(">II", width, height) + buffer.getvalue()[24:29]
    return buffer.getvalue()[:12] + header + struct.pack(">I", zlib.crc32(header)) + buffer.getvalue()[33:]


def write_tar(path, *members):
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_images_come_out_right_from_folders_and_shards(tmp_path, folder):
    good = [name for name in os.listdir(folder / "images") if name not in ("broken.png", "half.jpg")]
    members = [(name, (folder / "images" / name).read_bytes()) for name in good for _ in range(2)]
    for k, name in enumerate(good):  # the first caption as .json
        words = f"this is {name}" if k else json.dumps({"caption": f"this is {name}"})
        members[2 * k] = (os.path.splitext(name)[0] + (".txt" if k else ".json"), words.encode())
    write_tar(tmp_path / "shard-0.tar", *members[:8])
    write_tar(tmp_path / "shard-1.tar", *members[8:])
    (tmp_path / "shard-2.tar").write_bytes((tmp_path / "shard-0.tar").read_bytes()[:700])
    of_folder = load(folder)
    of_shards = load(tmp_path / "shard-*.tar")
    assert of_folder.skipped == {
        "a file that is not there, or a link that leads nowhere": 1,
        "a caption that is empty, or no text": 1,
        "a line without file_name, or without text or caption": 2,
        "not readable as an image (UnidentifiedImageError)": 1,
    }
    assert sorted(prompts_of(of_folder)) == sorted(f"this is {name}" for name in (*good, "half.jpg"))
    assert sum(of_shards.skipped.values()) == 1 and "not a whole tar file" in next(iter(of_shards.skipped))
    assert sorted(prompts_of(of_shards)) == sorted(f"this is {name}" for name in good)
    for data in (of_folder, of_shards):
        for k, prompt in enumerate(prompts_of(data)):
            if "half" not in prompt:
                check_picture(prompt, np.asarray(data.picture(k)[1], float), data.sizes[k])
    half = prompts_of(of_folder).index("this is half.jpg")
    number, _ = of_folder.picture(half)
    assert number != half and (of_folder.sizes[number] == of_folder.sizes[half]).all()
    assert of_folder.skipped["not decodable (OSError)"] == 1


def test_bad_images_and_captions_are_skipped_and_counted(tmp_path):
    folder = tmp_path / "folder"
    outside = tmp_path / "outside.png"
    folder.mkdir()
    for path, content in {"good": PNG, "point": png_of(1, 1), "giant": png_of(30_000, 30_000)}.items():
        (folder / f"{path}.png").write_bytes(content)
    outside.write_bytes(PNG)
    names = ["good.png", "point.png", "giant.png", "../outside.png", "loop.png", str(outside)]
    (folder / "loop.png").symlink_to(folder / "loop.png")
    lines = [json.dumps({"file_name": name, "text": "a star"}).encode() for name in names]
    lines.append('{"file_name": "good.png", "text": "\u00e9toile"}'.encode("latin-1"))
    (folder / "metadata.jsonl").write_bytes(b"\n".join(lines))
    data = load(folder)
    assert prompts_of(data) == ["a star"]
    assert data.skipped == {
        "too small: would have to be enlarged more than 4 times for 128 pixels": 1,
        "not readable as an image (DecompressionBombError)": 1,
        "a file outside the folder": 2,
        "a file that cannot be read (OSError)": 1,
        "a caption that is empty, or no text": 1,
    }
    with pytest.raises(ValueError, match="no usable image.*too small"):
        load(folder, 1024)
    with pytest.raises(ValueError, match="nothing is neither a folder nor a pattern"):
        load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="outside.png is a file, but no tar shard .* give the folder"):
        load(outside)
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match="looked for metadata.jsonl or .csv, images with"):
        load(tmp_path / "bare")


def test_shards_follow_webdatasets_names(tmp_path):
    mac = [("./._a.png", b"mac"), ("./._a.txt", b"mac"), ("__MACOSX/a.png", PNG), (".DS_Store", b"")]
    a = [("./a.PNG", PNG), ("./a.seg.png", b"mask"), ("./a.txt", b"one")]
    split = [("x.y/b.left.png", PNG), ("x.y/b.txt", b"no image"), ("__meta__.json", b"{}")]
    split += [("x.y/c.png", PNG), ("x.y/c.json", b'{"text": "two"}')]
    twice = [("d.png", PNG), ("d.txt", b"first"), ("d.png", PNG)]
    twice += [("e.png", PNG), ("e.json", b'{"caption": "e"}')]
    half = [("f.png", PNG), ("f.json", b'{"text": "half \\ud83d"}'), ("a.png", PNG), ("a.txt", b"again")]
    latin = [("g.png", PNG), ("g.txt", "\u00e9".encode("latin-1")), ("h.png", PNG), ("noextension", b"")]
    write_tar(tmp_path / "x.tar", *mac, *a, *split, *twice, *half, *latin)
    data = load(tmp_path / "x.tar")
    assert prompts_of(data) == ["one", "two", "first", "e", "again"]
    assert data.skipped == {"no image, or no caption beside it": 2, "a caption that is empty, or no text": 2}


def test_names_with_dots_are_found_in_shards(tmp_path):
    """photo.v0.jpg pairs with photo.v0.txt; an image whose caption is missing there is counted."""
    members = []
    for name in ("photo.v0", "photo.v1", "Mr. Smith 1", "Mr. Smith 2"):
        members += [(f"{name}.png", PNG), (f"{name}.txt", name.encode())]
    members += [("photo.v7.png", PNG), ("b.v0.png", PNG), ("b.v0.json", b'{"text": "b"}')]
    write_tar(tmp_path / "x.tar", *sorted(members))
    data = load(tmp_path / "x.tar")
    assert prompts_of(data) == ["Mr. Smith 1", "Mr. Smith 2", "b", "photo.v0", "photo.v1"]
    assert data.skipped == {"no image, or no caption beside it": 1}
    assert data.picture(3)[1].getpixel((0, 0)) == (255, 0, 0)


def write_pairs(folder, *names, picture=PNG):
    """Images with a .txt beside each, which says its name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / f"{name}.png").write_bytes(picture)
        (folder / f"{name}.txt").write_text(name)


def test_what_cannot_be_read_never_refuses_the_rest(tmp_path):
    """Links that lead nowhere or in circles, pipes, PostScript, folders named like images or captions."""
    write_pairs(tmp_path / "d", "a", "gone", "pipe", "circle", "post", "renamed", "image")
    for name in ("gone", "pipe", "circle", "image", "post"):
        (tmp_path / "d" / f"{name}.png").unlink()
    (tmp_path / "d" / "gone.png").symlink_to("/nowhere/9.png")
    (tmp_path / "d" / "circle.png").symlink_to("circle.png")
    write_pairs(tmp_path / "d", "phone")
    (tmp_path / "d" / "phone.png").rename(tmp_path / "d" / "phone.HEIC")
    os.mkfifo(tmp_path / "d" / "pipe.png")
    (tmp_path / "d" / "image.png").mkdir()
    for name in ("post.eps", "renamed.png"):
        Image.new("RGB", (128, 128)).save(tmp_path / "d" / name, "EPS")
    (tmp_path / "d" / "below").mkdir()
    (tmp_path / "d" / "below" / "back").symlink_to("..")
    (tmp_path / "d" / "below" / "round").symlink_to("round")
    (tmp_path / "d" / "captionless.png").write_bytes(PNG)
    (tmp_path / "d" / "captionless.txt").mkdir()
    data = load(tmp_path / "d")
    assert prompts_of(data) == ["a"]
    assert data.skipped == {
        "a file that is not there, or a link that leads nowhere": 1,
        "a file that cannot be read (OSError)": 1,
        "a file that cannot be read (IsADirectoryError)": 1,
        "not a file": 1,
        "a format that is not read (.eps)": 1,
        "a format that is not read (.heic)": 1,
        "not readable as an image (UnidentifiedImageError)": 1,
        "a link to a folder that is read already": 1,
    }


def test_names_that_no_file_can_have_are_passed_over(tmp_path):
    write_pairs(tmp_path / "d", "a")
    lines = [dict(file_name=name, text="red") for name in ("a.png", "\0.png", "\ud83d.png")]
    (tmp_path / "d" / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    data = load(tmp_path / "d")
    assert prompts_of(data) == ["red"] and sum(data.skipped.values()) == 2


def test_shards_that_are_not_whole_are_said(tmp_path):
    """tarfile ends quietly at a header that it cannot read; what comes before it is used."""
    members = [
        (f"{k}.{ending}", content) for k in range(4) for ending, content in (("png", PNG), ("txt", b"a"))
    ]
    write_tar(tmp_path / "d" / "x.tar", *members)
    whole = (tmp_path / "d" / "x.tar").read_bytes()
    with tarfile.open(tmp_path / "d" / "x.tar") as tar:
        third = tar.getmembers()[4].offset
    assert load(tmp_path / "d").skipped == {}
    zeroed = whole[:third] + bytes(2048) + whole[third + 2048 :]
    damaged = whole[:third] + b"\xff" * 512 + whole[third + 512 :]
    for content, count in ((whole[:third], 2), (zeroed, 2), (damaged, 2), (whole + whole, 4)):
        (tmp_path / "d" / "x.tar").write_bytes(content)
        data = load(tmp_path / "d")
        reason = "a tar file that is damaged, cut short or joined with another: its first part is read"
        assert len(data.rows) == count and data.skipped == {reason: 1}


def test_what_is_passed_over_is_said(tmp_path):
    """Metadata comes first, then images with a .txt each, then tars; the others are counted."""
    write_tar(tmp_path / "pairs" / "x.tar", ("b.png", PNG), ("b.txt", b"of the tar"))
    write_pairs(tmp_path / "pairs", "a")
    data = load(tmp_path / "pairs")
    assert prompts_of(data) == ["a"]
    assert data.skipped == {"a tar file beside images with a .txt each: those are read": 1}
    (tmp_path / "pairs" / "a.txt").unlink()
    data = load(tmp_path / "pairs")
    assert prompts_of(data) == ["of the tar"]
    assert data.skipped == {"an image beside tar shards: those are read": 1}
    (tmp_path / "pairs" / "c.png").write_bytes(PNG)
    (tmp_path / "pairs" / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "of the metadata"}')
    (tmp_path / "pairs" / "metadata.csv").write_text("file_name,text\na.png,of the table\n")
    data = load(tmp_path / "pairs")
    assert prompts_of(data) == ["of the metadata"]
    assert data.skipped == {
        "a tar file beside metadata: that is read": 1,
        "an image that the metadata does not name": 1,
        "another metadata file": 1,
    }
    (tmp_path / "above").mkdir()
    (tmp_path / "pairs").rename(tmp_path / "above" / "train")
    write_pairs(tmp_path / "above", "d")
    assert load(tmp_path / "above").skipped["metadata in a folder below: give that folder, to read it"] == 2


def test_usual_folders_are_read(tmp_path):
    """With "caption", with metadata.csv, with a .txt beside, through links; in folders below."""
    names = ("jsonl", "csv", "text", "hub")
    for name in names:
        os.makedirs(tmp_path / name / "in")
        (tmp_path / name / "in" / "a.b.png").write_bytes(PNG)
    (tmp_path / "jsonl" / "metadata.jsonl").write_text('{"file_name": "in/a.b.png", "caption": "a, star"}')
    (tmp_path / "csv" / "metadata.csv").write_text('\ufefffile_name,text\nin/a.b.png,"a, star"\n,b\n')
    (tmp_path / "text" / "in" / "a.b.txt").write_text("a, star\n")
    (tmp_path / "text" / "in").rename(tmp_path / "below")
    (tmp_path / "text" / "in").symlink_to(tmp_path / "below")
    (tmp_path / "text" / "._a.b.png").write_bytes(b"mac")
    (tmp_path / "text" / "alone.jpg").write_bytes(PNG)
    (tmp_path / "blob").write_bytes((tmp_path / "jsonl" / "metadata.jsonl").read_bytes())
    (tmp_path / "hub" / "metadata.jsonl").symlink_to("../blob")
    (tmp_path / "hub" / "in" / "a.b.png").rename(tmp_path / "image")
    (tmp_path / "hub" / "in" / "a.b.png").symlink_to("../../image")
    for name in names:
        data = load(tmp_path / name)
        assert prompts_of(data) == ["a, star"] and data.picture(0)[1].getpixel((0, 0)) == (255, 0, 0), name
        assert sum(data.skipped.values()) == (name in ("csv", "text")), data.skipped
        if name != "text":
            assert prompts_of(load(next((tmp_path / name).glob("metadata.*")))) == ["a, star"]


def test_patterns_and_spellings(tmp_path, monkeypatch):
    shards = tmp_path / "shards"
    (shards / "below").mkdir(parents=True)
    for k in range(9, 12):
        write_tar(shards / f"{k:02}.tar", (f"{k}.png", PNG), (f"{k}.txt", f"caption {k}".encode()))
    (shards / "below" / "12.tar").write_bytes(gzip.compress((shards / "11.tar").read_bytes()))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(shards)
    names = ["caption 9", "caption 10", "caption 11"]
    data = load(".")
    assert prompts_of(data) == prompts_of(load("~/shards/*.tar")) == names
    assert sum(data.skipped.values()) == 1 and "or a compressed one" in next(iter(data.skipped))
    with pytest.raises(ValueError, match="neither a folder nor a pattern .* no braces"):
        load("{09..11}.tar")
    sources = (".", "../shards", "../shards/", "~/shards", str(shards))
    assert {index.canonical(source) for source in sources} == {str(shards)}
    assert index.canonical("x*.tar") == index.canonical("./x*.tar") == str(shards / "x*.tar")
    assert index.canonical("shapes") == "shapes"
    (shards / "link.tar").symlink_to("09.tar")
    assert prompts_of(load("link.tar")) == ["caption 9"]  # by its own name, which says what it is


# -- how it looks --------------------------------------------------------------------------------------------


def test_header_picture_and_person_agree(tmp_path):
    """A picture, red above and white below, wherever the file keeps how it is turned."""
    pixels = np.full((80, 40, 3), 255, np.uint8)
    pixels[:40] = (255, 0, 0)
    exif = Image.Exif()
    stored = Image.fromarray(pixels).rotate(90, expand=True)
    exif[274] = 6
    for suffix in ("jpg", "png", "webp", "tif", "avif"):
        stored.save(tmp_path / f"{suffix}.{suffix}", exif=exif)
    for path in sorted(tmp_path.iterdir()):
        path.with_suffix(".txt").write_text(path.name)
    data = load(tmp_path, 64)
    assert len(data.rows) == 5 and not data.skipped
    for k, name in enumerate(prompts_of(data)):
        picture = np.asarray(data.picture(k)[1], int)
        assert data.index.images[k, :2].tolist() == [80, 40] and picture.shape[0] > picture.shape[1], name
        assert abs(picture[2] - (255, 0, 0)).max() < 60 and picture[-2].min() > 240, name


def test_colours_are_srgb_whatever_the_mode():
    red = Image.new("RGB", (8, 8), "red")
    swapped = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    first = swapped.index(b"rXYZ")
    second = swapped.index(b"gXYZ")  # of the table: what is red there is green
    swapped[first], swapped[second] = swapped[second], swapped[first]
    for mode in ("RGB", "P", "RGBA"):
        image = red.convert(mode)
        image.info["icc_profile"] = bytes(swapped)
        assert np.allclose(to_rgb(image).getpixel((0, 0)), (0, 255, 0), atol=4), mode
        image.info["icc_profile"] = bytes(swapped)[:200]
        assert to_rgb(image).getpixel((0, 0)) == (255, 0, 0), mode
    for mode in ("L", "CMYK"):  # a profile of other colours
        image = Image.new("RGB", (8, 8), "white").convert(mode)
        image.info["icc_profile"] = bytes(swapped)
        assert to_rgb(image).getpixel((0, 0)) == (255, 255, 255), mode
    floats = np.full((2, 8, 8), 0.5, np.float32)
    sixteen = np.full((8, 8), 32768, np.uint16)
    for array in (floats[0], floats[1] * 255, sixteen, sixteen.astype(np.int32)):
        assert to_rgb(Image.fromarray(array)).getpixel((0, 0)) == (127, 127, 127)
    assert to_rgb(Image.new("1", (8, 8), 1)).getpixel((0, 0)) == (255, 255, 255)


# -- batches -------------------------------------------------------------------------------------------------


def test_every_image_comes_once_an_epoch_whoever_takes_it():
    data = object.__new__(ImageData)
    bucket_of = np.repeat(range(3), (50, 13, 1))
    data.seed = 0
    data.buckets = {bucket: np.flatnonzero(bucket_of == bucket) for bucket in range(3)}

    def batches(stage="kd"):
        return list(itertools.islice(data.order(4, stage), 64))  # 4 epochs of 64 images

    found = batches()
    assert all(len(set(bucket_of[batch])) == 1 for batch in found)
    assert collections.Counter(np.ravel(found).tolist()) == dict.fromkeys(range(64), 4)
    first = np.ravel(found[: 50 // 4 + 13 // 4])  # none twice, none left out but what is carried over
    assert len(set(first.tolist())) == len(first) == 60
    assert found[:15] != sorted(found[:15]) and found[:15] != found[16:31]
    assert found == batches()  # of any process, after any restart
    assert found != batches("adapt")  # a stage does not repeat the order of the one before
    data.seed = 1
    assert found != batches()


def test_timesteps_outside_are_drawn_again(tmp_path, components):
    data = small(tmp_path, components)
    generators = [files.generator(0, "kd", 0, i) for i in range(400)]
    data.moments_of = lambda numbers: (numbers, torch.zeros(400, 2, 1, 1, 1))
    t = data.batch([0] * 400, generators, timesteps=(950, 100))["t"]
    assert t.dtype == torch.long and 0 <= t.min() and t.max() < 1000 and (t == 999).float().mean() < 0.03


def test_a_tenth_of_the_captions_is_dropped(tmp_path, components):
    """Replaced by the empty one, number 0, which guidance's unconditional branch needs."""
    data = small(tmp_path, components)
    data.moments_of = lambda numbers: (numbers, torch.zeros(400, 2, 1, 1, 1))
    data.text_of = lambda captions: (captions, None)
    generators = [files.generator(0, "kd", 0, i) for i in range(400)]
    captions = data.batch([0] * 400, generators)["text"]
    assert data.caption_numbers[0] != 0 and set(captions) == {0, int(data.caption_numbers[0])}
    assert 22 <= captions.count(0) <= 58  # 40 +- 3 standard deviations


# -- the index and the cache ---------------------------------------------------------------------------------


def hashes(folder):
    return {path: hashlib.sha256(path.read_bytes()).digest() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def components():
    """VAE and text encoder of the shapes world, untrained."""

    def load(root):
        torch.manual_seed(0)
        tokenizer = parts.new_tokenizer()
        parts.new_vae().save_pretrained(root / "vae")
        parts.new_text_encoder(len(tokenizer)).save_pretrained(root / "text_encoder")
        tokenizer.save_pretrained(root / "text_encoder")
        return VAE(str(root / "vae")), TextEncoder(str(root / "text_encoder"))

    return load


def small(tmp_path, components, cache=None):
    """10 images in two buckets, one of them broken."""
    if not (tmp_path / "folder").exists():
        (tmp_path / "folder").mkdir()
        write_images(tmp_path / "folder")
    vae, text_encoder = components(tmp_path)
    return load(tmp_path / "folder", 128, vae, text_encoder, cache=cache)


def touch(path, seconds=1):
    """Give a file a date that is so much later."""
    found = path.stat()
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + seconds * 10**9))


def looks(monkeypatch):
    """A list that grows by an entry for every piece that is looked at."""
    looked = []
    list_images = index.list_images

    def spy(root, piece):
        looked.append(piece)
        return list_images(root, piece)

    monkeypatch.setattr(index, "list_images", spy)
    return looked


def test_the_index_is_made_once_for_all_runs_and_again_when_an_image_has_changed(folder, monkeypatch):
    looked = looks(monkeypatch)
    before = load(folder)
    again = load(folder)
    assert len(looked) == 1 and prompts_of(again) == prompts_of(before) and again.skipped == before.skipped
    with open(folder / "metadata.jsonl", "a") as file:
        file.write('{"file_name": "images/plain.png", "text": "one more"}\n')
    assert prompts_of(load(folder)) == [*prompts_of(before), "one more"]
    Image.new("RGB", (300, 300)).save(folder / "images" / "tall.png")
    changed = load(folder)
    tall = prompts_of(changed).index("this is tall.png")
    assert changed.index.images[tall, :2].tolist() == [300, 300]
    (folder / "images" / "tall.png").unlink()
    assert len(load(folder).rows) == len(changed.rows) - 1
    for path in pathlib.Path(index.INDEX).iterdir():
        path.write_bytes(path.read_bytes()[:100] + b"damage" * 1000)
    with pytest.raises(ValueError, match="index-.*sqlite is damaged"):
        load(folder)


def test_the_digest_is_what_the_images_are(tmp_path):
    """Not where or when: moving, copying, touching, notes and hidden files keep it; any change of an image, a
    caption or a name does not."""
    write_pairs(tmp_path / "d" / "cats", "a", "b")
    digest = load(tmp_path / "d").digest
    for name in ("note.txt", "a.md", ".DS_Store", "cats/.DS_Store", "model.safetensors", "cats/cache.sqlite"):
        (tmp_path / "d" / name).write_text("nothing that is used")
    touch(tmp_path / "d" / "cats" / "a.png")
    assert load(tmp_path / "d").digest == digest
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "d").rename(tmp_path / "elsewhere" / "e")
    assert load(tmp_path / "elsewhere" / "e").digest == digest
    cats = tmp_path / "elsewhere" / "e" / "cats"

    def changed():
        nonlocal digest
        before = digest
        digest = load(tmp_path / "elsewhere" / "e").digest
        return digest != before

    (cats / "a.txt").write_text("c")
    touch(cats / "a.txt")
    assert changed()
    other = bytearray(PNG)
    other[-20] ^= 1  # in the data: as many bytes, the same header
    (cats / "a.png").write_bytes(other)
    touch(cats / "a.png", 2)
    assert changed()
    (cats / "a.png").rename(cats / "z.png")
    (cats / "a.txt").rename(cats / "z.txt")
    assert changed()
    (cats / "z.txt").unlink()
    assert changed()


def test_shards_have_the_same_digest_wherever_they_lie(tmp_path):
    for folder in ("one", "two"):
        write_tar(tmp_path / folder / "0.tar", ("a.png", PNG), ("a.txt", b"a"))
    digests = {load(tmp_path / "one").digest, load(tmp_path / "two" / "*.tar").digest}
    assert len(digests) == 1
    write_tar(tmp_path / "two" / "0.tar", ("a.png", PNG), ("a.txt", b"b"))
    touch(tmp_path / "two" / "0.tar")
    assert load(tmp_path / "two").digest not in digests


def test_a_later_process_reads_what_the_first_has_found(folder, monkeypatch):
    """It neither searches the data set nor looks whether it has changed."""
    first = load(folder)
    monkeypatch.setattr(files, "RANK", 1)
    monkeypatch.setattr(files, "WORLD", 2)
    monkeypatch.setattr(files.dist, "barrier", lambda group: None)
    monkeypatch.setattr(index, "Source", None)
    other = load(folder)
    assert prompts_of(other) == prompts_of(first) and other.digest == first.digest


def test_an_index_of_many_images_is_quick_and_read_by_any_thread(tmp_path, monkeypatch):
    count = 50_000
    rows = []
    for k in range(count):
        rows.append((b"%d.tar" % (k // 1000), k, 9, 0, 128 + k % 2, 128, f"caption {k % 777}"))
    pieces = [(None, rows[k : k + 1000]) for k in range(0, count, 1000)]
    monkeypatch.setattr(index, "list_images", lambda root, piece: (piece, {}))
    monkeypatch.setattr(index.Source, "pieces", lambda self, skipped: pieces)
    monkeypatch.setattr(index, "PART", 30_000)
    data = load(tmp_path)
    assert len(data.rows) == count and data.index.caption_count == 778
    assert data.index.images.nbytes == 12 * count
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(data.caption, range(4 * 777)))
    assert found == [f"caption {k % 777}" for k in range(4 * 777)]


def test_finding_a_substitute_copies_nothing_of_a_large_bucket():
    """Image k first, then its bucket from there on, each once, then all."""
    data = object.__new__(ImageData)
    data.sizes = np.array([[64, 64], [64, 128]] * 5)
    data.rows = np.arange(10)
    data.buckets = {(64, 64): np.arange(0, 10, 2), (64, 128): np.arange(1, 10, 2)}
    assert list(data.substitutes(5)) == [5, 7, 9, 1, 3, *range(10)]
    members = range(5_000_000)  # a search looks at some; a copy would ask for them all
    data.sizes = np.broadcast_to(np.array([64, 64]), (len(members), 2))
    data.buckets = {(64, 64): np.arange(len(members))}
    began = time.process_time()
    for k in range(0, len(members), 50_000):
        assert next(data.substitutes(k)) == k
    assert time.process_time() - began < 0.1


def test_batches_with_and_without_a_cache_are_the_same(tmp_path, components, monkeypatch):
    monkeypatch.setattr(images, "SHARD", 3)
    uncached = small(tmp_path, components)
    cached = small(tmp_path, components, str(tmp_path / "features"))

    def generators(turn):
        return [files.generator(0, "kd", turn, i) for i in range(2)]

    for turn, chosen in enumerate(itertools.islice(cached.order(2, "kd"), 6)):
        with torch.autocast("cpu", torch.bfloat16):  # the frozen parts run outside it
            a = cached.batch(chosen, generators(turn))
            b = uncached.batch(chosen, generators(turn))
        for name in ("noise", "t", "mask"):
            assert torch.equal(a[name], b[name]), name
        inside = b["mask"].bool()
        assert not a["text"][~inside].any()
        for one, other in ((a["z0"], b["z0"]), (a["text"][inside], b["text"][inside])):
            assert one.dtype == other.dtype == torch.float32 and one.shape == other.shape
            assert torch.allclose(one, other, rtol=2e-3, atol=2e-3)


def test_the_cache_goes_on_where_it_was_cut_off(tmp_path, components, monkeypatch):
    monkeypatch.setattr(images, "SHARD", 3)
    features = tmp_path / "features"
    data = small(tmp_path, components, str(features))
    assert data.skipped["not decodable (OSError)"] == 1
    made = hashes(features)
    assert len(made) == 4 + 3  # of 11 captions, of 9 images
    for path in sorted(made)[::2]:
        path.unlink()
    small(tmp_path, components, str(features))
    assert hashes(features) == made
    vae, text_encoder = components(tmp_path)
    load(
        tmp_path / "folder", 64, vae, text_encoder, cache=str(features)
    )  # sizes share a folder, and captions
    assert made.items() < hashes(features).items()
    assert sum("captions" in path.name for path in hashes(features)) == 4
    damaged = next(features.glob("128px-*"))
    damaged.write_bytes(damaged.read_bytes()[:-10])
    data = small(tmp_path, components, str(features))
    with pytest.raises(ValueError, match="128px-.*safetensors is damaged .*; remove it, and it is made"):
        for k in range(len(data.rows)):
            data.batch([k], [files.generator(0, "kd", 0, 0)])
    with pytest.raises(ValueError, match="metadata.jsonl is, or lies below, a file; give a folder"):
        small(tmp_path, components, str(tmp_path / "folder" / "metadata.jsonl"))


def test_a_full_cache_needs_no_model_and_lets_both_go(tmp_path, components, monkeypatch):
    cache = str(tmp_path / "cache")
    data = small(tmp_path, components, cache)
    assert "model" not in vars(data.vae) and "model" not in vars(data.text_encoder)

    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(t2md, "load_model", refuse)
    data = small(tmp_path, components, cache)
    batch = data.batch([0, 1], [files.generator(0, "kd", 0, i) for i in range(2)])
    assert batch["z0"].shape[:2] == (2, 4)


def test_another_filter_never_pairs_captions_with_other_images(tmp_path, components):
    """One cache, another enlargement or multiple: every image still has its own caption and latents."""
    sides = (300, 100, 200, 64, 128)
    for side in sides:
        picture = io.BytesIO()
        Image.new("RGB", (side, side), (side % 256, 0, 0)).save(picture, "PNG")
        write_pairs(tmp_path / "d", f"side {side}", picture=picture.getvalue())
    vae, text_encoder = components(tmp_path)
    for filters in (dict(enlarge=4.0), dict(enlarge=1.0), dict(enlarge=1.3, multiple=64)):
        data = load(tmp_path / "d", 128, vae, text_encoder, cache=str(tmp_path / "cache"), **filters)
        assert len(data.rows) == sum(filters["enlarge"] * side >= 128 for side in sides)
        for k in range(len(data.rows)):
            seen, (moments,) = data.moments_of([k])
            side = int(data.caption(seen[0]).split()[1])
            pixels = to_pixels([Image.new("RGB", (128, 128), (side % 256, 0, 0))])
            assert torch.allclose(moments.float(), torch.cat(vae.moments(pixels)), atol=2e-3), filters


def test_images_are_not_enlarged_beyond_the_limit(tmp_path):
    wide = io.BytesIO()
    Image.new("RGB", (640, 128), "red").save(wide, "PNG")
    write_pairs(tmp_path / "wide", "a", picture=wide.getvalue())
    with pytest.raises(ValueError, match="enlarged more than 1.25 times for 256 pixels': 1"):
        load(tmp_path / "wide", 256, enlarge=1.25, ratios=("1.0",))  # wide enough, and too low
    write_pairs(tmp_path / "d", "a")  # 128 px
    assert len(load(tmp_path / "d", 256, enlarge=2.0).rows) == 1
    with pytest.raises(ValueError, match="enlarged more than 1.25 times for 256 pixels': 1"):
        load(tmp_path / "d", 256, enlarge=1.25)
    with pytest.raises(ValueError, match="enlarged more than 2 times for 512 pixels"):
        ImageData(str(tmp_path / "d"), 512, None, None, 0)


def test_pixels_are_between_minus_one_and_one():
    blue = Image.new("RGB", (48, 32), (0, 0, 255))
    assert to_pixels([blue])[0, :, 0, 0].tolist() == [-1, -1, 1]


def test_images_are_cut_to_the_ratios_that_a_stage_names(tmp_path, components):
    """Squares for a teacher that knows no other; beside the other shapes in one cache."""
    wide = io.BytesIO()
    Image.new("RGB", (256, 128), "red").save(wide, "PNG")
    write_pairs(tmp_path / "d", "a", picture=wide.getvalue())
    vae, text_encoder = components(tmp_path)
    of_filters = [(dict(ratios=("1.0",)), (128, 128)), ({}, (96, 176)), (dict(multiple=64), (64, 192))]
    for filters, size in of_filters:
        cache = str(tmp_path / "cache")
        data = load(tmp_path / "d", 128, vae, text_encoder, cache=cache, **filters)
        assert list(data.buckets) == [size] and data.picture(0)[1].size == size[::-1]
        batch = data.batch([0], [files.generator(0, "kd", 0, 0)])
        assert batch["z0"].shape[2:] == (size[0] // 8, size[1] // 8)


def test_a_substitute_has_its_own_caption(tmp_path, components):
    data = small(tmp_path, components)
    (k,) = [k for k in range(len(data.rows)) if "half" in data.caption(k)]
    (seen,), _ = data.moments_of([k])
    batch = data.batch([k], [files.generator(0, "kd", 0, 0)], drop=0.0)
    assert seen != k and torch.equal(batch["text"], data.text_of([data.caption_numbers[seen]])[0])


def test_parts_share_a_cache_without_being_mixed_up(tmp_path, components):
    cache = str(tmp_path / "cache")
    first = small(tmp_path, components, cache)
    vae, text_encoder = components(tmp_path)
    other = VAE(str(tmp_path / "vae"))
    with torch.no_grad():
        other.model.quant_conv.weight.mul_(2)
    other.model.save_pretrained(tmp_path / "other")
    data = load(tmp_path / "folder", 128, VAE(str(tmp_path / "other")), text_encoder, cache=cache)
    assert not torch.equal(data.moments_of([0])[1][0], first.moments_of([0])[1][0])
    assert torch.equal(data.text_of([1])[0], first.text_of([1])[0])
    assert len(list(pathlib.Path(cache).glob("captions-*"))) == 1
    assert len(list(pathlib.Path(cache).glob("128px-*"))) == 2
    with torch.no_grad():
        text_encoder.model.encoder.final_layer_norm.weight.mul_(2)
    text_encoder.model.save_pretrained(tmp_path / "t5")
    text_encoder.tokenizer.save_pretrained(tmp_path / "t5")
    data = load(tmp_path / "folder", 128, vae, TextEncoder(str(tmp_path / "t5")), cache=cache)
    assert not torch.equal(data.text_of([1])[0], first.text_of([1])[0])


def test_a_drive_that_fails_changes_no_cache(tmp_path, components, monkeypatch):
    """The run ends; the same command makes the cache that it would have made."""
    write_pairs(tmp_path / "d", "a", "b", "c")
    vae, text_encoder = components(tmp_path)
    read = index.Index.bytes_of

    def stale(index_of_d, k):
        if k == 1:
            raise OSError(116, "Stale file handle")
        return read(index_of_d, k)

    data = ImageData(str(tmp_path / "d"), 128, vae, text_encoder, 0, str(tmp_path / "cache"))
    monkeypatch.setattr(index.Index, "bytes_of", stale)
    with pytest.raises(OSError, match="Stale file handle"):
        data.fill_cache()
    monkeypatch.setattr(index.Index, "bytes_of", read)
    data.fill_cache()
    assert [data.moments_of([k])[0] for k in range(3)] == [[0], [1], [2]] and data.skipped == {}
    (tmp_path / "d" / "b.png").write_bytes(PNG[:50])
    with pytest.raises(OSError, match="b.png has become shorter since it was looked at"):
        data.picture(1)


def test_the_index_needs_no_locks_and_is_missed_where_it_is_not(tmp_path, monkeypatch):
    """Some network drives have no locks; nodes that share no working directory are told so."""
    write_pairs(tmp_path / "d", "a")
    path = str(tmp_path / "index.sqlite")
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN EXCLUSIVE")
        index.write_index(index.Source(str(tmp_path / "d")), "stamp", "looking", path)
    monkeypatch.setattr(files, "RANK", 1)
    with pytest.raises(ValueError, match="is not here: all nodes share the working directory"):
        load(tmp_path / "d")


def test_many_shards_are_opened_once_and_hold_no_file_open(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "SHARD", 2)
    packed = images.Packed(str(tmp_path), "captions", 200)
    for numbers in packed.missing():
        packed.write(numbers[0], [(k, torch.full((k + 1, 3), float(k))) for k in numbers])
    opened = []

    def noted_open(path):
        opened.append(path)
        return images.Packed.open(packed, path)

    monkeypatch.setattr(packed, "open", noted_open)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        for k in np.random.default_rng(0).permutation(200):
            seen, features = packed.get(int(k))
            assert seen == k and features.shape == (k + 1, 3) and (features == k).all()
    assert len(opened) == 100 and len(os.listdir("/proc/self/fd")) <= before
    monkeypatch.setattr(images, "OPEN", 10)
    packed.opened.clear()
    for k in range(200):
        assert packed.get(k)[0] == k and len(packed.opened) <= 10


def test_batches_are_the_same_from_several_threads(tmp_path, components):
    for cache in (None, str(tmp_path / "cache")):
        data = small(tmp_path, components, cache)

        def make(step, chosen, data=data):
            return data.batch(chosen, [files.generator(0, "kd", step, i) for i in range(2)])

        jobs = list(enumerate(itertools.islice(data.order(2, "kd"), 8)))
        expected = [make(*job) for job in jobs]
        for one, other in zip(images.ahead(make, jobs, steps=4, threads=4), expected, strict=True):
            assert all(torch.equal(one[name], other[name]) for name in one)


def test_ahead_computes_some_steps_ahead_in_order_and_raises_at_its_place():
    made = []

    def make(k):
        made.append(k)
        if k == 5:
            raise ZeroDivisionError
        time.sleep(0.02 if k % 2 else 0)
        return k

    found = []
    with pytest.raises(ZeroDivisionError):
        for value in images.ahead(make, ((k,) for k in itertools.count()), steps=3, threads=3):
            found.append(value)
            assert max(made) <= value + 4  # no further: batches are large
    assert found == [0, 1, 2, 3, 4]
    threads = threading.active_count()
    stream = images.ahead(make, ((k,) for k in itertools.count(10)), steps=2)
    assert next(stream) == 10
    deadline = time.time() + 10
    while 12 not in made and time.time() < deadline:
        time.sleep(0.01)
    assert 12 in made  # without being asked
    stream.close()
    assert threading.active_count() <= threads
    assert list(images.ahead(make, [(1,), (2,)], steps=3)) == [1, 2]


def test_looking_at_data(tmp_path, folder, capsys, monkeypatch):
    flags = ["--size", "128", "--enlarge", "4", "--out", str(tmp_path / "out")]
    flags += ["--text-encoder", str(tmp_path / "t5")]
    parts.new_tokenizer().save_pretrained(tmp_path / "t5")
    with open(folder / "metadata.jsonl", "a") as file:
        file.write(json.dumps({"file_name": "images/plain.png", "text": "a star " * 100}))
    monkeypatch.setattr("sys.argv", ["images.py", str(folder), *flags])
    images.main()
    said = capsys.readouterr().out
    assert said.startswith("10 images in 2 buckets of about 128 x 128 px:") and "6 skipped" in said
    assert "1 captions longer than 120 tokens are cut" in said
    assert Image.open(tmp_path / "out" / "data.png").size[0] == 6 * 192
    assert os.listdir(tmp_path / "out") == ["data.png"]
    assert "10 would be enlarged more than 1.25 times" in said
    monkeypatch.setattr("sys.argv", ["images.py", str(folder), *flags, "--enlarge", "1.7"])
    with pytest.raises(SystemExit, match="no usable image"):
        images.main()
    monkeypatch.setattr("sys.argv", ["images.py", str(tmp_path / "absent"), *flags])
    with pytest.raises(SystemExit, match="data.images: ValueError: .*absent is neither"):
        images.main()


def test_pictures_of_equal_names_in_two_folders_share_no_cache(tmp_path, components):
    moments = []
    texts = []
    for colour in ("red", "blue"):
        (tmp_path / colour).mkdir()
        Image.new("RGB", (128, 128), colour).save(tmp_path / colour / "a.bmp")
        (tmp_path / colour / "a.txt").write_text(f"a {colour} square")
        vae, text_encoder = components(tmp_path)
        data = load(tmp_path / colour, 128, vae, text_encoder, cache=str(tmp_path / "cache"))
        moments.append(data.moments_of([0])[1][0])
        texts.append(data.text_of([1])[0])  # 0 is the null caption
    assert not torch.equal(*moments)
    assert texts[0].shape == texts[1].shape and not torch.equal(*texts)


# -- files ---------------------------------------------------------------------------------------------------


def test_a_fingerprint_sees_one_byte_in_the_middle(tmp_path):
    content = bytearray(10**6)
    (tmp_path / "model.safetensors").write_bytes(content)
    before = files.fingerprint(str(tmp_path))
    content[500_000] = 1
    (tmp_path / "model.safetensors").write_bytes(content)
    assert files.fingerprint(str(tmp_path)) != before
    (tmp_path / "log.jsonl").write_text("what is no weight is no part of it")
    assert files.fingerprint(str(tmp_path)) == files.fingerprint(str(tmp_path) + "/")
    assert files.fingerprint("google/t5") == "google/t5"
    alone = files.fingerprint(str(tmp_path))
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text("{}")
    assert files.fingerprint(str(tmp_path)) != alone
    with mock.patch.object(hashlib, "file_digest", side_effect=AssertionError):  # nothing is read again
        files.fingerprint(str(tmp_path))


def test_a_fingerprint_of_a_part_sees_its_part_of_a_pipeline(tmp_path):
    for part in ("vae", "text_encoder", "tokenizer", "transformer"):
        (tmp_path / "pipeline" / part).mkdir(parents=True)
        (tmp_path / "pipeline" / part / "config.json").write_text(f'{{"a": "{part}"}}')
    pipeline = str(tmp_path / "pipeline")
    vae_before = files.fingerprint(pipeline, "vae")
    t5_before = files.fingerprint(pipeline, "text_encoder")
    assert vae_before == files.fingerprint(os.path.join(pipeline, "vae"), "vae")  # the same files, alone
    (tmp_path / "pipeline" / "transformer" / "config.json").write_text("{}")
    assert files.fingerprint(pipeline, "vae") == vae_before
    assert files.fingerprint(pipeline, "text_encoder") == t5_before
    (tmp_path / "pipeline" / "tokenizer" / "config.json").write_text("{}")
    assert files.fingerprint(pipeline, "vae") == vae_before
    assert files.fingerprint(pipeline, "text_encoder") != t5_before
    t5_before = files.fingerprint(pipeline, "text_encoder")
    (tmp_path / "pipeline" / "text_encoder" / "model.safetensors").write_bytes(b"1")
    assert files.fingerprint(pipeline, "text_encoder") != t5_before


def test_a_t5_whose_tokenizer_alone_has_a_folder_counts_whole(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    before = files.fingerprint(str(tmp_path), "text_encoder")
    (tmp_path / "model.safetensors").write_bytes(b"2")
    assert files.fingerprint(str(tmp_path), "text_encoder") != before


def test_files_are_written_whole_or_not_at_all(tmp_path):
    path = str(tmp_path / "new" / "a.png")
    files.write_png(path, Image.new("RGB", (90, 60)), prompt="é", seed=1)
    assert Image.open(path).text == {"prompt": "é", "seed": "1"}

    def half(temporary):
        with open(temporary, "w") as file:
            file.write("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        files.write_atomically(path, half)
    assert os.listdir(tmp_path / "new") == ["a.png"] and Image.open(path).size == (90, 60)
    with pytest.raises(ValueError, match="a.png/below is, or lies below, a file; give a folder"):
        files.write_text(f"{path}/below/b", "text")


def test_bytes_are_on_disk_before_the_name(tmp_path, monkeypatch):
    """A power cut after the rename leaves no empty file under the name."""
    done = []
    fsync = os.fsync
    replace = os.replace

    def noted_fsync(file):
        done.append("fsync")
        return fsync(file)

    def noted_replace(old, new):
        done.append("rename")
        return replace(old, new)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    files.write_text(tmp_path / "a", "text")
    assert done == ["fsync", "rename", "fsync"]


def test_a_folder_is_claimed_when_it_is_noted_not_when_it_is_checked(tmp_path):
    folder = str(tmp_path / "out")
    files.check_made_with(folder, dict(seed=0))
    assert not os.path.exists(folder)
    for _ in range(2):
        files.note_made_with(folder, dict(seed=0, sizes=(1, 2)))
        files.check_made_with(folder, dict(seed=0, sizes=(1, 2)))
    for other in (dict(seed=1, sizes=[1, 2]), dict(seed=0), dict(seed=0, sizes=[1, 2], extra=0)):
        for refuse in (files.check_made_with, files.note_made_with):
            with pytest.raises(
                ValueError, match=r"out was made with \w+ .*, not .*; give the same again, or an"
            ):
                refuse(folder, other)
    assert files.read_json(f"{folder}/made_with.json") == dict(seed=0, sizes=[1, 2])
    (tmp_path / "out" / "made_with.json").write_text("{")
    with pytest.raises(ValueError, match="made_with.json is not readable"):
        files.check_made_with(folder, dict(seed=0))


def test_waiting_for_files_has_a_week_and_a_step_half_an_hour(monkeypatch):
    calls = []

    def record(name, *args, **kwargs):
        calls.append((name, kwargs))
        return "a group"

    for name in ("init_process_group", "new_group", "barrier"):
        monkeypatch.setattr(files.dist, name, functools.partial(record, name))
    monkeypatch.setattr(files, "waiting_group", None)
    monkeypatch.setattr(files, "WORLD", 2)
    files.start_processes()
    with files.rank_zero_first():
        pass
    assert calls == [
        ("init_process_group", dict(timeout=datetime.timedelta(minutes=30))),
        ("new_group", dict(backend="gloo", timeout=datetime.timedelta(days=7))),
        ("barrier", dict(group="a group")),
    ]


def test_ranks_that_are_not_torchruns_are_said(monkeypatch, capsys):
    args = types.SimpleNamespace(debug=False)
    for variables, said in ((dict(RANK="1", WORLD_SIZE="2"), True), (dict(RANK="0", WORLD_SIZE="1"), False)):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert files.as_command("train.py", lambda args: "done", args) == "done"
        error = capsys.readouterr().err
        assert ("torchrun" in error) == said and error.count("\n") == said
    assert (files.RANK, files.WORLD) == (0, 1)


def test_a_folder_has_one_run_at_a_time(tmp_path):
    command = f"from data import files\nwith files.lock({str(tmp_path)!r}): print('in')"

    def enter():
        run = [sys.executable, "-c", command]
        return subprocess.run(run, capture_output=True, text=True, cwd=pathlib.Path(__file__).parents[1])

    with files.lock(str(tmp_path)):
        assert "ValueError" in enter().stderr
    assert enter().stdout == "in\n"


# -- the shapes world ----------------------------------------------------------------------------------------


def test_captions_follow_genevals_grammar():
    rng = np.random.default_rng(0)
    prompts = {}
    for tag in shapes.TAGS:
        prompts[tag] = {shapes.make_record(tag, rng)["prompt"] for _ in range(4000)}
    assert "a photo of three crosses" in prompts["counting"]
    assert "a photo of a star and a cross" in prompts["two_object"]
    assert [len(prompts[tag]) for tag in shapes.TAGS] == [4, 12, 12, 24, 48, 360]
    record = shapes.make_record("position", rng)
    first, second = record["include"]
    assert record["prompt"] == f"a photo of a {second['class']} {second['position'][0]} a {first['class']}"


def contradictions(record):
    """Records that no picture of this one shows: another class, count or colour, or the opposite position."""
    *others, last = record["include"]
    changes = {
        "class": next(shape for shape in shapes.SHAPES if shape not in record["prompt"]),
        "count": last["count"] + 1,
        "color": next(colour for colour in shapes.COLOURS if colour not in record["prompt"]),
        "position": [parts.OPPOSITE[last.get("position", ["none"])[0]], 0],
    }
    return [{"include": [*others, {**last, key: changes[key]}]} for key in last]


@pytest.mark.parametrize("tag, size", [*[(tag, 128) for tag in shapes.TAGS], ("position", (256, 192))])
def test_the_detector_is_right_on_ground_truth(tag, size):
    rng = np.random.default_rng(1)
    right = []
    refused = []
    for _ in range(50):
        record = shapes.make_record(tag, rng)
        objects = shapes.detect_shapes(shapes.draw_shapes(record, size, rng))
        right.append(shapes.score_objects(objects, record))
        refused += [not shapes.score_objects(objects, wrong) for wrong in contradictions(record)]
    assert np.mean(right) >= 0.99
    assert np.mean(refused) >= 0.99


def test_the_detector_is_strict():
    record = {"include": [{"class": "circle", "count": 1}]}
    picture = shapes.draw_shapes(record, 128, np.random.default_rng(0))
    assert shapes.score_shapes(picture, record)
    pixels = np.asarray(picture, float)
    noise = np.random.default_rng(0).normal(0, 60, pixels.shape)
    extra = picture.copy()
    extra.paste((220, 50, 47), (2, 2, 10, 10))
    shaded = pixels.copy()
    background = (pixels == shapes.BACKGROUND).all(axis=2)
    shaded[::2][background[::2]] = (210, 210, 205)  # too faint for an object, too dark for the background
    two = {"include": [*record["include"], {"class": "star", "count": 1}]}
    x0, y0, x1, y1 = shapes.detect_shapes(picture)[0][2]
    half = picture.copy()
    blue = Image.new("RGB", (128, 128), shapes.COLOURS["blue"])
    lower = Image.fromarray(np.uint8(~background) * 255)
    lower.paste(0, (0, 0, 128, (y0 + y1) // 2))
    half.paste(blue, (0, 0), lower)
    cut = picture.copy()
    cut.paste(shapes.BACKGROUND, (0, (y0 + y1) // 2, 128, 128))
    box = picture.crop((x0 - 2, y0 - 2, x1 + 2, y1 + 2))
    flat = Image.new("RGB", (128, 128), shapes.BACKGROUND)
    flat.paste(box.resize((box.width, box.height // 2), Image.BOX), (x0, y0))
    ring = picture.copy()
    margin = (x1 - x0) // 5
    hole = (x0 + margin, y0 + margin, x1 - margin, y1 - margin)
    ImageDraw.Draw(ring).ellipse(hole, fill=shapes.BACKGROUND)
    speck = picture.copy()
    speck.paste((220, 50, 47), (2, 2, 6, 6))
    wrong = {
        "blurred": picture.resize((12, 12), Image.BOX).resize((128, 128), Image.BICUBIC),
        "noisy": Image.fromarray(np.uint8(np.clip(pixels + noise, 0, 255))),
        "dark": Image.fromarray(np.uint8(pixels * 0.7)),
        "with a speck too many": extra,
        "with a small speck too many": speck,
        "of two colours": half,
        "cut off": cut,
        "a ring": ring,
        "an ellipse": flat,
        "with an object too many": shapes.draw_shapes(two, 128, np.random.default_rng(0)),
        "with an uneven background": Image.fromarray(np.uint8(shaded)),
        "empty": Image.new("RGB", (128, 128), shapes.BACKGROUND),
    }
    for name, image in wrong.items():
        assert not shapes.score_shapes(image, record), name
    three = shapes.draw_shapes({"include": [{"class": "circle", "count": 3}]}, 128, np.random.default_rng(0))
    for count in (2, 3, 4):
        asked = {"include": [{"class": "circle", "count": count}]}
        assert shapes.score_shapes(three, asked) == (count == 3)


def test_a_picture_is_the_same_scene_at_every_size():
    record = {"include": [{"class": "star", "count": 1}, {"class": "cross", "count": 1}]}
    small = shapes.draw_shapes(record, 128, np.random.default_rng(5))
    large = shapes.draw_shapes(record, 512, np.random.default_rng(5))
    assert np.abs(np.asarray(large.reduce(4), float) - np.asarray(small, float)).mean() < 2


def outline_of(image):
    return shapes.outline_overlap(image, shapes.detect_shapes(image))


@pytest.mark.parametrize("shape", ["circle", "star"])  # enlarged, the others stay rectangles
def test_the_outline_score_tells_a_clean_outline_from_an_enlarged_one(shape):
    """At the picture's own size: one of 128 px that is enlarged to 1024 is worse than one drawn there."""
    record = {"include": [{"class": shape, "count": 1}]}
    clean = shapes.draw_shapes(record, 1024, np.random.default_rng(2))
    small = shapes.draw_shapes(record, 128, np.random.default_rng(2))
    enlarged = small.resize((1024, 1024), Image.NEAREST)
    assert outline_of(clean) > 0.985
    assert outline_of(enlarged) < outline_of(clean) - 0.01


def test_the_outline_score_sees_corners_on_a_circle():
    scores = {}
    for corners in (8, 12, 360):
        image = Image.new("RGB", (512, 512), shapes.BACKGROUND)
        angles = 2 * np.pi * np.arange(corners) / corners
        points = [(256 + 90 * np.cos(angle), 256 + 90 * np.sin(angle)) for angle in angles]
        ImageDraw.Draw(image).polygon(points, fill=shapes.COLOURS["green"])
        assert shapes.detect_shapes(image)[0][:2] == ("circle", "green")
        scores[corners] = outline_of(image)
    assert scores[8] < 0.94 < scores[12] < 0.97 < 0.98 < scores[360]


def test_the_outline_score_is_the_mean_over_objects_wherever_they_are():
    """An object in the picture's corner counts as any other; a picture without clean objects has no score."""
    image = Image.new("RGB", (640, 512), shapes.BACKGROUND)
    canvas = ImageDraw.Draw(image)
    canvas.rectangle((0, 0, 119, 119), fill=shapes.COLOURS["blue"])
    assert outline_of(image) == 1.0
    canvas.rectangle((200, 200, 319, 319), fill=shapes.COLOURS["yellow"])
    canvas.rectangle((200, 200, 219, 259), fill=shapes.BACKGROUND)  # a bite of a twelfth
    assert outline_of(image) == pytest.approx((1 + 11 / 12) / 2, abs=0.002)
    assert outline_of(Image.new("RGB", (128, 128), shapes.BACKGROUND)) is None
    assert outline_of(Image.effect_noise((128, 128), 200)) is None


def test_heldout_captions_are_never_trained_on():
    records = shapes.heldout_records(552, 0)
    assert [record["tag"] for record in records] == 92 * list(shapes.TAGS)
    held = {record["prompt"] for record in records if record["tag"] in shapes.COMBINING}
    rng = np.random.default_rng(0)
    trained = {shapes.training_record(rng)["prompt"] for _ in range(5000)}
    assert len(held) > 40 and not held & trained
    pairs = {record["prompt"] for record in records if record["tag"] == "two_object"}
    # The shipped models have never read these.
    assert pairs == {"a photo of a circle and a star", "a photo of a star and a square"}


def test_every_word_of_the_world_is_a_token():
    tokenizer = parts.new_tokenizer()
    rng = np.random.default_rng(0)
    for tag in shapes.TAGS * 20:
        prompt = shapes.make_record(tag, rng)["prompt"]
        tokens = tokenizer(prompt).input_ids
        assert len(tokens) == len(prompt.split()) + 1  # and the end
        assert tokenizer.decode(tokens, skip_special_tokens=True) == prompt
    assert tokenizer.unk_token_id not in tokenizer("zebra, 7?").input_ids


def test_a_word_is_asked_about_its_own_object():
    cross = {"class": "cross", "count": 1}
    star = {"class": "star", "count": 1, "position": ["above", 0]}
    labels = parts.word_labels({"prompt": "a photo of a star above a cross", "include": [cross, star]})
    assert labels[4] == [2, 0, 1, 3]  # "star": a star, no colour, one, above
    assert labels[7] == [3, 0, 1, 4]  # "cross": a cross, no colour, one, below
    assert all(label == [-100] * 4 for k, label in enumerate(labels) if k not in (4, 7))


def test_the_world_is_an_ordinary_data_set(tmp_path, monkeypatch):
    """Several processes write the same bytes as one; what is missing is drawn again; the rest is kept."""
    source = shapes.write_shards(str(tmp_path / "one"), 32, 1100, 0)
    jobs_done = []

    def here(write, jobs):
        for job in jobs:
            jobs_done.append(job[0])
            yield write(*job)

    monkeypatch.setattr(shapes, "in_processes", here)
    assert shapes.write_shards(str(tmp_path / "two"), 32, 1100, 0) == source.replace("one", "two")
    for name in ("00000.tar", "00001.tar"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    os.remove(tmp_path / "two" / "00000.tar")
    jobs_done.clear()
    shapes.write_shards(str(tmp_path / "two"), 32, 1100, 0)
    assert jobs_done == [str(tmp_path / "two" / "00000.tar")]
    with pytest.raises(ValueError, match="two was made with seed 0, not 1"):
        shapes.write_shards(str(tmp_path / "two"), 32, 1100, 1)
    rng = np.random.default_rng([0, 32, 1099])
    record = shapes.training_record(rng)
    with tarfile.open(tmp_path / "two" / "00001.tar") as tar:
        assert tar.extractfile("00001099.txt").read().decode() == record["prompt"]
        png = Image.open(tar.extractfile("00001099.png"))
        assert png.tobytes() == shapes.draw_shapes(record, 32, rng).tobytes()


def test_pictures_of_several_shapes_stay_whole(tmp_path):
    """Each has the size of its bucket already, so that nothing is cut off when it is read."""
    ratios = ("1.0", "0.78", "1.29", "0.57", "1.75")
    for pixels in (128, 256, 512):
        source = shapes.write_shards(str(tmp_path / str(pixels)), pixels, 5, 0, ratios)
        data = load(source, pixels)
        assert len(data.buckets) == 5
        for number in range(5):
            _, picture = data.picture(number)
            record = json.loads(read_member(source.replace("*", "00000"), f"{number:08}.json"))
            assert shapes.score_shapes(picture, record)


def read_member(path, name):
    with tarfile.open(path) as tar:
        return tar.extractfile(name).read()


def test_a_trained_vae_has_latents_of_unit_size(tmp_path, monkeypatch):
    """Its latents are standardised, which changes no reconstruction; the folder appears once it is done."""
    rng = np.random.default_rng(9)
    pictures = to_pixels([shapes.draw_shapes(shapes.training_record(rng), 128, rng) for _ in range(32)])
    rebuilt = []
    signal_to_noise = []
    standardise = parts.standardise

    def watched(vae, seed):
        for change in (lambda: None, lambda: standardise(vae, seed)):
            change()
            with torch.no_grad():
                posterior = vae.encode(pictures[:4]).latent_dist
                rebuilt.append(vae.decode(posterior.mean).sample)
            signal_to_noise.append(posterior.mean.std((0, 2, 3)) / posterior.std.mean((0, 2, 3)))

    monkeypatch.setattr(parts, "standardise", watched)
    parts.train_part("vae_adapt", 0, str(tmp_path / "vae"), steps=3)
    assert os.listdir(tmp_path) == ["vae"]
    assert (rebuilt[0] - rebuilt[1]).abs().max() < 1e-4 < rebuilt[0].std()
    assert torch.allclose(*signal_to_noise, rtol=1e-3)  # the deviation is scaled as the mean is
    vae = VAE(str(tmp_path / "vae"))
    assert (vae.factor, vae.model.config.scaling_factor) == (8, 0.5)
    mean = vae.model.encode(pictures).latent_dist.mean
    assert mean.mean((0, 2, 3)).abs().max() < 0.3
    assert (mean.std((0, 2, 3)) - 1).abs().max() < 0.3


def test_the_vaes_loss_holds_three_channels_to_colours():
    vae = parts.new_vae()
    losses = []
    for basis in (torch.eye(3), torch.zeros(3, 3)):
        torch.manual_seed(0)
        losses.append(parts.vae_loss(vae, basis, np.random.default_rng(0)).item())
    rng = np.random.default_rng(0)
    pictures = to_pixels([parts.crowded_picture(rng) for _ in range(16)])
    colours = torch.nn.functional.avg_pool2d(pictures, 8)
    with torch.no_grad():
        latents = vae.encode(pictures).latent_dist.mean[:, :3]
    expected = (latents - colours).square().mean() - latents.square().mean()
    assert losses[0] - losses[1] == pytest.approx(expected.item(), rel=1e-3)


def test_a_text_encoder_learns(tmp_path, monkeypatch, capfd):
    """Its loss falls, and the same seed gives the same losses."""
    losses = []
    text_loss = parts.text_loss

    def watched(*args):
        losses.append(text_loss(*args))
        return losses[-1]

    monkeypatch.setattr(parts, "text_loss", watched)
    word_labels = mock.Mock(side_effect=parts.word_labels)
    monkeypatch.setattr(parts, "word_labels", word_labels)
    for folder in ("one", "two"):
        parts.train_part("text_encoder", 0, str(tmp_path / folder), steps=30)
    read = [call.args[0] for call in word_labels.call_args_list]
    assert len(read) == 2 * 30 * 128 and not any(shapes.held_out(record) for record in read)
    assert losses[29] < 0.7 * losses[0] and losses[:30] == losses[30:]
    assert capfd.readouterr().err.count("text_encoder:") <= 6  # in a log file no bar is drawn at every step
    features, mask = TextEncoder(str(tmp_path / "one"))(["a photo of a red star"])
    assert features.shape == (1, 7, 64) and mask.all()
