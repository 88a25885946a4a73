"""The shapes world's VAE and T5, small ones of the real classes, trained from nothing."""

import copy
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from data.images import to_pixels
from data.shapes import (
    BACKGROUND,
    COLOURS,
    NUMBERS,
    POSITIONS,
    SHAPES,
    draw_object,
    draw_shapes,
    plural,
    training_record,
)
from sample import draw, numpy_draw


def new_vae():
    """AutoencoderKL, 8x down to 4 channels like SD1.5's and SDXL's, 0.9M parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=128,
        mid_block_add_attention=False,
    )


def crowded_picture(rng, size=64):
    """A crop for the VAE: one to three shapes of the usual sizes anywhere, overlapping, beyond the edge."""
    image = Image.new("RGB", (4 * size, 4 * size), BACKGROUND)
    for _ in range(rng.integers(1, 4)):
        x, y = rng.uniform(-0.1, 1.1) * 4 * size, rng.uniform(-0.1, 1.1) * 4 * size
        r = rng.uniform(0.11, 0.25) * 4 * 128
        shape, colour = str(rng.choice(SHAPES)), COLOURS[str(rng.choice(list(COLOURS)))]
        draw_object(ImageDraw.Draw(image), shape, colour, x, y, r)
    return image.reduce(4)


def vae_loss(vae, stage, step, indices, seed):
    """L1 + 1e-4 KL on crowded pictures, and three latent channels held to the mean colour of their 8x8
    pixels, in a colour basis that each VAE draws for itself -> loss, terms.

    The last term is for the denoiser's sake: without it the encoder lines all colours up along one direction,
    close to each other, and every part of an object picks its own.
    """
    images = to_pixels([crowded_picture(numpy_draw(seed, stage, step, i)) for i in indices])
    posterior = vae.encode(images).latent_dist
    generators = [draw(seed, stage, step, i) for i in indices]
    noise = torch.stack([torch.randn(posterior.mean.shape[1:], generator=g) for g in generators])
    reconstruction = vae.decode(posterior.mean + posterior.std * noise).sample
    mean, variance = posterior.mean.float(), posterior.var.float()
    basis, _ = torch.linalg.qr(torch.randn(3, 3, generator=draw(seed, stage, 0, -1)))
    thumbnail = torch.einsum("ck,bkhw->bchw", basis, F.avg_pool2d(images, 8))
    terms = dict(
        l1=(reconstruction.float() - images).abs().mean(),
        kl=0.5 * (mean**2 + variance - 1 - variance.log()).mean(),
        colour=F.mse_loss(mean[:, :3], thumbnail),
    )
    return terms["l1"] + 1e-4 * terms["kl"] + terms["colour"], terms


@torch.no_grad()
def standardise(vae, seed):
    """Fold each latent channel's mean and standard deviation into the VAE's 1x1 convolutions, so that latents
    are N(0, 1)-like with scaling_factor 1, as a diffusion model wants them. Changes no reconstruction."""
    draws = [np.random.default_rng([seed, 2, k]) for k in range(256)]
    images = to_pixels([draw_shapes(training_record(rng), 128, rng) for rng in draws])
    means = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in images.split(32)])
    mean, std = means.mean((0, 2, 3)), means.std((0, 2, 3))
    into, out = vae.quant_conv, vae.post_quant_conv  # rows of `into`: means, then log variances
    out.bias += (out.weight[:, :, 0, 0] * mean).sum(1)
    out.weight *= std[None, :, None, None]
    into.weight[:4] /= std[:, None, None, None]
    into.bias[:4] = (into.bias[:4] - mean) / std
    into.bias[4:] -= 2 * std.log()
    vae.register_to_config(scaling_factor=1.0)


def new_tokenizer():
    """T5's tokenizer class with the world's words as pieces; any other word is spelled letter by letter."""
    words = "a an photo of and left right above below".split()
    words += [*NUMBERS, *COLOURS, *SHAPES, *map(plural, SHAPES)]
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?'\"()-"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -8.0)]
    pieces += [("▁" + word, -4.0) for word in words] + [(letter, -9.0) for letter in letters]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def new_text_encoder(vocabulary):
    shape = dict(d_model=64, d_kv=16, num_heads=4, d_ff=128, num_layers=2, feed_forward_proj="gated-gelu")
    return T5EncoderModel(T5Config(vocab_size=vocabulary, dropout_rate=0.0, **shape))


WORD_HEADS = dict(shape=SHAPES, colour=("none", *COLOURS), number=NUMBERS, place=("none", *POSITIONS))
OPPOSITE = dict(zip(("none", *POSITIONS), ("none", "right of", "left of", "below", "above")))


def word_labels(prompt):
    """What each word of a caption says of the object it belongs to, class indices (words, 4); -100: nothing.

    "a photo of a red circle and a blue square": both "red" and "circle" say (circle, red, one, no place).
    """
    words = prompt.split()
    nouns = {plural(shape): shape for shape in SHAPES} | {shape: shape for shape in SHAPES}
    labels = [[-100] * 4 for _ in words]
    where = next((p for p in POSITIONS if f" {p} " in prompt), "none")
    begin = 3  # after "a photo of"
    for i, word in enumerate(words):
        if word in nouns:
            phrase = words[begin : i + 1]
            colour = next((w for w in phrase if w in COLOURS), "none")
            number = next((w for w in phrase if w in NUMBERS), "one")
            says = (nouns[word], colour, number, where)
            label = [answers.index(answer) for answers, answer in zip(WORD_HEADS.values(), says)]
            for j in range(i - (colour != "none" or number != "one"), i + 1):
                labels[j] = label
            begin, where = i + 1, OPPOSITE[where]  # the second object is on the other side of the first
    return labels


class Reader(torch.nn.Module):
    """T5 encoder with a linear head per question, for its own training: each word is asked for the shape,
    colour, number and place of the object it belongs to. Like the real T5 it has read captions before it sees
    a picture, so its tokens carry which colour and which place is whose."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        width = encoder.config.d_model
        self.heads = torch.nn.ModuleList(torch.nn.Linear(width, len(c)) for c in WORD_HEADS.values())


