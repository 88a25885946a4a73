"""T2MD: Diffusion Transformer-to-Mamba Distillation (Yao et al.), model and losses in one file.

The method in six lines. A diffusion transformer (the teacher, PixArt-alpha) predicts the noise in a latent
image. The student is the same backbone in which most self-attention layers are replaced by bidirectional
Mamba-2 layers, whose cost is linear in the number of image tokens. First each Mamba layer alone learns to
imitate the attention layer it replaces, fed with the teacher's activations (forcing); then all token mixers
learn together from the teacher's noise and features (kd); then the whole student is adapted to a new
positional embedding, VAE and text encoder and fine-tuned at ever higher resolution (train.py).

Every network here predicts the noise epsilon. Every squared norm is a MEAN over elements.

Glossary                 code                    paper / Mamba-2
  noisy latent           hidden_states, z_t      z_t                (B, C, H*p, W*p), p = patch_size
  tokens                 h                       h                  (B, L, d), L = H*W, row by row
  caption features       encoder_hidden_states   tau                (B, T, caption_width)
  teacher, student       teacher, student        theta', theta
  mixer n                blocks[n].mixer         SA^(n) or MA^(n)
  state size             d_state                 N
  head width, heads      head_dim, n_heads       P, H
  decay, step            A, dt                   A, Delta

Sections: 1 frozen components (VAE, TextEncoder) - 2 positional embeddings - 3 the state space recurrence
(ssd_recurrence, ssd) - 4 token mixers - 5 the backbone (T2MD) - 6 losses, equations 6 to 11 - 7 weights from
a teacher - 8 how the scan is made fast. The first six are the method.
"""

import glob
import importlib
import importlib.util
import inspect
import json
import math
import os
import sys
import types
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, PixArtTransformer2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import nn
from transformers import AutoTokenizer, T5EncoderModel

# ---------------------------------------------------------------------------------------------------
# 1. Frozen components
# ---------------------------------------------------------------------------------------------------


class VAE:
    """A frozen AutoencoderKL (SD1.5's, SDXL's or a small one), in the latent units the denoiser works in.

    Agrees with diffusers' pipelines: latents are multiplied by the VAE's own `scaling_factor` (and shifted
    by its `shift_factor` where it has one); neither is a literal here. Never runs in autocast.

    Args:
        path_or_repo: a folder or repository with the VAE, or a whole pipeline that has one under `vae/`.
    Attributes: factor: image pixels per latent pixel, along one side.  channels: latent channels.
        source: path_or_repo.
    Raises OSError if there is no VAE at `path_or_repo`, ValueError if it is not readable.
    """

    def __init__(self, path_or_repo, device="cpu", dtype=torch.float32):
        self.source = path_or_repo
        self.model = load_part(AutoencoderKL, path_or_repo, "vae", torch_dtype=dtype)
        self.model = self.model.to(device).eval().requires_grad_(False)
        config = self.model.config
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.channels = config.latent_channels
        self.scale, self.shift = config.scaling_factor, config.shift_factor or 0.0
        try:  # much of a config is only asked when it runs
            self.decode(torch.zeros(1, self.channels, 2, 2))
        except Exception as error:
            raise ValueError(f"the VAE in {path_or_repo} is of no use: {error}") from error

    def in_tiles(self, tile, side):
        """Encode or decode next in tiles of `tile` pixels if the longer `side` exceeds it (None: never)."""
        self.model.use_tiling = tile is not None and side > tile
        if self.model.use_tiling:
            self.model.tile_sample_min_size, self.model.tile_latent_min_size = tile, tile // self.factor
        return torch.autocast(self.model.device.type, enabled=False)

    @torch.no_grad()
    def moments(self, images, tile=None):
        """Images in [-1, 1], (B, 3, h, w) -> mean and standard deviation of q(z|x), each (B, C, h/f, w/f)."""
        with self.in_tiles(tile, max(images.shape[-2:])):
            q = self.model.encode(images.to(self.model.device, self.model.dtype)).latent_dist
        return (q.mean.float() - self.shift) * self.scale, q.std.float() * self.scale

    @torch.no_grad()
    def decode(self, latents, tile=1024):
        """Latents (B, C, h/f, w/f) -> images in [-1, 1], (B, 3, h, w).

        A side longer than `tile` pixels is decoded in overlapping, blended tiles (diffusers' tiled decode),
        so that memory does not grow with the image; smaller tiles leave seams in flat skies.
        """
        latents = (latents / self.scale + self.shift).to(self.model.device, self.model.dtype)
        with self.in_tiles(tile, max(latents.shape[-2:]) * self.factor):
            return self.model.decode(latents).sample.float().clamp(-1, 1)


