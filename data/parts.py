"""The shapes world's VAE and T5: small ones of the real classes, trained from nothing in minutes on a CPU."""

import os
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw
from torch.nn.utils.rnn import pad_sequence
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from data import shapes
from data.images import to_pixels
from data.index import progress
from data.shapes import COLOURS, NUMBERS, PLURAL, POSITIONS, SHAPES


def new_vae():
    """AutoencoderKL, 8x down to 4 channels like SD1.5's and SDXL's, 0.9M parameters."""
    down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    others = dict(norm_num_groups=8, sample_size=128, mid_block_add_attention=False)
    return AutoencoderKL(3, 3, down, up, (16, 32, 64, 64), **others)


def crowded_picture(rng):
    """A crop of 64 px for the VAE: one to three shapes of usual sizes anywhere, overlapping, cut off."""
    image = Image.new("RGB", (256, 256), shapes.BACKGROUND)
    for x, y in 256 * rng.uniform(-0.1, 1.1, (rng.integers(1, 4), 2)):
        shape, colour = rng.choice(SHAPES), COLOURS[str(rng.choice(list(COLOURS)))]
        shapes.draw_object(ImageDraw.Draw(image), shape, colour, x, y, 512 * rng.uniform(0.11, 0.25))
    return image.reduce(4)


def vae_loss(vae, basis, rng):
    """L1 + 1e-4 KL on crowded pictures, and three latent channels held to the mean colour of their 8x8
    pixels, in a colour basis (3, 3) that each VAE draws for itself: else the encoder lines all colours up
    along one direction, close to each other, and the denoiser picks another for every part of an object."""
    images = to_pixels([crowded_picture(rng) for _ in range(16)])
    posterior = vae.encode(images).latent_dist
    mean, variance = posterior.mean, posterior.var  # (B, 4, 8, 8)
    l1 = F.l1_loss(vae.decode(posterior.sample()).sample, images)
    kl = 0.5 * (mean**2 + variance - 1 - variance.log()).mean()
    colour = F.mse_loss(mean[:, :3], torch.einsum("ck,bkhw->bchw", basis, F.avg_pool2d(images, 8)))
    return l1 + 1e-4 * kl + colour


@torch.no_grad()
def standardise(vae, seed):
    """Fold each latent channel's mean and standard deviation into the VAE's 1x1 convolutions, so that latents
    are N(0, 1)-like, as a diffusion model wants them. Changes no reconstruction."""
    generators = [np.random.default_rng([seed, 2, k]) for k in range(256)]
    images = to_pixels([shapes.draw_shapes(shapes.training_record(rng), 128, rng) for rng in generators])
    means = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in images.split(32)])
    mean, std = means.mean((0, 2, 3)), means.std((0, 2, 3))
    into, out = vae.quant_conv, vae.post_quant_conv  # rows of `into`: means, then log variances
    out.bias += (out.weight[:, :, 0, 0] * mean).sum(1)
    out.weight *= std[None, :, None, None]
    into.weight[:4] /= std[:, None, None, None]
    into.bias[:4] = (into.bias[:4] - mean) / std
    into.bias[4:] -= 2 * std.log()


def new_tokenizer():
    """T5's tokenizer class with the world's words as pieces; any other word is spelled letter by letter."""
    grammar = "a an photo of and left right above below".split()
    words = [*grammar, *NUMBERS, *COLOURS, *SHAPES, *PLURAL.values()]
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?'\"()-"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -8.0)]
    pieces += [("▁" + word, -4.0) for word in words] + [(letter, -9.0) for letter in letters]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def new_text_encoder(vocabulary):
    shape = dict(d_model=64, d_kv=16, num_heads=4, d_ff=128, num_layers=2, feed_forward_proj="gated-gelu")
    return T5EncoderModel(T5Config(vocab_size=vocabulary, dropout_rate=0.0, **shape))


QUESTIONS = dict(shape=SHAPES, colour=("none", *COLOURS), number=NUMBERS, place=("none", *POSITIONS))
OPPOSITE = dict(zip(("none", *POSITIONS), ("none", "right of", "left of", "below", "above")))


def word_labels(record):
    """What each word of a caption says of the object it belongs to, class indices (words, 4); -100: nothing.

    "a photo of a red circle and a blue square": both "red" and "circle" say (circle, red, one, no place).
    """
    *first, last = record["include"]
    where = last.get("position", ["none"])[0]
    places, labels = [*(OPPOSITE[where] for _ in first), where], []
    for word in record["prompt"].split():
        labels.append([-100] * 4)
        for o, place in zip(record["include"], places):
            if word in (o["class"], PLURAL[o["class"]], o.get("color"), NUMBERS[o["count"]]):
                said = o["class"], o.get("color", "none"), NUMBERS[o["count"]], place
                labels[-1] = [options.index(answer) for options, answer in zip(QUESTIONS.values(), said)]
    return labels


def text_loss(encoder, heads, tokenizer, rng):
    """Each word, one token, is asked for the shape, colour, number and place of the object it belongs to: the
    cross-entropies of four linear heads, summed. Like the real T5 the encoder has then read captions before
    it sees a picture, and its tokens carry which colour and which place is whose."""
    records = [shapes.training_record(rng) for _ in range(128)]
    tokens = tokenizer([r["prompt"] for r in records], padding="longest", return_tensors="pt")
    labels = pad_sequence([torch.tensor(word_labels(r)) for r in records], True, -100)  # (B, words, 4)
    features = encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state[:, :-1]
    return sum(F.cross_entropy(head(features).mT, labels[..., k]) for k, head in enumerate(heads))


def train_part(name, seed, folder, steps=None):
    """Train a VAE or text encoder and write it, in its library's format, into `folder` once it is done.
    name: vae, text_encoder, or of the stage adapt, which swaps both, vae_adapt, text_encoder_adapt."""
    is_vae = name.startswith("vae")
    steps = steps or (2500 if is_vae else 1500)
    decay = 0.5 if is_vae else 0.4  # share of the steps, the last ones
    rng, tokenizer = np.random.default_rng([seed, zlib.crc32(name.encode())]), new_tokenizer()
    torch.manual_seed(int(rng.integers(2**63)))
    basis, _ = torch.linalg.qr(torch.randn(3, 3))
    model = new_vae() if is_vae else new_text_encoder(len(tokenizer))
    heads = [] if is_vae else [torch.nn.Linear(model.config.d_model, len(a)) for a in QUESTIONS.values()]
    parameters = list(torch.nn.ModuleList([model, *heads]).parameters())
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0.0)
    for step in (bar := progress(range(steps), desc=name)):
        loss = vae_loss(model, basis, rng) if is_vae else text_loss(model, heads, tokenizer, rng)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, (step + 1) / 50, (steps - step) / (decay * steps))
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.4g}", refresh=False)
    temporary = folder.rstrip("/") + ".tmp"
    if is_vae:
        standardise(model, seed)
        # at 1.0 shapes of 512 px would show at the last step of the quadratic schedule
        model.register_to_config(scaling_factor=0.5 if name == "vae_adapt" else 1.0)
    else:
        tokenizer.save_pretrained(temporary)
    model.save_pretrained(temporary)
    os.replace(temporary, folder)