def reader_loss(reader, tokenizer, stage, step, indices, seed):
    """Mean cross-entropy of the four questions -> loss, terms. Every word of the world is one token."""
    prompts = [training_record(numpy_draw(seed, stage, step, i))["prompt"] for i in indices]
    tokens = tokenizer(prompts, padding="longest", return_tensors="pt")
    labels = torch.full((*tokens.input_ids.shape, 4), -100)
    for row, prompt in zip(labels, prompts):
        words = torch.tensor(word_labels(prompt))
        row[: len(words)] = words
    features = reader.encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    terms = {}
    for k, (name, head) in enumerate(zip(WORD_HEADS, reader.heads)):
        terms[name] = F.cross_entropy(head(features).flatten(0, 1), labels[..., k].flatten())
    return sum(terms.values()), terms


def train_part(name, seed, fit, save):
    """Train a VAE or text encoder of the shapes world and write it in diffusers' or transformers' format.

    name: vae, text_encoder, vae_adapt or text_encoder_adapt.
    fit: fit(network, loss_terms, export) trains; see `train.fit`.  save: save(model, folder).
    """
    torch.manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    tokenizer = new_tokenizer()
    is_vae = name.startswith("vae")
    network = new_vae() if is_vae else Reader(new_text_encoder(len(tokenizer)))

    def loss_terms(step, indices, backward):
        if is_vae:
            loss, terms = vae_loss(network, name, step, indices, seed)
        else:
            loss, terms = reader_loss(network, tokenizer, name, step, indices, seed)
        backward(loss)
        return terms

    def export(folder):
        if not is_vae:
            save(network.encoder, folder)
            tokenizer.save_pretrained(folder)
            return
        vae = copy.deepcopy(network)
        standardise(vae, seed)
        if name == "vae_adapt":  # or at 512 px shapes would show at the last step of the quadratic schedule
            vae.register_to_config(scaling_factor=0.5)
        save(vae, folder)

    fit(network, loss_terms, export)
