"""What must hold of captioned images (found, seen, batched, cached), of files, of the shapes world."""

import collections
import concurrent.futures
import errno
import gzip
import hashlib
import io
import itertools
import json
import os
import pathlib
import struct
import subprocess
import sys
import tarfile
import zlib

import numpy as np
import pytest
import torch
from diffusers.image_processor import PixArtImageProcessor
from PIL import Image, ImageCms

from data import files, images, index, parts, shapes
from data.images import ImageData, to_pixels, to_rgb
from t2md import VAE, TextEncoder

PNG = io.BytesIO()
Image.new("RGB", (128, 128), "red").save(PNG, "PNG")
PNG = PNG.getvalue()


@pytest.fixture(autouse=True)
def single_process(monkeypatch):
    def starmap(function, jobs, what):
        return (function(*job) for job in jobs)

    monkeypatch.setattr(index, "in_processes", starmap)


def load(source, pixels=128, vae=None, text_encoder=None, folder="index", cache=None, seed=0):
    """folder: beside the source, whichever it is."""
    folder = os.path.join(os.path.dirname(index.canonical(str(source))), folder)
    return ImageData(str(source), pixels, vae, text_encoder, seed, folder, cache)


def prompts_of(data):
    return [data.caption(k) for k in range(len(data.rows))]


# -- what is found -------------------------------------------------------------------------------------------


def write_images(folder):
    """A small imagefolder with every kind of trouble; the usable ones are red at the left edge, upright."""
    pixels = np.full((60, 90, 3), 255, np.uint8)
    pixels[:, :30] = (200, 30, 30)
    image = Image.fromarray(pixels)
    rotated, grey16 = Image.Exif(), np.full((60, 90), 60000, np.uint16)
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
    heights, widths = np.random.default_rng(0).integers(20, 5000, (2, 1000))
    table, classify = images.aspect_ratios(pixels), PixArtImageProcessor.classify_height_width_bin
    expected = [classify(int(h), int(w), table) for h, w in zip(heights, widths)]
    assert list(map(tuple, images.nearest_buckets(heights, widths, pixels).tolist())) == expected


def png_of(width, height):
    """A valid PNG of one white pixel whose header claims width x height."""
    buffer = io.BytesIO()
    Image.new("L", (1, 1), 255).save(buffer, "PNG")
    header = b"IHDR" + struct.pack(">II", width, height) + buffer.getvalue()[24:29]
    return buffer.getvalue()[:12] + header + struct.pack(">I", zlib.crc32(header)) + buffer.getvalue()[33:]


def write_tar(path, *members):
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
    of_folder, of_shards = load(folder), load(tmp_path / "shard-*.tar")
    assert of_folder.skipped == {
        "not readable as an image (FileNotFoundError)": 1,
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
    folder, outside = tmp_path / "folder", tmp_path / "outside.png"
    folder.mkdir()
    for path, content in {"good": PNG, "point": png_of(1, 1), "giant": png_of(30_000, 30_000)}.items():
        (folder / f"{path}.png").write_bytes(content)
    outside.write_bytes(PNG)
    names = "good.png point.png giant.png ../outside.png loop.png".split() + [str(outside)]
    (folder / "loop.png").symlink_to(folder / "loop.png")
    lines = [json.dumps({"file_name": name, "text": "a star"}).encode() for name in names]
    lines.append('{"file_name": "good.png", "text": "\u00e9toile"}'.encode("latin-1"))
    (folder / "metadata.jsonl").write_bytes(b"\n".join(lines))
    data = load(folder)
    assert prompts_of(data) == ["a star"]
    assert data.skipped == {
        "too small to be enlarged to about 128 pixels": 1,
        "not readable as an image (DecompressionBombError)": 1,
        "a file outside the folder": 2,
        "not readable as an image (OSError)": 1,
        "a caption that is empty, or no text": 1,
    }
    with pytest.raises(ValueError, match="no usable image.*too small"):
        load(folder, 1024)
    with pytest.raises(ValueError, match="neither a folder nor a pattern"):
        load(tmp_path / "nothing")
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match="looked for metadata.jsonl or .csv, tar shards, or images"):
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


# -- how it looks --------------------------------------------------------------------------------------------