class TextEncoder:
    """A frozen T5 encoder with its tokenizer. Captions are lower-cased and stripped, as diffusers does.

    Args:
        path_or_repo: a folder or repository with both, or a pipeline with `text_encoder/` and `tokenizer/`.
        max_length: tokens kept of a caption (PixArt-alpha: 120); what is longer is truncated, and said.
    Attributes: source: path_or_repo.  width: of the features.
    Raises OSError if there is no T5 encoder or tokenizer at `path_or_repo`, ValueError if it is not readable.
    """

    def __init__(self, path_or_repo, max_length=120, device="cpu", dtype=torch.float32):
        self.source = path_or_repo
        self.tokenizer = load_part(AutoTokenizer, path_or_repo, "tokenizer")
        self.model = load_part(T5EncoderModel, path_or_repo, "text_encoder", dtype=dtype)
        self.model = self.model.to(device).eval().requires_grad_(False)
        self.max_length, self.width = max_length, self.model.config.d_model
        try:
            self([""])
            if max(self.tokenizer.get_vocab().values(), default=0) >= self.model.config.vocab_size:
                raise ValueError("it has tokens that the text encoder does not know")
        except Exception as error:
            raise ValueError(f"the tokenizer in {path_or_repo} is of no use: {error}") from error

    @torch.no_grad()
    def __call__(self, captions):
        """List of B captions -> features (B, T, width) and mask (B, T), 1 for a token, T <= max_length.

        T is the longest caption's length: what pads it to 120 in diffusers' pipeline is masked there anyway.
        """
        captions = [caption.lower().strip() for caption in captions]
        tokenize = partial(self.tokenizer, captions, return_tensors="pt", padding="longest")
        tokens = tokenize(truncation=False)
        length = tokens.input_ids.shape[1]
        if length > self.max_length:
            taken = f"the {self.max_length} the text encoder takes"
            print(f"a prompt of {length} tokens was truncated to {taken}", file=sys.stderr)
            tokens = tokenize(truncation=True, max_length=self.max_length)
        tokens = tokens.to(self.model.device)
        with torch.autocast(self.model.device.type, enabled=False):
            features = self.model(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        return features, tokens.attention_mask


# ---------------------------------------------------------------------------------------------------
# 2. Positional embeddings: 2-D sine-cosine, half the channels for x, half for y
# ---------------------------------------------------------------------------------------------------


def sincos(positions, channels):
    """Positions (n,) -> (n, channels): sines then cosines at frequencies 10000^(-2k/channels)."""
    frequencies = 10000 ** (-torch.arange(channels // 2, dtype=torch.float64) / (channels / 2))
    angles = torch.outer(positions.double().cpu(), frequencies)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def grid_embedding(y, x, width):
    """Coordinates y (H,) and x (W,) -> embedding (H*W, width), row by row; x takes the first half."""
    H, W = len(y), len(x)
    ex = sincos(x, width // 2)[None].expand(H, W, -1)
    ey = sincos(y, width // 2)[:, None].expand(H, W, -1)
    return torch.cat([ex, ey], dim=-1).reshape(H * W, width)


def pixart_coordinates(H, W, base, interpolation_scale):
    """The teacher's index grid: an axis of n tokens runs from 0 towards base / interpolation_scale.

    Must agree with diffusers' `PatchEmbed`. base is the token side of the trained resolution.
    """

    def axis(n):
        return torch.arange(n, dtype=torch.float32) / (n / base) / interpolation_scale

    return axis(H), axis(W)


def centered_coordinates(H, W, base, interpolation_scale):
    """The student's embedding after adaptation: token i of n sits at (i - (n-1)/2) / max(H, W), centred.

    The long edge spans the same interval at any size, so a larger image is a denser sampling of known
    coordinates: this is what zero-shot 4K rests on. The factor base / interpolation_scale (our choice)
    gives neighbours at the trained resolution the distance that they had for the teacher.
    """

    def axis(n):
        return (torch.arange(n, dtype=torch.float64) - (n - 1) / 2) / max(H, W) * base / interpolation_scale

    return axis(H), axis(W)


COORDINATES = {"pixart": pixart_coordinates, "centered": centered_coordinates}


@lru_cache(maxsize=16)
def position_embedding(kind, H, W, width, base, interpolation_scale, device, dtype):
    """(H*W, width); depends on the grid only, so it is computed once per size and never stored."""
    y, x = COORDINATES[kind](H, W, base, interpolation_scale)
    return grid_embedding(y, x, width).float().to(device, dtype)


def sinusoid(values, channels=256):
    """Times (B,) -> (B, channels): cosines then sines, as diffusers' `Timesteps(flip_sin_to_cos=True)`."""
    k = torch.arange(channels // 2, device=values.device)
    frequencies = torch.exp(-math.log(10000) * k / (channels // 2))
    angles = values[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


# ---------------------------------------------------------------------------------------------------
# 3. The state space recurrence
# ---------------------------------------------------------------------------------------------------


def ssd_recurrence(x, dt, A, B, C, D=None):
    """The definition, token by token (equation 4 in Mamba-2's form, head by head):

        state_t = exp(dt_t A) state_{t-1} + dt_t B_t x_t^T        state: (n, p)
        y_t     = C_t^T state_t + D x_t

    x (b, l, h, p), dt (b, l, h) positive, A (h,) negative, B and C (b, l, g, n) with h a multiple of g,
    D (h,) -> y (b, l, h, p). Head k uses group k // (h / g).
    """
    b, l, h, p = x.shape
    B, C = (m.repeat_interleave(h // m.shape[2], dim=2) for m in (B, C))  # (b, l, h, n)
    state = x.new_zeros(b, h, B.shape[-1], p)
    y = []
    for t in range(l):
        decay = (dt[:, t] * A).exp()[..., None, None]
        state = decay * state + (dt[:, t, :, None] * B[:, t])[..., None] * x[:, t, :, None]
        y.append((C[:, t, :, None] @ state).squeeze(2))
    y = torch.stack(y, dim=1)
    return y if D is None else y + D[:, None] * x


def ssd(x, dt, A, B, C, chunk_size, D=None):
    """The same map in chunks: state space duality. Shapes and argument order of mamba-ssm's
    `mamba_chunk_scan_combined`; equals `ssd_recurrence`, in value and gradient.

    Write s_i for the running sum of dt A inside a chunk and u_j = dt_j x_j. Unrolled from a chunk's start,

        y_i = sum_{j <= i} (C_i . B_j) exp(s_i - s_j) u_j  +  exp(s_i) C_i^T state_in
        state_out = exp(s_last) state_in + sum_j exp(s_last - s_j) B_j u_j^T

    so inside a chunk it is causal attention without a softmax, (G * L) u with G = C B^T (one for all heads
    of a group) and L_ij = exp(s_i - s_j), and between chunks a short recurrence, which unrolls to a matrix
    like L in its turn. Every exponent is <= 0, so strong decay underflows to zero and nothing overflows.
    Decay sums and states are kept in float32 (or float64), whatever the dtype of x. Section 8 computes it.
    """
    precise, g = torch.promote_types(x.dtype, torch.float32), B.shape[2]

    def by_group(v, dim):
        return None if v is None else v.unflatten(dim, (g, -1))

    x, dt, A, D = by_group(x, 2), by_group(dt.to(precise), 2), by_group(A.to(precise), 0), by_group(D, 0)
    return ChunkScan.apply(x, dt, A, B, C, D, chunk_size, chunks_at_once(x, B, chunk_size)).flatten(2, 3)


# ---------------------------------------------------------------------------------------------------
# 4. Token mixers
# ---------------------------------------------------------------------------------------------------


def precise(x):
    """A tensor in float32, or in float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class GatedRMSNorm(nn.Module):
    """RMSNorm(y * SiLU(z)) with a learned weight, in float32, by group; mamba-ssm's `RMSNormGated`."""

    def __init__(self, width, groups=1, eps=1e-5):
        super().__init__()
        self.weight, self.groups, self.eps = nn.Parameter(torch.ones(width)), groups, eps

    def forward(self, y, z):
        v = (precise(y) * F.silu(precise(z))).unflatten(-1, (self.groups, -1))
        v = (v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + self.eps)).flatten(-2)
        return v.to(y.dtype) * self.weight.to(y.dtype)


# Parameters that stay float32: rounded, they would change every decay of a long sequence
ALWAYS_FLOAT32 = ("A_log", "dt_bias")


class Mamba2(nn.Module):
    """The Mamba-2 layer over a sequence, u (b, l, d) -> (b, l, d), causal.

    Parameter names and shapes are those of mamba-ssm's `Mamba2` and transformers' `Mamba2Mixer`, so that
    weights move between them unchanged.

    Args: width d; d_state N; expand (inner width / d); head_dim P; d_conv; n_groups; chunk_size
        of mamba-ssm's kernels.
    Raises ValueError if the inner width is no multiple of head_dim or the heads no multiple of n_groups.
    """

    def __init__(self, width, d_state=256, expand=2, head_dim=64, d_conv=4, n_groups=1, chunk_size=256):
        super().__init__()
        inner = expand * width
        if inner % head_dim or (inner // head_dim) % n_groups:
            heads = f"whole heads of {head_dim}, a multiple of n_groups = {n_groups}"
            raise ValueError(f"expand * width = {inner} must be {heads}")
        self.d_state, self.head_dim, self.n_groups, self.chunk_size = d_state, head_dim, n_groups, chunk_size
        self.n_heads = inner // head_dim
        conv_width = inner + 2 * n_groups * d_state
        self.split_sizes = [inner, conv_width, self.n_heads]  # z | x B C | dt
        self.in_proj = nn.Linear(width, sum(self.split_sizes), bias=False)
        self.conv1d = nn.Conv1d(conv_width, conv_width, d_conv, groups=conv_width, padding=d_conv - 1)
        self.dt_bias = nn.Parameter(torch.empty(self.n_heads))
        self.A_log = nn.Parameter(torch.empty(self.n_heads))
        self.D = nn.Parameter(torch.empty(self.n_heads))
        self.norm = GatedRMSNorm(inner, n_groups)
        self.out_proj = nn.Linear(inner, width, bias=False)
        self.reset_recurrence()

    @torch.no_grad()
    def reset_recurrence(self, dt_min=1e-3, dt_max=0.1, A_range=(1, 16)):
        """mamba-ssm's initialisation: step log-uniform in [dt_min, dt_max], A uniform in A_range, D one."""
        dt = torch.exp(torch.rand(self.n_heads) * (math.log(dt_max) - math.log(dt_min)) + math.log(dt_min))
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
        self.A_log.copy_(torch.empty(self.n_heads).uniform_(*A_range).log())
        self.D.fill_(1.0)

    def convolve(self, xBC):
        """The causal depthwise conv1d over xBC (b, l, conv_width), channels last in memory."""
        conv, l = self.conv1d, xBC.shape[1]
        if xBC.is_cuda:  # a sum of shifted products, of which torch.compile makes one pass over memory
            padded = F.pad(xBC, (0, 0, *conv.padding, 0))
            taps = (w * padded[:, k : k + l] for k, w in enumerate(conv.weight[:, 0].unbind(1)))
            return sum(taps, conv.bias).to(xBC.dtype)
        return CausalConv.apply(xBC, conv.weight[:, 0].to(xBC.dtype), conv.bias.to(xBC.dtype))

    def scan(self, xBC, dt):
        """Convolution, recurrence: xBC (b, l, conv_width), dt (b, l, n_heads) -> y (b, l, inner)."""
        b, l, _ = xBC.shape
        states = self.n_groups * self.d_state
        sizes = [self.n_heads * self.head_dim, states, states]
        x, B, C = F.silu(self.convolve(xBC)).split(sizes, dim=-1)
        dt = F.softplus(precise(dt) + precise(self.dt_bias))
        A = -precise(self.A_log).exp()
        x = x.reshape(b, l, self.n_heads, self.head_dim)
        B, C = (m.reshape(b, l, self.n_groups, self.d_state) for m in (B, C))
        if scan_runs(x.device.type, x.dtype):
            scan = compiled_mamba_scan if torch.compiler.is_compiling() else mamba_scan
            y = scan(x, dt, A, B, C, self.chunk_size, D=self.D)
        else:  # the result does not depend on the chunk; on a CPU 64 is fastest at every size measured
            y = ssd(x, dt, A, B, C, 128 if x.is_cuda else 64, D=self.D)
        return y.reshape(b, l, -1)

    def forward(self, u):
        z, xBC, dt = self.in_proj(u).split(self.split_sizes, dim=-1)
        return self.out_proj(self.norm(self.scan(xBC, dt), z))


class MambaMixer(nn.Module):
    """Mamba-2 over the raster of an image, tokens (B, H*W, d) -> (B, H*W, d).

    direction: `W` rows and `H` columns, each read both ways with the SAME weights and fused by a linear
    layer (`fuse`) on the sum of the two (paper 3.3; sum instead of concatenation is our choice, it gives the
    paper's 0.7B); `>` `<` `v` `^` one way only: rows forward, backward, columns downward, upward.
    """

    def __init__(self, direction, width, **mamba):
        super().__init__()
        self.columns, self.backward, self.both = direction in "Hv^", direction in "<^", direction in "HW"
        self.mamba = Mamba2(width, **mamba)
        self.fuse = nn.Linear(width, width) if self.both else nn.Identity()

    def forward(self, x, grid):
        (H, W), m = grid, self.mamba
        if self.columns:
            x = x.unflatten(1, (H, W)).transpose(1, 2).flatten(1, 2)
        # in_proj, norm, out_proj and fuse see one token at a time and so commute with the reversal:
        # only convolution and recurrence run per direction, as one doubled batch.
        z, xBC, dt = m.in_proj(x).split(m.split_sizes, dim=-1)
        if self.both:
            forward, backward = m.scan(torch.cat([xBC, xBC.flip(1)]), torch.cat([dt, dt.flip(1)])).chunk(2)
            y = m.norm(forward, z) + m.norm(backward.flip(1), z)
        elif self.backward:
            y = m.norm(m.scan(xBC.flip(1), dt.flip(1)).flip(1), z)
        else:
            y = m.norm(m.scan(xBC, dt), z)
        y = self.fuse(m.out_proj(y))
        return y.unflatten(1, (W, H)).transpose(1, 2).flatten(1, 2) if self.columns else y

    @torch.no_grad()
    def copy_attention(self, attention):
        """Mamba-in-the-Llama's initialisation: C <- W_q, B <- W_k, x <- W_v, out_proj <- W_o.

        Takes a mixer of the attention's geometry (expand 1, groups = heads, state = head width); the rest
        keeps its own initialisation, but `fuse` starts as the mean of both directions plus W_o's bias. Those
        of W_q, W_k and W_v are dropped: in_proj has none.
        """
        m, a = self.mamba, attention
        z, _, dt = m.in_proj.weight.split(m.split_sizes)
        m.in_proj.weight.copy_(torch.cat([z, a.to_v.weight, a.to_k.weight, a.to_q.weight, dt]))
        m.out_proj.weight.copy_(a.to_out[0].weight)
        if self.both:
            nn.init.eye_(self.fuse.weight).mul_(0.5)
            self.fuse.bias.copy_(a.to_out[0].bias)

    @torch.no_grad()
    def fold(self):
        """For sampling: `fuse` after `out_proj` is one linear map; make it one, not to be saved."""
        if self.both:
            out = self.mamba.out_proj
            out.weight, out.bias = nn.Parameter(self.fuse.weight @ out.weight), self.fuse.bias
            self.fuse = nn.Identity()


def attention(q, k, v, heads, mask=None):
    """Multi-head softmax attention: q (B, L, d), k, v (B, T, d), mask that broadcasts to (B, heads, L, T)."""
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))  # (B, L, heads, d/heads)
    if mask is None and flash_runs(q.device.type, q.dtype):
        return flash_attention(q, k, v).flatten(2)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Self-attention (mixer `S`) or, given a text, cross-attention to it; diffusers' parameter names.

    Attributes: float32, False; True keeps softmax(q k^T) v out of autocast, as PixArt trains.
    """

    float32 = False

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x, grid=None, text=None, mask=None):
        """x (B, L, d) [, text (B, T, d), mask broadcastable to (B, heads, L, T)] -> (B, L, d)."""
        source = x if text is None else text
        q, k, v = self.to_q(x), self.to_k(source), self.to_v(source)
        if not self.float32:
            return self.to_out[0](attention(q, k, v, self.heads, mask))
        with torch.autocast(x.device.type, enabled=False):
            mixed = attention(q.float(), k.float(), v.float(), self.heads, mask)
        return self.to_out[0](mixed.to(q.dtype))


# A letter of a pattern -> what makes its mixer: module(tokens (B, L, width), grid (H, W)) -> (B, L, width)
MIXERS = {
    "S": lambda letter, width, heads, mamba: Attention(width, heads),
    **dict.fromkeys("HW><v^", lambda letter, width, heads, mamba: MambaMixer(letter, width, **mamba)),
}

# ---------------------------------------------------------------------------------------------------
# 5. The backbone
# ---------------------------------------------------------------------------------------------------


class MLP(nn.Module):
    """Linear, GELU(tanh), Linear."""

    def __init__(self, width_in, hidden, width_out):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(width_in, hidden), nn.Linear(hidden, width_out)

    def forward(self, x):
        return self.linear_2(F.gelu(self.linear_1(x), approximate="tanh"))


class TimestepEmbedder(nn.Module):
    """A number per image, (B,) -> (B, width): sinusoid, Linear, SiLU, Linear."""

    def __init__(self, width):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(256, width), nn.Linear(width, width)

    def forward(self, values):
        return self.linear_2(F.silu(self.linear_1(sinusoid(values).to(self.linear_1.weight.dtype))))


def modulate(h, shift, scale):
    """adaLN: LN(h) * (1 + scale) + shift, with shift and scale (B, 1, d)."""
    return F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift


class PaddingTokens(nn.Module):
    """DiM's padding: 3 learned tokens end each row and each column, so that a convolution of 4 does not
    reach from one line into the next. The grid (H, W) becomes (H + 3, W + 3): rows end in p0, p1, p2;
    row H + k is p_k up to there."""

    def __init__(self, width):
        super().__init__()
        self.tokens = nn.Parameter(0.02 * torch.randn(3, width))

    def add(self, h, grid):
        """(B, H * W, d) -> (B, (H+3) * (W+3), d) and the new grid."""
        (H, W), (B, _, d) = grid, h.shape
        below = self.tokens[:, None].expand(B, 3, W, d)
        beside = self.tokens.expand(B, H + 3, 3, d)
        h = torch.cat([torch.cat([h.unflatten(1, grid), below], dim=1), beside], dim=2)
        return h.flatten(1, 2), (H + 3, W + 3)

    @staticmethod
    def remove(h, grid):
        """(B, (H+3) * (W+3), d) and the padded grid -> (B, H * W, d) and its grid."""
        return h.unflatten(1, grid)[:, :-3, :-3].flatten(1, 2), (grid[0] - 3, grid[1] - 3)

    def hide_from(self, visit, grid):
        """`visit` as T2MD calls it, given a padded grid -> one that sees no padding."""
        return lambda n, *ends: visit(n, *(self.remove(end, grid)[0] for end in ends))


class LocalEnhancement(nn.Module):
    """DiM's depthwise 3x3 convolution over the grid, (B, H * W, d) -> the same; an identity at first."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width)
        nn.init.dirac_(self.conv.weight, groups=width)
        nn.init.zeros_(self.conv.bias)

    def forward(self, h, grid):
        return self.conv(h.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)


class Block(nn.Module):
    """One PixArt block around any token mixer (Fig. 2):

    h = h + gate1 * Mixer(LN(h) * (1 + scale1) + shift1)
    h = h + CrossAttention(h, text)
    h = h + gate2 * MLP(LN(h) * (1 + scale2) + shift2)
    """

    def __init__(self, letter, width, heads, mlp_ratio, mamba):
        super().__init__()
        self.mixer = MIXERS[letter](letter, width, heads, mamba)
        self.cross_attention = Attention(width, heads)
        self.mlp = MLP(width, mlp_ratio * width, width)
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def forward(self, h, time, text, mask, grid):
        """h (B, L, d), time (B, 6, d), text (B, T, d) -> new h, mixer input, mixer output, each (B, L, d)."""
        six = (self.scale_shift_table + time).chunk(6, dim=1)
        shift1, scale1, gate1, shift2, scale2, gate2 = six  # each (B, 1, d)
        mixer_input = modulate(h, shift1, scale1)
        mixer_output = self.mixer(mixer_input, grid)
        h = h + gate1 * mixer_output
        h = h + self.cross_attention(h, text=text, mask=mask)
        h = h + gate2 * self.mlp(modulate(h, shift2, scale2))
        return h, mixer_input, mixer_output


class T2MD(ModelMixin, ConfigMixin):
    """Teacher and student: a PixArt-alpha backbone whose block n mixes tokens by the letter `pattern[n]`.

    `S` self-attention, `H` / `W` bidirectional Mamba-2 over columns / rows, `>` `<` `v` `^` one direction.
    The paper's student is "SHWHWHW" * 4, its teacher "S" * 28. Given the same weights, an all-`S` model gives
    the output of diffusers' `PixArtTransformer2DModel`. Works at any H x W that patch_size divides.

    Args:
        pattern: one letter a block.  width, heads, mlp_ratio: as in DiT.
        patch_size, in_channels, out_channels: latent pixels a token covers, latent channels in, channels out
            (PixArt-alpha has 8: noise and variance).
        caption_width: width of the text encoder's features.
        d_state, expand, head_dim, d_conv, n_groups, chunk_size: Mamba-2's (N, expansion, P, ...).
        pos_embed: "centered" (any size, zero-shot resolution) or "pixart" (the teacher's index grid).
        sample_size: latent side it was last trained at (64 -> 512 px with an 8x VAE) and is sampled at.
        interpolation_scale: coordinates run over sample_size / patch_size / interpolation_scale, so a size
            twice as large with twice the scale has the same; max(sample_size // 64, 1) if None, as diffusers.
        use_additional_conditions: PixArt 1024's size and aspect embeddings; True at sample_size 128 if None.
        beta_schedule: "linear" (teacher) or "scaled_linear" (quadratic, after adaptation), for the sampler.
        padding_tokens, local_enhancement: DiM's, off in T2MD; see `PaddingTokens` and `LocalEnhancement`.
        renoise: timestep that the sampler goes back to with an enlarged picture, far above the trained size.
        vae, text_encoder: what it was trained with: folder (relative to the checkpoint's own) or repository.
    Raises ValueError for an unknown letter, embedding or schedule, or for widths that do not divide.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = _repeated_blocks = ["Block"]  # the latter for diffusers' compile_repeated_blocks

    # fmt: off
    @register_to_config
    def __init__(self, pattern="SHWHWHW" * 4, width=1152, heads=16, mlp_ratio=4, patch_size=2, in_channels=4,
                 out_channels=4, caption_width=4096, d_state=256, expand=2, head_dim=64, d_conv=4, n_groups=1,
                 chunk_size=256, pos_embed="centered", sample_size=64, interpolation_scale=None,
                 use_additional_conditions=None, beta_schedule="linear", padding_tokens=False,
                 local_enhancement=False, renoise=500, vae=None, text_encoder=None):
        # fmt: on
        super().__init__()
        check_arguments(**self.arguments())
        self.base = sample_size // patch_size  # tokens along a side at the base resolution
        self.interpolation_scale = interpolation_scale or max(sample_size // 64, 1)
        conditioned = use_additional_conditions
        self.conditioned_on_size = sample_size == 128 if conditioned is None else conditioned
        self.gradient_checkpointing = False
        mamba = dict(d_state=d_state, expand=expand, head_dim=head_dim, d_conv=d_conv, n_groups=n_groups)
        mamba["chunk_size"] = chunk_size

        self.patch_embed = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        self.caption_projection = MLP(caption_width, width, width)
        self.timestep_embedder = TimestepEmbedder(width)
        if self.conditioned_on_size:
            self.resolution_embedder = TimestepEmbedder(width // 3)
            self.aspect_ratio_embedder = TimestepEmbedder(width // 3)
        if padding_tokens:
            self.padding = PaddingTokens(width)
        if local_enhancement:
            self.enhance_first, self.enhance_last = LocalEnhancement(width), LocalEnhancement(width)
        self.adaln_single = nn.Linear(width, 6 * width)
        self.blocks = nn.ModuleList(Block(letter, width, heads, mlp_ratio, mamba) for letter in pattern)
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.proj_out = nn.Linear(width, patch_size**2 * out_channels)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """DiT's and PixArt's initialisation, for training from scratch; a checkpoint overwrites all of it.

        Linear layers Xavier, embeddings of time and caption N(0, 0.02^2); cross-attention and the output
        layer start at zero. Mamba's dt_bias, A_log, D and convolution keep what `Mamba2` gave them.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.weight.flatten(1))
        for embedder in (self.timestep_embedder, self.caption_projection):
            nn.init.normal_(embedder.linear_1.weight, std=0.02)
            nn.init.normal_(embedder.linear_2.weight, std=0.02)
        nn.init.normal_(self.adaln_single.weight, std=0.02)
        for block in self.blocks:
            nn.init.zeros_(block.cross_attention.to_out[0].weight)
        nn.init.zeros_(self.proj_out.weight)

    def arguments(self):
        """What this model was made with: T2MD(**model.arguments()) is one like it, with fresh weights."""
        known = inspect.signature(type(self)).parameters
        return {name: value for name, value in self.config.items() if name in known}

    def tokens(self, hidden_states):
        """Latents (B, C, h, w) -> tokens with positions (B, L, d), grid (H, W); with DiM's additions."""
        p, (height, width) = self.config.patch_size, hidden_states.shape[-2:]
        if height % p or width % p:
            raise ValueError(f"latents of {height} x {width} cannot be cut into patches of {p} x {p}")
        h = self.patch_embed(hidden_states)
        grid, h = tuple(h.shape[-2:]), h.flatten(2).transpose(1, 2)
        where = *grid, self.config.width, self.base, self.interpolation_scale
        h = h + position_embedding(self.config.pos_embed, *where, h.device, h.dtype)
        if self.config.local_enhancement:
            h = self.enhance_first(h, grid)
        return self.padding.add(h, grid) if self.config.padding_tokens else (h, grid)

    def embed_time(self, timestep, batch, added_cond_kwargs=None):
        """Timesteps (B,) or scalar, size conditions -> embedding (B, width), adaLN's input (B, 6, width)."""
        timestep = torch.as_tensor(timestep, device=self.scale_shift_table.device).expand(batch)
        embedded = self.timestep_embedder(timestep)
        if self.conditioned_on_size:
            if not added_cond_kwargs or added_cond_kwargs.get("resolution") is None:
                needed = "added_cond_kwargs needs resolution (B, 2) and aspect_ratio (B, 1)"
                raise ValueError(f"this model is conditioned on size: {needed}")
            resolution = self.resolution_embedder(added_cond_kwargs["resolution"].flatten())
            aspect = self.aspect_ratio_embedder(added_cond_kwargs["aspect_ratio"].flatten())
            embedded = embedded + torch.cat([resolution.view(batch, -1), aspect.view(batch, -1)], dim=1)
        return embedded, self.adaln_single(F.silu(embedded)).unflatten(1, (6, -1))

    def latents(self, h, embedded, grid):
        """Tokens (B, L, d) after the last block, and time's embedding (B, d) -> (B, out_channels, h, w)."""
        if self.config.padding_tokens:
            h, grid = self.padding.remove(h, grid)
        if self.config.local_enhancement:
            h = self.enhance_last(h, grid)
        p, (H, W) = self.config.patch_size, grid
        shift, scale = (self.scale_shift_table + embedded[:, None]).chunk(2, dim=1)  # (B, 1, d)
        h = self.proj_out(modulate(h, shift, scale)).view(len(h), H, W, p, p, self.config.out_channels)
        return torch.einsum("nhwpqc->nchpwq", h).reshape(len(h), self.config.out_channels, H * p, W * p)

    # fmt: off
    def forward(self, hidden_states, encoder_hidden_states, timestep, added_cond_kwargs=None,
                encoder_attention_mask=None, return_dict=True, visit=None):
        # fmt: on
        """Predict the noise; the signature of diffusers' PixArtTransformer2DModel.

        Args:
            hidden_states: noisy latents (B, in_channels, h, w), h and w multiples of patch_size.
            encoder_hidden_states: caption features (B, T, caption_width).
            encoder_attention_mask: (B, T), 1 = token, 0 = padding; or diffusers' bias (B, 1, T).
            timestep: (B,) or a scalar, in [0, 1000).
            added_cond_kwargs: {"resolution": (B, 2) pixels, "aspect_ratio": (B, 1)} for PixArt-1024 weights.
            visit: what distillation needs: called as visit(n, mixer_input, mixer_output), each (B, L, width),
                when block n has run.
        Returns Transformer2DModelOutput with `sample` (B, out_channels, h, w), or a 1-tuple.
        Raises ValueError if patch_size does not divide h and w, or size conditions are missing.
        """
        say_kernels(self, hidden_states)
        h, grid = self.tokens(hidden_states)  # (B, L, d)
        embedded, time = self.embed_time(timestep, len(h), added_cond_kwargs)  # (B, d), (B, 6, d)
        text, mask = self.caption_projection(encoder_hidden_states), encoder_attention_mask  # (B, T, d)
        if mask is not None:
            mask = mask[:, None, None].bool() if mask.ndim == 2 else mask[:, None].to(text.dtype)
        if self.config.padding_tokens and visit is not None:
            visit = self.padding.hide_from(visit, grid)

        for n, block in enumerate(self.blocks):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                block = partial(self._gradient_checkpointing_func, block)
            h, mixer_input, mixer_output = block(h, time, text, mask, grid)
            if visit is not None:
                visit(n, mixer_input, mixer_output)

        sample = self.latents(h, embedded, grid)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    @classmethod
    def from_pixart(cls, path_or_repo, pattern=None, **overrides):
        """The teacher, or a student of it, from a diffusers PixArt transformer or a pipeline that has one.

        pattern: "S" * n, or None, is the teacher itself; for other ones see `from_teacher`.
        overrides: any argument of T2MD, e.g. pos_embed="centered".
        Raises FileNotFoundError if there are no such weights, ValueError if the pattern's length is another.
        """
        theirs = load_whole(PixArtTransformer2DModel, path_or_repo)
        config = pixart_config(theirs.config)
        itself = pattern in (None, config["pattern"])
        teacher = cls(**config | (overrides if itself else {}))
        teacher.load_state_dict(rename_pixart(theirs.state_dict()))
        return teacher if itself else cls.from_teacher(teacher, pattern, **overrides)

    @classmethod
    def from_teacher(cls, teacher, pattern, **overrides):
        """A student: what is no mixer, and every mixer whose letter stays, is the teacher's bit for bit; the
        others, and DiM's additions, are fresh. It predicts noise only, by that half of the output layer.

        teacher: a T2MD.  overrides: any argument of T2MD.  Raises ValueError for another number of blocks.
        """
        theirs = teacher.arguments()
        if len(pattern) != len(theirs["pattern"]):
            blocks = f"{len(pattern)} letters, but the teacher has {len(theirs['pattern'])} blocks"
            raise ValueError(f"pattern {pattern!r} has {blocks}")
        student = cls(**theirs | dict(pattern=pattern, out_channels=theirs["in_channels"]) | overrides)
        changed = [n for n, letter in enumerate(pattern) if letter != theirs["pattern"][n]]
        fresh = tuple(f"blocks.{n}.mixer." for n in changed)
        copied = {name: w for name, w in teacher.state_dict().items() if not name.startswith(fresh)}
        for name in ("proj_out.weight", "proj_out.bias"):  # rows are (p, p, channel), first the noise's
            rows = copied[name].unflatten(0, (-1, theirs["out_channels"]))
            copied[name] = rows[:, : student.config.out_channels].flatten(0, 1)
        student.load_state_dict(student.state_dict() | copied)
        return student

    @classmethod
    def from_attention(cls, path_or_repo, pattern, **overrides):
        """Like `from_teacher`, but Mamba too starts from the attention: `MambaMixer.copy_attention`."""
        teacher = load_backbone(path_or_repo)
        heads, head = teacher.config.heads, teacher.config.width // teacher.config.heads
        mamba = dict(expand=1, d_state=head, head_dim=head, n_groups=heads)
        student = cls.from_teacher(teacher, pattern, **mamba, **overrides)
        for ours, theirs in zip(student.blocks, teacher.blocks):
            if isinstance(ours.mixer, MambaMixer):
                ours.mixer.copy_attention(theirs.mixer)
        return student


# ---------------------------------------------------------------------------------------------------
# 6. Losses. z_t (B, C, h, w); every loss is a scalar, a mean over elements
# ---------------------------------------------------------------------------------------------------


def predict_noise(model, z_t, t, text, mask, visit=None, **conditions):
    """epsilon(z_t, t, tau), (B, C, h, w); of a model with learned variance, the noise half."""
    more = dict(encoder_attention_mask=mask, added_cond_kwargs=conditions or None, visit=visit)
    (noise,) = model(z_t, text, t, return_dict=False, **more)
    return noise[:, : z_t.shape[1]]


def mean_square(a, b):
    """|| a - b ||^2 as used everywhere here: the mean over elements, in float32 at least."""
    return F.mse_loss(precise(a), precise(b))


def forcing_loss(student, teacher, z_t, t, text, mask, backward=None, **conditions):
    """Equation 6, layer-level teacher forcing: sum over Mamba blocks n of ||Mamba_n(h'_n) - SA'_n(h'_n)||^2.

    h'_n is the TEACHER's input to its n-th mixer, fed to both. The terms share nothing, so `backward` (for
    instance `torch.Tensor.backward`), if given, is called on each as soon as the teacher has passed that
    block: gradients are those of the sum, memory that of one layer. The value returned is then detached.
    """
    patch = student.config.patch_size
    grid = (z_t.shape[2] // patch, z_t.shape[3] // patch)
    terms = []

    def visit(n, mixer_input, mixer_output):
        if student.config.pattern[n] == "S":
            return
        with torch.enable_grad():
            term = mean_square(student.blocks[n].mixer(mixer_input.detach(), grid), mixer_output.detach())
        if backward is not None:
            backward(term)
            term = term.detach()
        terms.append(term)

    with torch.no_grad():
        predict_noise(teacher, z_t, t, text, mask, visit, **conditions)
    return sum(terms)


def mse_loss(noise, student_noise):
    """Equation 8, the diffusion loss: ||eps - eps_theta(z_t, t, tau)||^2."""
    return mean_square(student_noise, noise)


def soft_loss(teacher_noise, student_noise):
    """Equation 9 (the paper's pseudo loss): ||eps_theta'(z_t, t, tau) - eps_theta(z_t, t, tau)||^2."""
    return mean_square(student_noise, teacher_noise)


def mixer_loss(teacher_mixers, student_mixers):
    """Equation 10: 1/N sum over all N blocks of ||mixer output of theta' - theta||^2, each on its OWN h."""
    terms = [mean_square(s, t) for s, t in zip(student_mixers, teacher_mixers, strict=True)]
    return sum(terms) / len(terms)


def kd_loss(student, teacher, z_t, t, text, mask, noise, soft_weight=0.5, mixer_weight=0.2, **conditions):
    """Equation 11: L_mse + 0.5 L_soft + 0.2 L_mixer -> (loss, {"mse", "soft", "mixer"} detached)."""
    theirs, ours, given = [], [], (z_t, t, text, mask)  # the mixers' outputs
    with torch.no_grad():
        teacher_noise = predict_noise(teacher, *given, lambda n, x, y: theirs.append(y), **conditions)
    student_noise = predict_noise(student, *given, lambda n, x, y: ours.append(y), **conditions)
    mse, soft = mse_loss(noise, student_noise), soft_loss(teacher_noise, student_noise)
    mixer = mixer_loss(theirs, ours)
    loss = mse + soft_weight * soft + mixer_weight * mixer
    return loss, dict(mse=mse.detach(), soft=soft.detach(), mixer=mixer.detach())


# ---------------------------------------------------------------------------------------------------
# 7. Weights from a teacher
# ---------------------------------------------------------------------------------------------------


def read_json(path):
    """The object in a JSON file, a dict.  Raises ValueError, naming the file, if it holds none."""
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
        if not isinstance(value, dict):
            raise ValueError("it holds no JSON object")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable: {error}") from error
    return value


def read_config(folder):
    """What is in a folder's config.json; {} if there is no such file: load_part says what is missing."""
    path = os.path.join(folder, "config.json")
    return read_json(path) if os.path.isfile(path) else {}


def load_part(cls, path, subfolder, **kwargs):
    """`cls.from_pretrained` on a pipeline's `subfolder`, or on `path` itself where there is no such part.

    What looks like a path never touches the network; "owner/name" that is no folder is a repository of
    Hugging Face's. Raises, in one sentence, FileNotFoundError if there is nothing to load, ValueError if what
    is there is broken or another model's.
    """
    what, inside = subfolder.replace("_", " "), os.path.join(path, subfolder)
    if os.path.isdir(path):
        folder = inside if os.path.isdir(inside) else path
        places = [dict(pretrained_model_name_or_path=folder)]
        nothing = not glob.glob("*.json", root_dir=folder)
        read_config(folder)  # diffusers takes a string in it for the name of a repository, and asks there
    elif os.path.isabs(path) or path.count("/") != 1 or path.startswith("."):
        raise FileNotFoundError(f"there is no folder {path!r} to load a {what} from")
    else:
        repository, nothing = dict(pretrained_model_name_or_path=path), True
        places = [repository | dict(subfolder=subfolder), repository]
    reasons = []
    for place in places:
        try:
            part = cls.from_pretrained(**place, **kwargs)
            model = part[0] if isinstance(part, tuple) else part
            if any(w.is_meta for w in getattr(model, "parameters", list)()):  # diffusers leaves these empty
                raise ValueError("its weights are another model's")
            return part
        except Exception as error:  # the libraries raise anything from OSError to SafetensorError
            reasons.append(next(iter(str(error).strip().splitlines()), type(error).__name__))
    why = ", and without a subfolder: ".join(reasons)
    raise (FileNotFoundError if nothing else ValueError)(f"no {what} could be loaded from {path!r}: {why}")


def load_whole(cls, path_or_repo):
    """A transformer, with every weight its config asks for and no other.  Raises as `load_part`."""
    model, info = load_part(cls, path_or_repo, "transformer", output_loading_info=True)
    wrong = [*info["missing_keys"], *info["unexpected_keys"]]
    if wrong:
        what = f"{wrong[0]} is missing or superfluous"
        raise ValueError(f"the weights in {path_or_repo} do not fit its config.json: {what}")
    return model


def load_backbone(path_or_repo, **overrides):
    """The T2MD of a checkpoint, or of a diffusers PixArt transformer, whichever is there; in float32.

    overrides: any argument of T2MD that changes no weight, e.g. pos_embed="centered".
    Raises FileNotFoundError if there is neither, ValueError if config and weights do not fit.
    """
    inside = os.path.join(path_or_repo, "transformer")
    config = read_config(inside if os.path.isdir(inside) else path_or_repo)
    if config.get("_class_name") != "T2MD":
        return T2MD.from_pixart(path_or_repo, **overrides)
    loaded = load_whole(T2MD, path_or_repo)
    model = T2MD(**loaded.arguments() | overrides)
    model.load_state_dict(loaded.state_dict())
    return model


# fmt: off
PIXART_NAMES = (  # diffusers' name -> ours, for whatever is not the same
    ("transformer_blocks.", "blocks."), (".attn1.", ".mixer."), (".attn2.", ".cross_attention."),
    (".ff.net.0.proj.", ".mlp.linear_1."), (".ff.net.2.", ".mlp.linear_2."),
    ("pos_embed.proj.", "patch_embed."), ("adaln_single.linear.", "adaln_single."), ("adaln_single.emb.", ""))
# fmt: on


def rename_pixart(state):
    """The state dict of a diffusers PixArtTransformer2DModel -> that of the T2MD that computes the same."""
    renamed = {}
    for name, weight in state.items():
        for theirs, ours in PIXART_NAMES:
            name = name.replace(theirs, ours)
        renamed[name] = weight
    renamed.pop("pos_embed.pos_embed", None)  # computed, not learned
    return renamed


def pixart_config(config):
    """A diffusers PixArtTransformer2DModel config -> the arguments of the T2MD that computes the same."""
    ours = {name: config[name] for name in ("patch_size", "in_channels", "sample_size")}
    ours |= {name: config.get(name) for name in ("interpolation_scale", "use_additional_conditions")}
    ours |= dict(pattern="S" * config["num_layers"], caption_width=config["caption_channels"])
    ours |= dict(pos_embed="pixart", out_channels=config["out_channels"] or config["in_channels"])
    heads = config["num_attention_heads"]
    return ours | dict(heads=heads, width=heads * config["attention_head_dim"])


# fmt: off
def check_arguments(pattern, pos_embed, beta_schedule, width, heads, interpolation_scale, vae, text_encoder,
                    mlp_ratio, use_additional_conditions, padding_tokens, local_enhancement, **counts):
    """Raises ValueError, naming it, for an argument that no T2MD can have: a config may be broken."""
    # fmt: on
    for name, value in (counts | dict(width=width, heads=heads)).items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} {value!r} must be a positive whole number")
    for name, value in dict(vae=vae, text_encoder=text_encoder).items():
        if not isinstance(value, str | None):
            raise ValueError(f"{name} {value!r} must be a folder or a repository")
    if not isinstance(interpolation_scale, int | float | None):
        raise ValueError(f"interpolation_scale {interpolation_scale!r} must be a number")
    if not pattern or set(pattern) - set(MIXERS):
        raise ValueError(f"pattern {pattern!r} must be made of the letters {' '.join(MIXERS)}")
    if pos_embed not in COORDINATES or beta_schedule not in ("linear", "scaled_linear"):
        raise ValueError(f"unknown pos_embed {pos_embed!r} or beta_schedule {beta_schedule!r}")
    if width % heads or width % 4:
        raise ValueError(f"width {width} must be a multiple of heads = {heads} and of 4")


# ---------------------------------------------------------------------------------------------------
# 8. How the scan is made fast: the method ends above
# ---------------------------------------------------------------------------------------------------


AT_ONCE = 2**28  # bytes of a GPU's memory for the matrices and states of the chunks that `ssd` takes at once


def chunks_at_once(x, B, chunk_size):
    """On a CPU one, whose matrices stay in its cache; on a GPU as many as AT_ONCE holds: starting its kernels
    costs more time than the work of a small chunk."""
    b, _, g, r, p = x.shape
    each = 4 * b * g * r * (chunk_size**2 + p * B.shape[-1])
    return max(1, AT_ONCE // each) if x.is_cuda else 1


def decays(s):
    """Running sums s (..., c) that fall -> L (..., c, c): exp(s_i - s_j) where j <= i, else 1."""
    return (s[..., :, None] - s[..., None, :]).clamp_(max=0).exp_()


class CausalConv(torch.autograd.Function):
    """On a CPU: x (b, l, c), weight (c, k), bias (c,) -> y (b, l, c), y_i = bias + sum_j w_j x_{i-k+1+j}.
    As a 2-D convolution over a line of pixels, channels last, it needs no transposes and takes a third of
    conv1d's time; its gradient, written out, half of conv2d's."""

    @staticmethod
    def line(x, weight, bias=None):
        how = dict(padding=(0, weight.shape[1] - 1), groups=len(weight))
        return F.conv2d(x.mT[:, :, None], weight[:, None, None], bias, **how)[:, :, 0].mT

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return CausalConv.line(x, weight, bias)[:, : x.shape[1]]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        l, k = x.shape[1], weight.shape[1]
        dx = CausalConv.line(dy, weight.flip(1))[:, k - 1 :]
        lags = reversed(range(k))
        dweight = [(x[:, : max(l - lag, 0)] * dy[:, lag:]).sum((0, 1)) for lag in lags]
        return dx, torch.stack(dweight, dim=1), dy.sum((0, 1))


class ChunkScan(torch.autograd.Function):
    """`ssd` with its heads by group: x (b, l, g, r, p), dt (b, l, g, r), A and D (g, r), B and C (b, l, g,
    n) -> y like x, where r heads share each of the g groups. Goes through the sequence by blocks of k chunks
    of c tokens. Subscripts below: i reads, j <= i is read, both inside one chunk.

    The gradient is written out because autograd would keep every chunk's matrices: it goes from the last
    block to the first, makes their matrices again and carries the state's gradient. Kept for it: a state
    (b, g, r, p, n) for each chunk.
    """

    @staticmethod
    def blocks(chunk_size, at_once, *tensors):
        """Views (b, k, c, ...) of tensors (b, l, ...), block by block; a shorter last chunk is its own."""
        length = tensors[0].shape[1]
        whole = length - length % chunk_size
        starts = [*range(0, whole, chunk_size * at_once), *([whole] if whole < length else [])]
        for start, end in zip(starts, [*starts[1:], length]):
            yield [v[:, start:end].unflatten(1, (-1, min(chunk_size, end - start))) for v in tensors]

    @staticmethod
    def matrices(x, dt, A, B, C):
        """A block's u (b, k, c, g, r, p), decay sums s (b, k, g, r, c), decays from the chunk's start to i
        and from j to its end (b, k, c, g, r, 1), G (b, k, g, 1, c, c) and L (b, k, g, r, c, c); where j > i,
        G is 0 and L 1."""
        s = (dt * A).permute(0, 1, 3, 4, 2).contiguous().cumsum(-1)
        ends = (v.exp().permute(0, 1, 4, 2, 3)[..., None].to(x.dtype) for v in (s, s[..., -1:] - s))
        G = torch.einsum("bkign,bkjgn->bkgij", C, B).tril_()[:, :, :, None]
        return x * dt[..., None].to(x.dtype), s, *ends, G, decays(s)

    @staticmethod
    def carry(added, total, state, back=False):
        """The recurrence over chunks: what each adds to the state (b, k, g, r, p, n), the sum of its decays
        (b, k, g, r), and the state (b, g, r, p, n), or None, before the block -> the states before each
        chunk, and after each. `back`: from the last chunk to the first, as the states' gradient goes."""
        state = None if state is None else state[:, None]
        if added.shape[1] == 1:
            return state, added if state is None else added.addcmul_(total.exp()[..., None, None], state)
        state = torch.zeros_like(added[:, :1]) if state is None else state
        L = decays(F.pad(total.cumsum(1).movedim(1, -1), (1, 0))).tril()
        with torch.autocast(added.device.type, enabled=False):
            if back:
                states = torch.einsum("bgrij,bigrpn->bjgrpn", L, torch.cat([added, state], dim=1))
                return states[:, 1:], states[:, :-1]
            states = torch.einsum("bgrij,bjgrpn->bigrpn", L, torch.cat([state, added], dim=1))
            return states[:, :-1], states[:, 1:]

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, chunk_size, at_once):
        y, kept, state, keep = torch.empty_like(x), [], None, any(ctx.needs_input_grad)
        last = (x.shape[1] - 1) // chunk_size * chunk_size
        for n, (xc, dtc, Bc, Cc, yc) in enumerate(ChunkScan.blocks(chunk_size, at_once, x, dt, B, C, y)):
            u, s, from_start, to_end, G, L = ChunkScan.matrices(xc, dtc, A, Bc, Cc)
            yc.copy_(torch.einsum("bkgrij,bkjgrp->bkigrp", L.mul_(G).to(x.dtype), u))
            before, after = None if state is None else state[:, None], None
            if n * at_once * chunk_size < last:  # nobody reads the state after the last chunk
                added = torch.einsum("bkjgrp,bkjgn->bkgrpn", u.mul_(to_end), Bc).to(s.dtype)
                before, after = ChunkScan.carry(added, s[..., -1], state)
                state = after[:, -1]
            if before is not None:
                yc.addcmul_(from_start, torch.einsum("bkign,bkgrpn->bkigrp", Cc, before.to(x.dtype)))
            if D is not None:
                yc.addcmul_(D.to(x.dtype)[..., None], xc)
            kept += [before, after] if keep else []
        if keep:
            ctx.save_for_backward(x, dt, A, B, C, D, y, *kept)
        ctx.sizes = chunk_size, at_once
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, dt, A, B, C, D, y, *kept = ctx.saved_tensors
        blocks = zip(ChunkScan.blocks(*ctx.sizes, x, dt, B, C, y, dy), kept[::2], kept[1::2])
        gradients, dstate = [], None  # dstate: of the state after the block
        dA, dD = (None if v is None else torch.zeros_like(v) for v in (A, D))
        for (xc, dtc, Bc, Cc, yc, dyc), before, after in reversed(list(blocks)):
            u, s, from_start, to_end, G, L = ChunkScan.matrices(xc, dtc, A, Bc, Cc)
            dG = torch.einsum("bkigrp,bkjgrp->bkgrij", dyc, u).mul(L).sum(3).tril_().to(x.dtype)
            du = torch.einsum("bkgrij,bkigrp->bkjgrp", L.mul_(G).to(x.dtype), dyc).contiguous()
            dB = torch.einsum("bkgij,bkign->bkjgn", dG, Cc)
            dC = torch.einsum("bkgij,bkjgn->bkign", dG, Bc)
            dafter, dbefore = None if dstate is None else dstate[:, None], None
            if before is not None:
                dread = from_start * dyc
                dC = dC + torch.einsum("bkigrp,bkgrpn->bkign", dread, before.to(x.dtype))
                dbefore = torch.einsum("bkigrp,bkign->bkgrpn", dread, Cc).to(s.dtype)
                dafter, dbefore = ChunkScan.carry(dbefore, s[..., -1], dstate, back=True)
            dstate = None if dbefore is None else dbefore[:, 0]
            if dafter is not None:
                dadded = dafter.to(x.dtype)
                du = torch.addcmul(du, to_end, torch.einsum("bkjgn,bkgrpn->bkjgrp", Bc, dadded))
                dB = dB + torch.einsum("bkjgrp,bkgrpn->bkjgn", to_end * u, dadded)
            dx, ddt = du * dtc[..., None].to(x.dtype), (du.to(s.dtype) * xc).sum(-1)
            # s_i scales all that y_i reads (but for D x_i), -s_j all that is read of u_j, s_last the state
            # after the chunk
            ds = (dyc.to(s.dtype) * yc).sum(-1) - dtc * ddt
            if D is not None:
                dx.addcmul_(D.to(x.dtype)[..., None], dyc)
                through = (dyc.to(s.dtype) * xc).sum(-1)
                dD += through.sum((0, 1, 2))
                ds -= D * through
            if dafter is not None:
                ds[:, :, -1] += (dafter * after).sum((4, 5))
            ddecay = ds.flip(2).cumsum(2).flip(2)
            dA += (dtc * ddecay).sum((0, 1, 2))
            gradients.append([v.flatten(1, 2) for v in (dx, ddt + A * ddecay, dB, dC)])
        dx, ddt, dB, dC = (torch.cat(parts[::-1], dim=1) for parts in zip(*gradients))
        return dx, ddt, dA, dB, dC, dD, None, None


# Optional kernels, for CUDA: mamba-ssm (https://github.com/state-spaces/mamba) and flash-attn. The former's
# scan is pure Triton: it needs no compiler, and in Triton's interpreter it runs on a CPU too, slowly.
KERNEL_DEVICES = ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)


def import_kernel(name, module):
    """Function `name` of `module`; None if its package is not installed, or (said on stderr) fails at import.

    All of mamba_ssm wants selective_scan_cuda at import, the compiled scan of Mamba-1, which is never called
    here and which a build without a compiler lacks: an empty module stands in for it meanwhile.
    """
    package, wanted = module.split(".")[0], "selective_scan_cuda"
    if importlib.util.find_spec(package) is None:
        return None
    stands_in = wanted not in sys.modules and importlib.util.find_spec(wanted) is None
    if stands_in:
        sys.modules[wanted] = types.ModuleType(wanted)
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # built against another torch or Triton, a package raises anything
        why = f"fails at import: {error!r}; going on without"
        print(f"t2md: {package} is installed, but {why}", file=sys.stderr)
    finally:
        if stands_in:
            del sys.modules[wanted]


mamba_scan = flash_attention = None
if torch.cuda.is_available() or "cpu" in KERNEL_DEVICES:
    mamba_scan = import_kernel("mamba_chunk_scan_combined", "mamba_ssm.ops.triton.ssd_combined")
    flash_attention = import_kernel("flash_attn_func", "flash_attn")


def scan_runs(device_type, dtype):
    return mamba_scan is not None and device_type in KERNEL_DEVICES and dtype != torch.float64


def flash_runs(device_type, dtype):
    half = dtype in (torch.float16, torch.bfloat16)
    return flash_attention is not None and device_type == "cuda" and half


# fmt: off
@torch.library.custom_op("t2md::mamba_scan", mutates_args=())
def compiled_mamba_scan(x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor,
                        chunk_size: int, D: torch.Tensor) -> torch.Tensor:
    """mamba-ssm's scan as one opaque operator, so that torch.compile breaks no graph at it. No gradient."""
    return mamba_scan(x, dt, A, B, C, chunk_size, D=D)
# fmt: on


@compiled_mamba_scan.register_fake
def _(x, *_):
    return x.new_empty(x.shape)


def say_kernels(model, x):
    """Say, once, which kernels a T2MD runs on input x."""
    device = x.device.type
    if device == "meta":  # nothing runs
        return
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    precise = any(getattr(block.mixer, "float32", False) for block in model.blocks)
    scan = "mamba-ssm" if scan_runs(device, dtype) else "plain PyTorch"
    flash = flash_runs(device, torch.float32 if precise else dtype)
    attention = "flash-attn" if flash else "PyTorch SDPA"
    say_once(f"t2md on {device} in {str(dtype)[6:]}: scan by {scan}, self-attention by {attention}")


@lru_cache(maxsize=None)
def say_once(text):
    print(text, file=sys.stderr)
