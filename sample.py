"""Sample images from a T2MD checkpoint (or any diffusers PixArt folder), at any size.

    python sample.py "a photo of a red circle and a blue square"          # the shipped student, base size
    python sample.py "a photo of a star" --size 2048                      # far above the trained size
    python sample.py "prompt" --size 3840x2160 --n 4 --seed 7 --steps 20 --guidance 4.5 --negative "..."
    python sample.py --prompts evaluation_metadata.jsonl --n 4 --out DIR  # GenEval's folder layout

Sections: 1 loading - 2 the sampler - 3 files - 4 command line.
"""

import argparse
import json
import os
import re
import sys

import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from t2md import T2MD, VAE, TextEncoder, predict_noise

HERE = os.path.dirname(os.path.abspath(__file__))
SHIPPED = os.path.join(HERE, "assets", "student")

# ----------------------------------------------------------------------------------------------------------
# 1. Loading
# ----------------------------------------------------------------------------------------------------------


def load_denoiser(path_or_repo, device="cpu", dtype=torch.float32, **overrides):
    """A T2MD checkpoint folder, or the PixArt transformer of a diffusers folder or repository -> frozen T2MD.

    overrides replace entries of its config, e.g. pos_embed="centered".
    Raises FileNotFoundError if there is none or it is half-written, ValueError if its config does not fit.
    """
    if os.path.isdir(os.path.dirname(path_or_repo) or ".") and not os.path.isdir(path_or_repo) and path_or_repo.count("/") != 1:
        raise FileNotFoundError(f"there is no model folder {path_or_repo!r}")
    model = T2MD.from_pixart(path_or_repo, **overrides)
    return model.to(device, dtype).eval().requires_grad_(False)


def component_path(checkpoint, reference):
    """Where a checkpoint's VAE or text encoder is: a folder relative to the checkpoint's own, or a repository.

    A plain PixArt pipeline names none: its parts are in the pipeline itself.
    """
    if reference is None:
        return checkpoint
    beside = os.path.normpath(os.path.join(checkpoint, reference))
    return beside if os.path.isdir(beside) else reference


# ----------------------------------------------------------------------------------------------------------
# 2. The sampler
# ----------------------------------------------------------------------------------------------------------


def make_scheduler(beta_schedule):
    """diffusers' DPM-Solver++ (2M) on the 1000-step noise schedule that the model was trained with."""
    return DPMSolverMultistepScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=2e-2, beta_schedule=beta_schedule)


def size_conditions(model, height, width, batch):
    """PixArt-1024's conditions for pixels height x width, or none."""
    if not model.conditioned_on_size:
        return {}
    like = dict(device=model.device, dtype=model.dtype)
    return dict(resolution=torch.tensor([[height, width]] * batch, **like), aspect_ratio=torch.tensor([[height / width]] * batch, **like))


@torch.no_grad()
def denoise(model, text, negative, latents, steps=20, guidance=4.5, pixels_per_latent=8, progress=False):
    """Noise -> latents, by DPM-Solver++ with classifier-free guidance; equals diffusers' PixArtAlphaPipeline.

    Args:
        text, negative: (features, mask) of the captions and of the unconditional branch, B rows each.
        latents: standard normal noise (B, C, h, w).  guidance: 1 or less runs the conditional branch alone.
    """
    scheduler = make_scheduler(model.config.beta_schedule)
    scheduler.set_timesteps(steps)
    batch, _, h, w = latents.shape
    if guidance > 1:
        # 1. one batch for both branches, padded to the same number of tokens
        pad = max(text[0].shape[1], negative[0].shape[1])
        stretch = lambda x: torch.cat([x, x.new_zeros(x.shape[0], pad - x.shape[1], *x.shape[2:])], dim=1)
        text = [torch.cat([stretch(n), stretch(t)]) for n, t in zip(negative, text)]
    features, mask = text[0].to(model.device, model.dtype), text[1].to(model.device)
    conditions = size_conditions(model, h * pixels_per_latent, w * pixels_per_latent, len(features))
    latents = latents.to(model.device, model.dtype)
    for t in tqdm(scheduler.timesteps, desc="denoising", disable=not progress):
        # 2. predict the noise, 3. push it away from the unconditional prediction, 4. one solver step
        z_t = torch.cat([latents, latents]) if guidance > 1 else latents
        noise = predict_noise(model, z_t, t, features, mask, **conditions)
        if guidance > 1:
            unconditional, conditional = noise.chunk(2)
            noise = unconditional + guidance * (conditional - unconditional)
        latents = scheduler.step(noise, t, latents, return_dict=False)[0]
    return latents


def noise_for(seed, channels, h, w):
    """The initial noise (1, channels, h, w) of one image: a function of its seed alone, drawn on the CPU."""
    return torch.randn(1, channels, h, w, generator=torch.Generator().manual_seed(seed))


def to_images(pixels):
    """(B, 3, h, w) in [-1, 1] -> list of PIL images."""
    return [Image.fromarray(p) for p in ((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()]


def generate(model, vae, text_encoder, prompts, size, seeds, steps=20, guidance=4.5, negative="", progress=False):
    """Prompts and seeds (one each per image) -> PIL images of size (width, height) in pixels."""
    w, h = size[0] // vae.factor, size[1] // vae.factor
    latents = torch.cat([noise_for(seed, vae.channels, h, w) for seed in seeds])
    text, unconditional = text_encoder(prompts), text_encoder([negative] * len(prompts))
    return to_images(vae.decode(denoise(model, text, unconditional, latents, steps, guidance, vae.factor, progress)))