def test_header_picture_and_person_agree(tmp_path):
    """A picture, red above and white below, wherever the file keeps how it is turned."""
    pixels = np.full((80, 40, 3), 255, np.uint8)
    pixels[:40] = (255, 0, 0)
    exif, stored = Image.Exif(), Image.fromarray(pixels).rotate(90, expand=True)
    exif[274] = 6
    for suffix in ("jpg", "png", "webp", "tif", "avif"):
        stored.save(tmp_path / f"{suffix}.{suffix}", exif=exif)
    for path in sorted(tmp_path.iterdir()):
        path.with_suffix(".txt").write_text(path.name)
    data = load(tmp_path, 64, folder="../index")
    assert len(data.rows) == 5 and not data.skipped
    for k, name in enumerate(prompts_of(data)):
        picture = np.asarray(data.picture(k)[1], int)
        assert data.index.images[k, :2].tolist() == [80, 40] and picture.shape[0] > picture.shape[1], name
        assert abs(picture[2] - (255, 0, 0)).max() < 60 and picture[-2].min() > 240, name


def test_colours_are_srgb_whatever_the_mode():
    red = Image.new("RGB", (8, 8), "red")
    swapped = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    first, second = swapped.index(b"rXYZ"), swapped.index(b"gXYZ")  # of the table: what is red there is green
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
    floats, sixteen = np.full((2, 8, 8), 0.5, np.float32), np.full((8, 8), 32768, np.uint16)
    for array in (floats[0], floats[1] * 255, sixteen, sixteen.astype(np.int32)):
        assert to_rgb(Image.fromarray(array)).getpixel((0, 0)) == (127, 127, 127)
    assert to_rgb(Image.new("1", (8, 8), 1)).getpixel((0, 0)) == (255, 255, 255)


# -- batches -------------------------------------------------------------------------------------------------


def test_every_image_comes_once_an_epoch_whoever_takes_it():
    data, bucket_of = object.__new__(ImageData), np.repeat(range(3), (50, 13, 1))
    data.seed, data.buckets = 0, {bucket: np.flatnonzero(bucket_of == bucket) for bucket in range(3)}

    def batches():
        return list(itertools.islice(data.order(4), 64))  # 4 epochs of 64 images

    found = batches()
    assert all(len(set(bucket_of[batch])) == 1 for batch in found)
    assert collections.Counter(np.ravel(found).tolist()) == dict.fromkeys(range(64), 4)
    first = np.ravel(found[: 50 // 4 + 13 // 4])  # none twice, none left out but what is carried over
    assert len(set(first.tolist())) == len(first) == 60
    assert found[:15] != sorted(found[:15]) and found[:15] != found[16:31]
    assert found == batches()  # of any process, after any restart
    data.seed = 1
    assert found != batches()


def test_timesteps_outside_are_drawn_again(tmp_path, components):
    data = small(tmp_path, components)
    generators = [files.generator(0, "kd", 0, i) for i in range(400)]
    data.moments_of = lambda numbers: (numbers, torch.zeros(400, 2, 1, 1, 1))
    t = data.batch([0] * 400, generators, timesteps=(950, 100))["t"]
    assert t.dtype == torch.long and 0 <= t.min() and t.max() < 1000 and (t == 999).float().mean() < 0.03


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
    return load(tmp_path / "folder", 128, *components(tmp_path), cache=cache)


def test_the_index_is_made_once_and_again_when_the_data_set_has_changed(folder, monkeypatch):
    before, list_images = load(folder), index.list_images
    monkeypatch.setattr(index, "list_images", None)
    again = load(folder)
    assert prompts_of(again) == prompts_of(before) and again.skipped == before.skipped
    monkeypatch.setattr(index, "list_images", list_images)
    with open(folder / "metadata.jsonl", "a") as file:
        file.write('{"file_name": "images/plain.png", "text": "one more"}\n')
    assert prompts_of(load(folder)) == [*prompts_of(before), "one more"]
    for path in (folder.parent / "index").iterdir():
        path.write_bytes(path.read_bytes()[:100] + b"damage" * 1000)
    with pytest.raises(ValueError, match="index-.*sqlite is damaged"):
        load(folder)


def test_an_index_of_many_images_is_quick_and_read_by_any_thread(tmp_path, monkeypatch):
    count = 50_000
    rows = [(b"%d.tar" % (k // 1000), k, 9, 128 + k % 2, 128, f"caption {k % 777}") for k in range(count)]
    pieces = [(rows[k : k + 1000],) for k in range(0, count, 1000)]
    monkeypatch.setattr(index, "list_images", lambda piece: (piece, {}))
    monkeypatch.setattr(index, "find_pieces", lambda source: (pieces, []))
    data = load(tmp_path / "many")
    assert len(data.rows) == count and data.index.count == 778 and data.index.images.nbytes == 12 * count
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(data.caption, range(4 * 777))) == [f"caption {k % 777}" for k in range(4 * 777)]


def test_batches_with_and_without_a_cache_are_the_same(tmp_path, components, monkeypatch):
    monkeypatch.setattr(images, "SHARD", 3)
    uncached = small(tmp_path, components)
    cached = small(tmp_path, components, str(tmp_path / "features"))
    assert cached.vae is cached.text_encoder is None

    def generators(turn):
        return [files.generator(0, "kd", turn, i) for i in range(2)]

    for turn, chosen in enumerate(itertools.islice(cached.order(2), 6)):
        with torch.autocast("cpu", torch.bfloat16):  # the frozen parts run outside it
            a, b = (data.batch(chosen, generators(turn)) for data in (cached, uncached))
        for name in ("noise", "t", "mask"):
            assert torch.equal(a[name], b[name]), name
        inside = b["mask"].bool()
        for one, other in ((a["z0"], b["z0"]), (a["text"][inside], b["text"][inside])):
            assert one.dtype == other.dtype == torch.float32
            assert torch.allclose(one, other, rtol=2e-3, atol=2e-3)


def test_the_cache_goes_on_where_it_was_cut_off_and_opens_few_files(tmp_path, components, monkeypatch):
    monkeypatch.setattr(images, "SHARD", 3)
    features = tmp_path / "features"
    data = small(tmp_path, components, str(features))
    assert data.skipped["not decodable (OSError)"] == 1
    made = hashes(features)
    assert len(made) == 4 + 3 + 1  # of 11 captions, of 9 images, and made_with.json
    for path in sorted(path for path in made if path.suffix == ".safetensors")[::2]:
        path.unlink()
    data = small(tmp_path, components, str(features))
    assert hashes(features) == made
    assert data.open_shard.cache_info().currsize == 0 and data.open_shard.cache_info().maxsize <= 100
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="broken.safetensors is damaged"):
        data.open_shard(str(broken))
    load(tmp_path / "folder", 64, *components(tmp_path), cache=str(features))  # sizes share a folder
    assert made.items() < hashes(features).items()
    vae, text_encoder = components(tmp_path)
    vae.source = text_encoder.source
    with pytest.raises(ValueError, match="features was made with vae"):
        load(tmp_path / "folder", 128, vae, text_encoder, cache=str(features))


def test_looking_at_data(tmp_path, folder, capsys, monkeypatch):
    flags = ["--size", "128", "--out", str(tmp_path / "out"), "--text-encoder", str(tmp_path / "t5")]
    parts.new_tokenizer().save_pretrained(tmp_path / "t5")
    with open(folder / "metadata.jsonl", "a") as file:
        file.write(json.dumps({"file_name": "images/plain.png", "text": "a star " * 100}))
    monkeypatch.setattr("sys.argv", ["images.py", str(folder), *flags])
    images.main()
    said = capsys.readouterr().out
    assert said.startswith("10 images in 2 buckets of about 128 x 128 px:") and "6 skipped" in said
    assert "1 captions longer than 120 tokens are cut" in said
    assert Image.open(tmp_path / "out" / "data.png").size[0] == 6 * 192
    monkeypatch.setattr("sys.argv", ["images.py", str(tmp_path / "absent"), *flags])
    with pytest.raises(SystemExit, match="data.images: ValueError: .*absent is neither"):
        images.main()


def test_pictures_of_equal_names_in_two_folders_share_no_cache(tmp_path, components):
    moments = []
    for colour in ("red", "blue"):
        (tmp_path / colour).mkdir()
        Image.new("RGB", (128, 128), colour).save(tmp_path / colour / "a.bmp")
        (tmp_path / colour / "a.txt").write_text("a square")
        data = load(tmp_path / colour, 128, *components(tmp_path), cache=str(tmp_path / "cache"))
        moments.append(data.moments_of([0])[1][0])
    assert not torch.equal(*moments)


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


def test_files_are_written_whole_or_not_at_all_and_without_hard_links(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links here")))
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


def test_a_folder_is_claimed_whole(tmp_path):
    for _ in range(2):
        files.claim(str(tmp_path), dict(seed=0, sizes=(1, 2)))
    for other in (dict(seed=1, sizes=[1, 2]), dict(seed=0), dict(seed=0, sizes=[1, 2], extra=0)):
        with pytest.raises(ValueError, match=r"was made with \w+ .*, not .*; give the same again"):
            files.claim(str(tmp_path), other)


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
    prompts = {tag: {shapes.make_record(tag, rng)["prompt"] for _ in range(4000)} for tag in shapes.TAGS}
    assert {"a photo of three crosses", "a photo of a star and a cross"} < set.union(*prompts.values())
    assert [len(prompts[tag]) for tag in shapes.TAGS] == [4, 12, 12, 24, 48, 360]
    first, second = (record := shapes.make_record("position", rng))["include"]
    assert record["prompt"] == "a photo of a {class} {position[0]} a ".format(**second) + first["class"]


def contradictions(record):
    """Records that no picture of this one shows: another count, class or colour, or the opposite position."""
    *others, last = record["include"]
    names = shapes.SHAPES, shapes.COLOURS
    shape, colour = (next(x for x in words if x not in record["prompt"]) for words in names)
    opposite = parts.OPPOSITE[last.get("position", ["none"])[0]]
    changes = {"class": shape, "count": last["count"] + 1, "color": colour, "position": [opposite, 0]}
    return [{"include": [*others, last | {key: changes[key]}]} for key in last]


@pytest.mark.parametrize("tag, size", [*zip(shapes.TAGS, itertools.repeat(128)), ("position", (256, 192))])
def test_the_detector_is_right_on_ground_truth(tag, size, monkeypatch):
    rng = np.random.default_rng(1)
    records = [shapes.make_record(tag, rng) for _ in range(50)]
    pictures = [shapes.draw_shapes(record, size, rng) for record in records]
    seen = {id(picture): shapes.detect_shapes(picture) for picture in pictures}  # once is enough
    monkeypatch.setattr(shapes, "detect_shapes", lambda picture: seen[id(picture)])
    assert np.mean([shapes.score_shapes(p, r) for p, r in zip(pictures, records)]) >= 0.99
    wrong = [(picture, w) for picture, record in zip(pictures, records) for w in contradictions(record)]
    assert np.mean([not shapes.score_shapes(picture, w) for picture, w in wrong]) >= 0.99


def test_the_detector_is_strict():
    record = {"include": [{"class": "circle", "count": 1}]}
    picture = shapes.draw_shapes(record, 128, np.random.default_rng(0))
    assert shapes.score_shapes(picture, record)
    pixels, noise = np.asarray(picture, float), np.random.default_rng(0).normal(0, 60, (128, 128, 3))
    blurred = picture.resize((12, 12), Image.BOX).resize((128, 128), Image.BICUBIC)
    noisy, grey = (Image.fromarray(np.uint8(np.clip(p, 0, 255))) for p in (pixels + noise, pixels * 0.7))
    extra = picture.copy()
    extra.paste((220, 50, 47), (2, 2, 10, 10))
    for wrong in (blurred, noisy, extra, grey, Image.new("RGB", (128, 128), shapes.BACKGROUND)):
        assert not shapes.score_shapes(wrong, record)


def test_a_picture_is_the_same_scene_at_every_size():
    record = {"include": [{"class": "star", "count": 1}, {"class": "cross", "count": 1}]}
    small, large = (shapes.draw_shapes(record, size, np.random.default_rng(5)) for size in (128, 512))
    assert np.abs(np.asarray(large.reduce(4), float) - np.asarray(small, float)).mean() < 2


def test_heldout_captions_are_never_trained_on():
    records, rng = shapes.heldout_records(552, 0), np.random.default_rng(0)
    assert [r["tag"] for r in records] == 92 * list(shapes.TAGS)
    held = {r["prompt"] for r in records if r["tag"] in shapes.COMBINING}
    assert len(held) > 40 and not held & {shapes.training_record(rng)["prompt"] for _ in range(5000)}


def test_every_word_of_the_world_is_a_token():
    tokenizer, rng = parts.new_tokenizer(), np.random.default_rng(0)
    for tag in shapes.TAGS * 20:
        prompt = shapes.make_record(tag, rng)["prompt"]
        assert len(tokenizer(prompt).input_ids) == len(prompt.split()) + 1
        assert tokenizer.decode(tokenizer(prompt).input_ids, skip_special_tokens=True) == prompt
    assert tokenizer.unk_token_id not in tokenizer("zebra, 7?").input_ids
    cross, star = {"class": "cross", "count": 1}, {"class": "star", "count": 1, "position": ["above", 0]}
    labels = parts.word_labels({"prompt": "a photo of a star above a cross", "include": [cross, star]})
    assert labels[4::3] == [[2, 0, 1, 3], [3, 0, 1, 4]] and set(map(tuple, labels[:4])) == {(-100,) * 4}


def test_the_world_is_an_ordinary_data_set(tmp_path, monkeypatch):
    made, source = [], shapes.write_shards(str(tmp_path / "one"), 32, 1100, 0)  # by several processes
    monkeypatch.setattr(shapes, "in_processes", lambda write, jobs, _: itertools.starmap(write, jobs))
    shapes.write_shards(str(tmp_path / "two"), 32, 1100, 0)
    for name in ("00000.tar", "00001.tar"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    os.remove(tmp_path / "two" / "00000.tar")
    monkeypatch.setattr(shapes, "in_processes", lambda _, jobs, what: [made.append(job[0]) for job in jobs])
    assert shapes.write_shards(str(tmp_path / "two"), 32, 1100, 0) == source.replace("one", "two")
    assert made == [str(tmp_path / "two" / "00000.tar")]
    with pytest.raises(ValueError, match="two was made with seed 0, not 1"):
        shapes.write_shards(str(tmp_path / "two"), 32, 1100, 1)
    record = shapes.training_record(rng := np.random.default_rng([0, 32, 1099]))
    with tarfile.open(tmp_path / "two" / "00001.tar") as tar:
        assert tar.extractfile("00001099.txt").read().decode() == record["prompt"]
        png = Image.open(tar.extractfile("00001099.png"))
        assert png.tobytes() == shapes.draw_shapes(record, 32, rng).tobytes()


def test_pictures_of_several_shapes_stay_whole(tmp_path):
    ratios = ("1.0", "0.78", "1.29", "0.57", "1.75")
    for pixels in (128, 256, 512):
        data = load(shapes.write_shards(str(tmp_path / str(pixels)), pixels, 5, 0, ratios), pixels)
        assert len(data.buckets) == 5 and (data.sizes == data.index.images[:, :2]).all()


def test_a_trained_vae_has_latents_of_unit_size(tmp_path):
    parts.train_part("vae_adapt", 0, str(tmp_path / "vae"), steps=3)
    vae, rng = VAE(str(tmp_path / "vae")), np.random.default_rng(9)
    assert os.listdir(tmp_path) == ["vae"] and (vae.factor, vae.model.config.scaling_factor) == (8, 0.5)
    pictures = [shapes.draw_shapes(shapes.training_record(rng), 128, rng) for _ in range(32)]
    mean = vae.model.encode(to_pixels(pictures)).latent_dist.mean
    assert mean.mean((0, 2, 3)).abs().max() < 0.3 and (mean.std((0, 2, 3)) - 1).abs().max() < 0.3


def test_a_text_encoder_learns(tmp_path, monkeypatch, capfd):
    losses, text_loss = [], parts.text_loss
    monkeypatch.setattr(parts, "text_loss", lambda *args: losses.append(text_loss(*args)) or losses[-1])
    for folder in ("one", "two"):
        parts.train_part("text_encoder", 0, str(tmp_path / folder), steps=30)
    assert losses[29] < 0.7 * losses[0] and losses[:30] == losses[30:]
    assert capfd.readouterr().err.count("text_encoder:") <= 6  # in a log file no bar is drawn at every step
    features, mask = TextEncoder(str(tmp_path / "one"))(["a photo of a red star"])
    assert features.shape == (1, 7, 64) and mask.all()
