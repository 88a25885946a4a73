"""T2MD: Diffusion Transformer-to-Mamba Distillation (Yao et al., arXiv:2506.18999): model and losses.

The method in six lines. A diffusion transformer (the teacher, PixArt-alpha) predicts the noise in a latent
image. The student is the same backbone in which most self-attention layers are replaced by bidirectional
Mamba-2 layers, whose cost is linear in the number of image tokens. First each Mamba layer alone learns to
imitate the attention layer that it replaces, fed with the teacher's activations (forcing). Then all token
mixers learn together from the teacher's noise and features (kd). Then the whole student is adapted to a new
positional embedding, VAE and text encoder, and fine-tuned at ever higher resolution (train.py).

Why layer by layer. The teacher's attention sees every token at once. A Mamba layer reads the tokens in one
direction and keeps what it has read in a state of fixed size, so it starts far from what it has to imitate.
An error in one block is the next block's input, and it grows with depth: if all layers were replaced and
trained together, the deep ones would learn to answer inputs that are wrong. So each layer first learns on the
teacher's inputs, where no error of another layer reaches it. Only then do the layers learn to work together.

Every network here predicts the noise epsilon. Every squared norm is a MEAN over elements.

Glossary                 code                    paper / Mamba-2
  noisy latent           hidden_states, z_t      z_t                (b, c, height, width)
  tokens                 h                       h                  (b, l, d), row by row
  caption features       encoder_hidden_states   tau                (b, s, caption_width)
  teacher, student       teacher, student        theta', theta
  mixer n                blocks[n].mixer         SA^(n) or MA^(n)
  state size             d_state                 N
  head width             head_dim                P
  decay, step            A, dt                   A, Delta

Shapes: b batch, l tokens (rows * columns), d width, s caption tokens, c latent channels; in Mamba-2: p head
width, n state size. A grid is (rows, columns) of tokens.

Sections: 1 positional embeddings - 2 the state space recurrence (ssd_recurrence, ssd) - 3 token mixers -
4 the backbone (T2MD) - 5 losses, equations 6 to 11 - 6 from a teacher to a student - 7 the frozen VAE and
T5 - 8 loading - 9 optional kernels - 10 DiM's additions - 11 pooled pictures. The first six are the method.
"""

import functools
import glob
import importlib.util
import math
import os
import re
import shutil
import sys
import threading
import types

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtTransformer2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import nn
from transformers import AutoConfig, AutoTokenizer, T5EncoderModel

# Equation 1's noise schedule, but for its shape: "linear" betas (teacher) or "scaled_linear" (diffusers' name
# of the quadratic schedule, after adaptation). The end points of the quadratic one are our choice.
SCHEDULE = dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=2e-2)

# ---------------------------------------------------------------------------------------------------
# 1. Positional embeddings: 2-D sine-cosine, half the channels for the column, half for the row
# ---------------------------------------------------------------------------------------------------


def sincos(positions, channels):
    """Embed positions (n,) as (n, channels): sines, then cosines, at frequencies 10000^(-2k/channels)."""
    frequencies = 10000 ** (-torch.arange(channels // 2, dtype=torch.float64) / (channels / 2))
    angles = torch.outer(positions.double(), frequencies)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def grid_embedding(y, x, width):
    """Embed coordinates y (rows,) and x (columns,) as (rows * columns, width); x takes the first half."""
    rows = len(y)
    columns = len(x)
    embedded_x = sincos(x, width // 2)[None].expand(rows, columns, -1)
    embedded_y = sincos(y, width // 2)[:, None].expand(rows, columns, -1)
    return torch.cat([embedded_x, embedded_y], dim=-1).reshape(rows * columns, width)


def pixart_coordinates(rows, columns, base, interpolation_scale):
    """The teacher's index grid: an axis of n tokens runs from 0 towards base / interpolation_scale.

    Must agree with diffusers' `PatchEmbed`. base is the token side of the trained resolution.
    Returns y (rows,) and x (columns,).
    """
    y = torch.arange(rows, dtype=torch.float32) / (rows / base) / interpolation_scale
    x = torch.arange(columns, dtype=torch.float32) / (columns / base) / interpolation_scale
    return y, x


def centered_coordinates(rows, columns, base, interpolation_scale):
    """The student's embedding after adaptation (3.4.3): token i of n is (i - (n-1)/2) / max(rows, columns).

    The long edge spans the same interval at any size, so a larger image is a denser sampling of known
    coordinates. Zero-shot 4K rests on this. The factor base / interpolation_scale (our choice) gives
    neighbours at the trained resolution the distance that they had for the teacher.
    Returns y (rows,) and x (columns,).
    """
    step = base / interpolation_scale / max(rows, columns)
    y = (torch.arange(rows, dtype=torch.float64) - (rows - 1) / 2) * step
    x = (torch.arange(columns, dtype=torch.float64) - (columns - 1) / 2) * step
    return y, x


COORDINATES = {"pixart": pixart_coordinates, "centered": centered_coordinates}


@functools.lru_cache(maxsize=16)
def position_embedding(kind, rows, columns, width, base, interpolation_scale, device, dtype):
    """Return the embedding (rows * columns, width) of a grid: computed once per size, never stored."""
    y, x = COORDINATES[kind](rows, columns, base, interpolation_scale)
    return grid_embedding(y, x, width).float().to(device, dtype)


# ---------------------------------------------------------------------------------------------------
# 2. The state space recurrence
# ---------------------------------------------------------------------------------------------------


def ssd_recurrence(x, dt, A, B, C, D=None):
    """The definition, token by token (equation 4 in Mamba-2's form, head by head):

        state_t = exp(dt_t A) state_{t-1} + dt_t B_t x_t^T        state: (n, p)
        y_t     = C_t^T state_t + D x_t

    x (b, l, heads, p), dt (b, l, heads) positive, A (heads,) negative, B and C (b, l, groups, n), D (heads,).
    heads is a multiple of groups: head k uses group k // (heads / groups).  Returns y like x.
    """
    batch, length, heads, p = x.shape
    groups, n = B.shape[2:]
    B = B.repeat_interleave(heads // groups, dim=2)  # (b, l, heads, n)
    C = C.repeat_interleave(heads // groups, dim=2)
    state = x.new_zeros(batch, heads, n, p)
    outputs = []
    for t in range(length):
        decay = (dt[:, t] * A).exp()  # (b, heads)
        write = (dt[:, t, :, None] * B[:, t])[..., None] * x[:, t, :, None]  # dt B x^T: (b, heads, n, p)
        state = decay[..., None, None] * state + write
        outputs.append((C[:, t, :, None] @ state).squeeze(2))
    y = torch.stack(outputs, dim=1)
    if D is not None:
        y = y + D[:, None] * x
    return y


def ssd_chunk(state, x, dt, A, B, C):
    """Compute the same map over one chunk of k tokens as matrix products: state space duality.

    Write a_i for the running sum of dt A inside the chunk and u_j = dt_j x_j. Unrolled from its start,

        y_i       = sum_{j <= i} (C_i . B_j) exp(a_i - a_j) u_j  +  exp(a_i) C_i^T state_in
        state_out = exp(a_last) state_in  +  sum_j exp(a_last - a_j) B_j u_j^T

    so inside a chunk the map is causal attention without a softmax, (G * L) u. Every exponent is <= 0: strong
    decay underflows to zero and nothing overflows. Decays and states are float32 (or float64), whatever x is.

    With r heads in each of g groups: state (b, g, r, n, p), or None before the first chunk;
    x (b, k, g, r, p), dt (b, k, g, r), A (g, r), B and C (b, k, g, n).
    Returns y like x, and the state after the chunk.
    """
    # 1. What each token brings: u = dt x.
    u = x * dt[..., None].to(x.dtype)
    # 2. The logarithm of the decay from the chunk's start to each token: a_i.
    log_decay = (dt * A).cumsum(dim=1)  # (b, k, g, r)
    last = log_decay[:, -1]  # (b, g, r)
    # 3. L: the decay from token j to a later token i. Above the diagonal i comes before j: the difference is
    #    positive and may be large. tril sets it to 0, so that exp gives 1 there instead of overflowing.
    #    G is 0 above the diagonal, so these ones have no effect.
    by_head = log_decay.movedim(1, -1)  # (b, g, r, k)
    L = (by_head[..., :, None] - by_head[..., None, :]).tril().exp()  # (b, g, r, i, j)
    # 4. G: C_i . B_j where j <= i, else 0. All heads of a group share it.
    G = torch.einsum("bign,bjgn->bgij", C, B).tril()[:, :, None]  # (b, g, 1, i, j)
    # 5. What the chunk reads of itself.
    y = torch.einsum("bgrij,bjgrp->bigrp", (G * L).to(x.dtype), u)
    # 6. What it reads of everything before it.
    if state is not None:
        decay_from_start = log_decay.exp()[..., None].to(x.dtype)
        y = y + decay_from_start * torch.einsum("bign,bgrnp->bigrp", C, state.to(x.dtype))
    # 7. What it leaves behind.
    decay_to_end = (last[:, None] - log_decay).exp()[..., None].to(x.dtype)
    state_out = torch.einsum("bjgn,bjgrp->bgrnp", B, u * decay_to_end).to(log_decay.dtype)
    if state is not None:
        state_out = last.exp()[..., None, None] * state + state_out
    return y, state_out


def ssd(x, dt, A, B, C, chunk_size, D=None):
    """Compute `ssd_recurrence`, equal in value and gradient, in chunks: linear in l, mostly matrix products.

    Shapes and argument order are those of mamba-ssm's `mamba_chunk_scan_combined`.
    """
    groups = B.shape[2]
    precise = torch.promote_types(x.dtype, torch.float32)
    x_grouped = x.unflatten(2, (groups, -1))  # (b, l, g, r, p): the r heads that share B and C
    dt = dt.to(precise).unflatten(2, (groups, -1))  # (b, l, g, r)
    A = A.to(precise).unflatten(0, (groups, -1))  # (g, r)
    # Split once: if each chunk were a slice, its gradient would be as long as the whole sequence.
    x_chunks = x_grouped.split(chunk_size, dim=1)
    dt_chunks = dt.split(chunk_size, dim=1)
    B_chunks = B.split(chunk_size, dim=1)
    C_chunks = C.split(chunk_size, dim=1)
    state = None
    outputs = []
    for x_part, dt_part, B_part, C_part in zip(x_chunks, dt_chunks, B_chunks, C_chunks):
        # The state crosses from chunk to chunk here.
        y, state = ssd_chunk(state, x_part, dt_part, A, B_part, C_part)
        outputs.append(y)
    y = torch.cat(outputs, dim=1).flatten(2, 3)  # (b, l, heads, p)
    if D is not None:
        y = y + D[:, None].to(x.dtype) * x
    return y


# ---------------------------------------------------------------------------------------------------
# 3. Token mixers
# ---------------------------------------------------------------------------------------------------


def upcast(x):
    """Return x in float32, or in float64 if it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class GatedRMSNorm(nn.Module):
    """RMSNorm(y * SiLU(z)) with a learned weight, in float32, by group; mamba-ssm's `RMSNormGated`."""

    def __init__(self, width, groups=1, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.groups = groups
        self.eps = eps

    def forward(self, y, z):
        gated = (upcast(y) * F.silu(upcast(z))).unflatten(-1, (self.groups, -1))
        normed = F.rms_norm(gated, gated.shape[-1:], eps=self.eps).flatten(-2)
        return normed.to(y.dtype) * self.weight.to(y.dtype)


class CausalConv1d(nn.Conv1d):
    """Depthwise causal convolution over a sequence (b, l, channels), with `nn.Conv1d`'s parameter names."""

    def forward(self, x):
        # As one line of pixels, channels last in memory, it takes a third of conv1d's time on a CPU.
        padded = F.pad(x, (0, 0, self.kernel_size[0] - 1, 0))  # zeros before the first token
        line = padded.mT[:, :, None]  # (b, channels, 1, l + kernel - 1)
        y = F.conv2d(line, self.weight[:, :, None], groups=self.groups)
        return y[:, :, 0].mT + self.bias.to(y.dtype)


class Mamba2(nn.Module):
    """The Mamba-2 layer, causal, over a sequence (b, l, d).

    Parameter names and shapes are those of mamba-ssm's `Mamba2` and transformers' `Mamba2Mixer`, so that
    weights move between them unchanged.

    Args:
        width: d.  d_state: n.  expand: inner width / d.  head_dim: p.
        d_conv: tokens that the convolution sees.  n_groups: how many B and C the heads share.
        chunk_size: tokens that the scan takes at once (without mamba-ssm at most 64); the result is the same.
    """

    def __init__(self, width, d_state=256, expand=2, head_dim=64, d_conv=4, n_groups=1, chunk_size=256):
        super().__init__()
        inner = expand * width
        self.d_state = d_state
        self.head_dim = head_dim
        self.n_groups = n_groups
        self.n_heads = inner // head_dim
        self.chunk_size = chunk_size
        conv_width = inner + 2 * n_groups * d_state
        self.split_sizes = [inner, conv_width, self.n_heads]  # z | x B C | dt
        self.in_proj = nn.Linear(width, sum(self.split_sizes), bias=False)
        self.conv1d = CausalConv1d(conv_width, conv_width, d_conv, groups=conv_width)
        self.dt_bias = nn.Parameter(torch.empty(self.n_heads))
        self.A_log = nn.Parameter(torch.empty(self.n_heads))
        self.D = nn.Parameter(torch.empty(self.n_heads))
        self.norm = GatedRMSNorm(inner, n_groups)
        self.out_proj = nn.Linear(inner, width, bias=False)
        self.reset_recurrence()

    @torch.no_grad()
    def reset_recurrence(self, dt_min=1e-3, dt_max=0.1, A_range=(1, 16)):
        """Initialise as mamba-ssm does: dt log-uniform in [dt_min, dt_max], A uniform in A_range, D one."""
        log_dt = torch.rand(self.n_heads) * (math.log(dt_max) - math.log(dt_min)) + math.log(dt_min)
        dt = log_dt.exp()
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        self.A_log.copy_(torch.empty(self.n_heads).uniform_(*A_range).log())
        self.D.fill_(1.0)

    def _apply(self, fn, recurse=True):
        """Keep A_log and dt_bias in float32 at least, whatever dtype a library asks for.

        Rounded to bfloat16 they would change every decay of a long sequence.
        """
        exact = {"A_log": self.A_log.data, "dt_bias": self.dt_bias.data}
        super()._apply(fn, recurse)
        for name, value in exact.items():
            parameter = getattr(self, name)
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = value.to(parameter.device)
        return self

    def scan(self, xBC, dt):
        """Convolve xBC (b, l, conv_width), then run the recurrence with dt (b, l, heads): y (b, l, inner)."""
        inner = self.n_heads * self.head_dim
        states = self.n_groups * self.d_state
        x, B, C = F.silu(self.conv1d(xBC)).split([inner, states, states], dim=-1)
        x = x.unflatten(-1, (self.n_heads, self.head_dim))  # (b, l, heads, p)
        B = B.unflatten(-1, (self.n_groups, self.d_state))  # (b, l, groups, n)
        C = C.unflatten(-1, (self.n_groups, self.d_state))
        dt = F.softplus(upcast(dt) + upcast(self.dt_bias))  # (b, l, heads)
        A = -upcast(self.A_log).exp()  # (heads,)
        kernel = scan_kernel(x.device, x.dtype)
        if kernel is not None:
            return kernel(x, dt, A, B, C, self.chunk_size, D=self.D).flatten(2)
        # In plain PyTorch a chunk's matrices should stay in a CPU's cache, so chunks are 64 tokens at most.
        return ssd(x, dt, A, B, C, min(self.chunk_size, 64), D=self.D).flatten(2)

    def forward(self, u, backward=(False,)):
        """Map u (b, l, d) to (b, l, d), the sum of all scans.

        backward: one entry for each scan; True reads from the last token to the first.

        All scans share all weights. in_proj and norm see one token at a time, so they commute with the
        reversal: only convolution and recurrence run once for each direction, as one larger batch.
        """
        z, xBC, dt = self.in_proj(u).split(self.split_sizes, dim=-1)
        # The direction is reversed here: a copy of the sequence for each scan, stacked along the batch.
        xBC = torch.cat([xBC.flip(1) if reverse else xBC for reverse in backward])
        dt = torch.cat([dt.flip(1) if reverse else dt for reverse in backward])
        scans = self.scan(xBC, dt).chunk(len(backward))  # each (b, l, inner)
        # Turned back, token i is at place i in every scan, and meets its own z.
        scans = [y.flip(1) if reverse else y for y, reverse in zip(scans, backward)]
        total = sum(self.norm(y, z) for y in scans)
        # out_proj is linear without a bias: projecting the sum once equals summing two projections.
        return self.out_proj(total)


# letter -> (raster of the image, for each scan: is it read backwards?)
SCANS = {
    "W": ("rows", (False, True)),  # width-first, both ways
    "H": ("columns", (False, True)),  # height-first, both ways
    ">": ("rows", (False,)),
    "<": ("rows", (True,)),
    "v": ("columns", (False,)),
    "^": ("columns", (True,)),
}


class MambaMixer(nn.Module):
    """Mamba-2 over the raster of an image's tokens (b, rows * columns, d).

    letter: see `SCANS`. Two scans share their weights and are fused by a linear layer (`fuse`) on their sum
    (paper 3.3; the sum instead of the concatenation is our choice, it gives the paper's 0.7B).
    """

    def __init__(self, letter, width, **mamba):
        super().__init__()
        self.raster, self.backward = SCANS[letter]
        self.mamba = Mamba2(width, **mamba)
        self.fuse = nn.Linear(width, width) if len(self.backward) == 2 else nn.Identity()

    def forward(self, h, grid):
        rows, columns = grid
        if self.raster == "columns":  # transpose the grid: its columns follow one another
            h = h.unflatten(1, (rows, columns)).transpose(1, 2).flatten(1, 2)
        h = self.fuse(self.mamba(h, self.backward))
        if self.raster == "columns":
            h = h.unflatten(1, (columns, rows)).transpose(1, 2).flatten(1, 2)
        return h

    @torch.no_grad()
    def fold(self):
        """Make one matrix of `out_proj` and `fuse`, for sampling. The result is not to be saved."""
        if isinstance(self.fuse, nn.Linear):
            out_proj = self.mamba.out_proj
            out_proj.weight = nn.Parameter(self.fuse.weight @ out_proj.weight)
            out_proj.bias = self.fuse.bias
            self.fuse = nn.Identity()


def attention(q, k, v, heads, mask=None):
    """Return multi-head softmax attention (b, l, d).

    q (b, l, d), k and v (b, s, d), mask that broadcasts to (b, heads, l, s).
    """
    q = q.unflatten(-1, (heads, -1))  # (b, l, heads, d / heads)
    k = k.unflatten(-1, (heads, -1))
    v = v.unflatten(-1, (heads, -1))
    kernel = attention_kernel(q.device, q.dtype) if mask is None else None
    if kernel is not None:
        return kernel(q, k, v).flatten(2)
    q = q.transpose(1, 2)  # (b, heads, l, d / heads)
    k = k.transpose(1, 2)
    v = v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Self-attention (mixer `S`) or, given a text, cross-attention to it; diffusers' parameter names.

    float32: keep softmax(q k^T) v out of autocast, as PixArt trains. It has no effect without autocast.
    """

    def __init__(self, width, heads, float32=False):
        super().__init__()
        self.heads = heads
        self.float32 = float32
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, h, grid=None, text=None, mask=None):
        """Attend from h (b, l, d) to itself or to text (b, s, d); mask broadcasts to (b, heads, l, s)."""
        source = h if text is None else text
        q = self.to_q(h)
        k = self.to_k(source)
        v = self.to_v(source)
        if self.float32 and torch.is_autocast_enabled(h.device.type):
            with torch.autocast(h.device.type, enabled=False):
                mixed = attention(q.float(), k.float(), v.float(), self.heads, mask)
        else:
            mixed = attention(q, k, v, self.heads, mask)
        return self.to_out[0](mixed)


# ---------------------------------------------------------------------------------------------------
# 4. The backbone
# ---------------------------------------------------------------------------------------------------


class MLP(nn.Module):
    """Linear, GELU(tanh), Linear."""

    def __init__(self, width_in, hidden, width_out):
        super().__init__()
        self.linear_1 = nn.Linear(width_in, hidden)
        self.linear_2 = nn.Linear(hidden, width_out)

    def forward(self, x):
        return self.linear_2(F.gelu(self.linear_1(x), approximate="tanh"))


def sinusoid(values, channels=256):
    """Embed numbers (b,) as (b, channels): cosines, then sines; diffusers' `Timesteps`, flip_sin_to_cos."""
    k = torch.arange(channels // 2, device=values.device)
    frequencies = torch.exp(-math.log(10000) * k / (channels // 2))
    angles = values[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimestepEmbedder(nn.Module):
    """Embedding of one number per image, (b,), as (b, width) in `dtype`: sinusoid, Linear, SiLU, Linear."""

    def __init__(self, width):
        super().__init__()
        self.linear_1 = nn.Linear(256, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, values, dtype):
        return self.linear_2(F.silu(self.linear_1(sinusoid(values).to(dtype))))


def modulate(h, shift, scale):
    """Return adaLN, LN(h) * (1 + scale) + shift, with shift and scale (b, 1, d)."""
    return F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Block(nn.Module):
    """One PixArt block around any token mixer (Fig. 2):

    h = h + gate1 * Mixer(LN(h) * (1 + scale1) + shift1)
    h = h + CrossAttention(h, text)
    h = h + gate2 * MLP(LN(h) * (1 + scale2) + shift2)
    """

    def __init__(self, letter, width, heads, mlp_ratio, float32_attention, mamba):
        super().__init__()
        if letter == "S":
            self.mixer = Attention(width, heads, float32_attention)
        else:
            self.mixer = MambaMixer(letter, width, **mamba)
        self.cross_attention = Attention(width, heads)
        self.mlp = MLP(width, mlp_ratio * width, width)
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def forward(self, h, modulation, text, mask, grid):
        """Return h, the mixer's input and output, (b, l, d) each.  modulation (b, 6, d), text (b, s, d)."""
        six = (self.scale_shift_table + modulation).chunk(6, dim=1)
        shift1, scale1, gate1, shift2, scale2, gate2 = six  # each (b, 1, d)
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
    the output of diffusers' `PixArtTransformer2DModel`. It works at any grid.

    Args, of the network:
        pattern: one letter for each block.  width, heads, mlp_ratio: as in DiT.
        patch_size, in_channels, out_channels: latent pixels a token covers along a side, latent channels in,
            channels out (PixArt-alpha has 8: noise and variance).
        caption_width: width of the text encoder's features.
        d_state, expand, head_dim, d_conv, n_groups, chunk_size: see `Mamba2`.
        float32_attention: see `Attention`; self-attention only.
        pos_embed: "centered" (any size, zero-shot resolution) or "pixart" (the teacher's index grid).
        sample_size: latent side that it was last trained at (64 -> 512 px with an 8x VAE).
        interpolation_scale: coordinates run over sample_size / patch_size / interpolation_scale, so doubling
            both size and scale keeps them. If None: max(sample_size // 64, 1), as in diffusers.
        use_additional_conditions: PixArt 1024's size and aspect embeddings; True at sample_size 128 if None.
    Args that config.json carries for the sampler, and the network ignores:
        beta_schedule: "linear" (teacher) or "scaled_linear" (quadratic, after adaptation).
        guidance, guidance_interval: classifier-free guidance, and the timestep below which there is none.
        renoise: the timestep that progressive sampling goes back to with an enlarged picture.
        timestep_shift: how far the sampler's steps are moved up to much noise; 1: evenly spaced.
        vae, text_encoder: what it was trained with: folder (relative to the checkpoint's own) or repository.
    """

    # A pipeline is saved under this name, also one whose copy of this file diffusers loaded.
    __module__ = "t2md"
    _supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _repeated_blocks = ["Block"]  # for diffusers' compile_repeated_blocks
    _keep_in_fp32_modules = ["A_log", "dt_bias"]  # for diffusers' from_pretrained(torch_dtype=...)

    # fmt: off
    @register_to_config
    def __init__(
        self,
        # the network
        pattern="SHWHWHW" * 4, width=1152, heads=16, mlp_ratio=4,
        patch_size=2, in_channels=4, out_channels=4, caption_width=4096,
        d_state=256, expand=2, head_dim=64, d_conv=4, n_groups=1, chunk_size=256,
        float32_attention=False, pos_embed="centered",
        sample_size=64, interpolation_scale=None, use_additional_conditions=None,
        # the sampler
        beta_schedule="linear", guidance=4.5, guidance_interval=0, renoise=500, timestep_shift=1.0,
        vae=None, text_encoder=None,
    ):
        # fmt: on
        super().__init__()
        check_arguments(self.config)
        self.base = sample_size // patch_size  # tokens along a side at the base resolution
        self.interpolation_scale = interpolation_scale or max(sample_size // 64, 1)
        self.conditioned_on_size = use_additional_conditions
        if use_additional_conditions is None:
            self.conditioned_on_size = sample_size == 128
        self.gradient_checkpointing = False
        mamba = dict(d_state=d_state, expand=expand, head_dim=head_dim)
        mamba.update(d_conv=d_conv, n_groups=n_groups, chunk_size=chunk_size)

        self.patch_embed = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        self.caption_projection = MLP(caption_width, width, width)
        self.timestep_embedder = TimestepEmbedder(width)
        if self.conditioned_on_size:
            self.resolution_embedder = TimestepEmbedder(width // 3)
            self.aspect_ratio_embedder = TimestepEmbedder(width // 3)
        self.adaln_single = nn.Linear(width, 6 * width)
        blocks = [Block(letter, width, heads, mlp_ratio, float32_attention, mamba) for letter in pattern]
        self.blocks = nn.ModuleList(blocks)
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.proj_out = nn.Linear(width, patch_size**2 * out_channels)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Initialise as DiT and PixArt do, for training from scratch; a checkpoint overwrites all of it.

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
        """Return what this model was made with: type(model)(**model.arguments()) has fresh weights."""
        return {name: value for name, value in self.config.items() if not name.startswith("_")}

    def save_pretrained(self, folder, **kwargs):
        """Save as diffusers does, and this file along, so that `trust_remote_code=True` loads it anywhere."""
        super().save_pretrained(folder, **kwargs)
        shutil.copy(os.path.abspath(__file__), os.path.join(folder, "t2md.py"))

    def patchify(self, hidden_states):
        """Turn latents (b, c, height, width) into tokens with positions (b, l, d), grid (rows, columns)."""
        p = self.config.patch_size
        height, width = hidden_states.shape[-2:]
        if height % p or width % p:
            raise ValueError(f"latents of {height} x {width} cannot be cut into patches of {p} x {p}")
        h = self.patch_embed(hidden_states)  # (b, d, rows, columns)
        rows, columns = h.shape[-2:]
        h = h.flatten(2).transpose(1, 2)  # (b, l, d)
        position = position_embedding(
            self.config.pos_embed,
            rows,
            columns,
            self.config.width,
            self.base,
            self.interpolation_scale,
            h.device,
            h.dtype,
        )
        return h + position, (rows, columns)

    def embed_time(self, timestep, h, added_cond_kwargs):
        """Return the embedding (b, d) of timesteps and size, and the blocks' modulation (b, 6, d)."""
        batch = len(h)
        timestep = torch.as_tensor(timestep, device=h.device).expand(batch)
        embedding = self.timestep_embedder(timestep, h.dtype)
        if self.conditioned_on_size:
            if not added_cond_kwargs or added_cond_kwargs.get("resolution") is None:
                needed = "added_cond_kwargs needs resolution (b, 2) and aspect_ratio (b, 1)"
                raise ValueError(f"this model is conditioned on size: {needed}")
            resolution = self.resolution_embedder(added_cond_kwargs["resolution"].flatten(), h.dtype)
            aspect_ratio = self.aspect_ratio_embedder(added_cond_kwargs["aspect_ratio"].flatten(), h.dtype)
            size = torch.cat([resolution.view(batch, -1), aspect_ratio.view(batch, -1)], dim=1)
            embedding = embedding + size
        modulation = self.adaln_single(F.silu(embedding)).unflatten(1, (6, -1))
        return embedding, modulation

    def unpatchify(self, h, embedding, grid):
        """Turn the last block's tokens (b, l, d) into (b, out_channels, height, width).  embedding (b, d)."""
        rows, columns = grid
        p = self.config.patch_size
        channels = self.config.out_channels
        shift, scale = (self.scale_shift_table + embedding[:, None]).chunk(2, dim=1)  # each (b, 1, d)
        patches = self.proj_out(modulate(h, shift, scale))  # (b, l, p * p * channels)
        patches = patches.view(len(h), rows, columns, p, p, channels)
        pixels = torch.einsum("byxpqc->bcypxq", patches)
        return pixels.reshape(len(h), channels, rows * p, columns * p)

    def checkpointed(self, module, *inputs):
        """Return module(*inputs); with gradient checkpointing its inside is computed again when needed."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(module, *inputs)
        return module(*inputs)

    # fmt: off
    def forward(self, hidden_states, encoder_hidden_states, timestep, added_cond_kwargs=None,
                encoder_attention_mask=None, return_dict=True, return_mixers=False):
        # fmt: on
        """Predict the noise. The signature is that of diffusers' PixArtTransformer2DModel.

        Args:
            hidden_states: noisy latents (b, c, height, width), sides multiples of patch_size.
            encoder_hidden_states: caption features (b, s, caption_width).
            encoder_attention_mask: (b, s), 1 = token, 0 = padding; or diffusers' bias (b, 1, s).
            timestep: (b,) or a scalar, in [0, 1000).
            added_cond_kwargs: {"resolution": (b, 2) pixels, "aspect_ratio": (b, 1)} for PixArt-1024 weights.
            return_mixers: what distillation needs: return the sample and for each block n its mixer's input
                h_n and output, both (b, l, d).
        Returns Transformer2DModelOutput with `sample` (b, out_channels, height, width), or a 1-tuple.
        """
        h, grid = self.patchify(hidden_states)  # (b, l, d)
        embedding, modulation = self.embed_time(timestep, h, added_cond_kwargs)  # (b, d), (b, 6, d)
        text = self.caption_projection(encoder_hidden_states)  # (b, s, d)
        mask = attention_mask(encoder_attention_mask, text.dtype)  # broadcasts to (b, heads, l, s)

        mixers = []
        for block in self.blocks:
            h, mixer_input, mixer_output = self.checkpointed(block, h, modulation, text, mask, grid)
            if return_mixers:
                mixers.append((mixer_input, mixer_output))

        sample = self.unpatchify(h, embedding, grid)
        if return_mixers:
            return sample, mixers
        if return_dict:
            return Transformer2DModelOutput(sample=sample)
        return (sample,)


def check_arguments(config):
    """Raise ValueError, in one sentence, if T2MD's arguments do not fit each other."""
    unknown = sorted(set(config.pattern) - {"S", *SCANS})
    if unknown or not config.pattern:
        raise ValueError(f"pattern {config.pattern!r} must be made of the letters S {' '.join(SCANS)}")
    if config.width % config.heads or config.width % 4:
        raise ValueError(f"width {config.width} must be a multiple of 4 and of the {config.heads} heads")
    if set(config.pattern) != {"S"}:
        inner = config.expand * config.width
        if inner % config.head_dim:
            raise ValueError(f"Mamba's inner width {inner} must be a multiple of head_dim {config.head_dim}")
        heads = inner // config.head_dim
        if heads % config.n_groups:
            raise ValueError(f"Mamba's {heads} heads must be a multiple of n_groups {config.n_groups}")
    if config.pos_embed not in COORDINATES:
        raise ValueError(f"pos_embed {config.pos_embed!r} must be one of {', '.join(COORDINATES)}")


def attention_mask(mask, dtype):
    """Turn a mask of tokens (b, s), or diffusers' bias (b, 1, s), or None into what `attention` takes."""
    if mask is None:
        return None
    if mask.ndim == 2:
        return mask[:, None, None].bool()  # (b, 1, 1, s), True where there is a token
    return mask[:, None].to(dtype)  # (b, 1, 1, s), added to the logits


# ---------------------------------------------------------------------------------------------------
# 5. Losses. z_t (b, c, height, width); squared norms are means over elements
# ---------------------------------------------------------------------------------------------------


def predict_noise(model, z_t, t, text, mask, return_mixers=False, **conditions):
    """Return epsilon(z_t, t, tau), (b, c, height, width); of a model with learned variance the noise half.

    text (b, s, caption_width), mask (b, s).  conditions: see `size_conditions`.
    With return_mixers returns the noise and [(input, output)] of each block's mixer, (b, l, d) each.
    """
    inputs = dict(
        hidden_states=z_t,
        encoder_hidden_states=text,
        timestep=t,
        added_cond_kwargs=conditions or None,
        encoder_attention_mask=mask,
        return_dict=False,
    )
    channels = z_t.shape[1]
    if return_mixers:
        sample, mixers = model(**inputs, return_mixers=True)
        return sample[:, :channels], mixers
    (sample,) = model(**inputs)
    return sample[:, :channels]


def size_conditions(model, height, width, batch):
    """Return PixArt-1024's conditions for `batch` images of height x width pixels; {} if it has none."""
    if not model.conditioned_on_size:
        return {}
    sizes = torch.tensor([[height, width, height / width]] * batch, device=model.device, dtype=model.dtype)
    return dict(resolution=sizes[:, :2], aspect_ratio=sizes[:, 2:])


def mean_square(a, b):
    """Return || a - b ||^2 as used everywhere here: the mean over elements, in float32 at least."""
    return F.mse_loss(upcast(a), upcast(b))


def forcing_loss(student, teacher, z_t, t, text, mask, **conditions):
    """Equation 6, layer-level teacher forcing: sum over Mamba blocks n of ||Mamba_n(h'_n) - SA'_n(h'_n)||^2.

    h'_n is the TEACHER's input to its n-th mixer (equation 5), fed to both.
    """
    with torch.no_grad():
        _, teacher_mixers = predict_noise(teacher, z_t, t, text, mask, return_mixers=True, **conditions)
    rows = z_t.shape[2] // student.config.patch_size
    columns = z_t.shape[3] // student.config.patch_size
    loss = 0.0
    for n, letter in enumerate(student.config.pattern):
        if letter != "S":
            h, target = teacher_mixers[n]
            output = student.checkpointed(student.blocks[n].mixer, h, (rows, columns))
            loss = loss + mean_square(output, target)
    return loss


def mse_loss(noise, student_noise):
    """Equation 8, the diffusion loss: ||eps - eps_theta(z_t, t, tau)||^2."""
    return mean_square(student_noise, noise)


def soft_loss(teacher_noise, student_noise):
    """Equation 9 (the paper's pseudo loss): ||eps_theta'(z_t, t, tau) - eps_theta(z_t, t, tau)||^2."""
    return mean_square(student_noise, teacher_noise)


def mixer_loss(teacher_mixers, student_mixers):
    """Equation 10: 1/N sum over all N blocks n of ||SA'_n(h'_n) - Mixer_n(h_n)||^2, each on its OWN h.

    Both are [(input, output)] of each block's mixer; the outputs are compared.
    """
    total = 0.0
    for (_, target), (_, output) in zip(teacher_mixers, student_mixers, strict=True):
        total = total + mean_square(output, target)
    return total / len(student_mixers)


def kd_loss(student, teacher, z_t, t, text, mask, noise, soft_weight=0.5, mixer_weight=0.2, **conditions):
    """Equation 11: L_mse + 0.5 L_soft + 0.2 L_mixer. Return it, and its terms {"mse", "soft", "mixer"}."""
    inputs = dict(z_t=z_t, t=t, text=text, mask=mask, return_mixers=True, **conditions)
    with torch.no_grad():
        teacher_noise, teacher_mixers = predict_noise(teacher, **inputs)
    student_noise, student_mixers = predict_noise(student, **inputs)
    mse = mse_loss(noise, student_noise)
    soft = soft_loss(teacher_noise, student_noise)
    mixer = mixer_loss(teacher_mixers, student_mixers)
    loss = mse + soft_weight * soft + mixer_weight * mixer
    return loss, dict(mse=mse.detach(), soft=soft.detach(), mixer=mixer.detach())


# ---------------------------------------------------------------------------------------------------
# 6. From a teacher to a student
# ---------------------------------------------------------------------------------------------------

# diffusers' name -> ours, for whatever is not the same
PIXART_NAMES = {
    "transformer_blocks.": "blocks.",
    ".attn1.": ".mixer.",
    ".attn2.": ".cross_attention.",
    ".ff.net.0.proj.": ".mlp.linear_1.",
    ".ff.net.2.": ".mlp.linear_2.",
    "pos_embed.proj.": "patch_embed.",
    "adaln_single.linear.": "adaln_single.",
    "adaln_single.emb.": "",
}


def rename_pixart(weights):
    """Rename the state dict of a diffusers PixArtTransformer2DModel to that of the equivalent T2MD."""
    renamed = {}
    for name, weight in weights.items():
        for diffusers_name, our_name in PIXART_NAMES.items():
            name = name.replace(diffusers_name, our_name)
        renamed[name] = weight
    renamed.pop("pos_embed.pos_embed", None)  # computed, not learned
    return renamed


def student_of(teacher, pattern, model_class=T2MD, **arguments):
    """Make a student with all of the teacher's weights, except mixers whose letter changes: those are fresh.

    DiM's additions are fresh too. It predicts the noise only.

    Args:
        teacher: a T2MD.  pattern: the student's mixers, a letter for each block.
        model_class: T2MD or DiM.  arguments: any argument of that class, such as Mamba's shape.
    """
    if len(pattern) != len(teacher.blocks):
        blocks = len(teacher.blocks)
        raise ValueError(f"{pattern} has {len(pattern)} letters, but the teacher has {blocks} blocks")
    of_student = teacher.arguments()
    of_student.update(pattern=pattern, out_channels=teacher.config.in_channels)
    of_student.update(arguments)
    student = model_class(**of_student)
    weights = student.state_dict()
    for name, weight in teacher.state_dict().items():
        if ".mixer." not in name:
            weights[name] = weight
    for name in ("proj_out.weight", "proj_out.bias"):
        weights[name] = noise_rows(weights[name], teacher.config.out_channels, student.config.out_channels)
    student.load_state_dict(weights)
    for n, letter in enumerate(pattern):
        if letter == teacher.config.pattern[n]:
            student.blocks[n].mixer.load_state_dict(teacher.blocks[n].mixer.state_dict())
    return student


def noise_rows(weight, channels, noise_channels):
    """Return the rows of the output layer that predict the noise; all are (p, p, channel), noise first."""
    return weight.unflatten(0, (-1, channels))[:, :noise_channels].flatten(0, 1)


@torch.no_grad()
def copy_attention(mixer, attention):
    """Initialise a MambaMixer as Mamba in the Llama: C <- W_q, B <- W_k, x <- W_v, out_proj <- W_o.

    The mixer must have the attention's geometry (`llama_shape`). The rest keeps its own initialisation, but
    `fuse` starts as the mean of both directions plus W_o's bias. The biases of W_q, W_k and W_v are dropped:
    in_proj has none.
    """
    mamba = mixer.mamba
    z, _, dt = mamba.in_proj.weight.split(mamba.split_sizes)
    in_proj = torch.cat([z, attention.to_v.weight, attention.to_k.weight, attention.to_q.weight, dt])
    mamba.in_proj.weight.copy_(in_proj)
    mamba.out_proj.weight.copy_(attention.to_out[0].weight)
    if isinstance(mixer.fuse, nn.Linear):
        nn.init.eye_(mixer.fuse.weight)
        mixer.fuse.weight.mul_(0.5)
        mixer.fuse.bias.copy_(attention.to_out[0].bias)


def llama_shape(teacher):
    """Return Mamba's arguments of the teacher's attention's geometry: a group and a state for each head."""
    head_width = teacher.config.width // teacher.config.heads
    return dict(expand=1, d_state=head_width, head_dim=head_width, n_groups=teacher.config.heads)


def fit_ends(model, latent_channels, caption_width):
    """Return `model` with new layers where another VAE's latents or another T5's features do not fit.

    Other latents need new patch_embed and proj_out, other features a new first layer of caption_projection.
    The config of the result has the new widths.
    """
    fits = model.config.in_channels == latent_channels and model.config.caption_width == caption_width
    if fits:
        return model
    arguments = model.arguments()
    arguments.update(in_channels=latent_channels, out_channels=latent_channels, caption_width=caption_width)
    fitted = type(model)(**arguments)
    weights = fitted.state_dict()
    for name, weight in model.state_dict().items():
        if weight.shape == weights[name].shape:
            weights[name] = weight
    fitted.load_state_dict(weights)
    return fitted


@torch.no_grad()
def translate_text(model, before, features, features_before):
    """Let `model` read a new T5's features as the model `before` reads the old T5's. Not in the paper.

    An affine map is fitted by least squares from the new T5's features of some tokens,
    (tokens, caption_width), to the old one's. caption_projection's first layer absorbs the map.
    """
    ones = torch.ones(len(features), 1)
    inputs = torch.cat([features, ones], dim=1).double()
    # Fit a correction of the identity: directions that the tokens do not span stay unchanged.
    identity = torch.eye(inputs.shape[1], features_before.shape[1], dtype=torch.float64)
    correction = torch.linalg.lstsq(inputs, features_before.double() - inputs @ identity).solution
    affine = (identity + correction).float()
    old = before.caption_projection.linear_1
    new = model.caption_projection.linear_1
    new.weight.copy_(old.weight @ affine[:-1].mT)
    new.bias.copy_(old.bias + old.weight @ affine[-1])


# ---------------------------------------------------------------------------------------------------
# 7. The frozen VAE and T5
# ---------------------------------------------------------------------------------------------------


class VAE:
    """A frozen AutoencoderKL (SD1.5's, SDXL's or a small one), in the latent units the denoiser works in.

    Agrees with diffusers' pipelines: latents are shifted by the VAE's own `shift_factor`, if it has one, and
    multiplied by its `scaling_factor`; neither is a literal here. It never runs in autocast.

    path_or_repo: a folder or repository with the VAE, or a whole pipeline that has one under `vae/`.
    Attributes: factor: image pixels per latent pixel, along one side.  channels: latent channels.  source.
    Only the config is read at first; the weights are loaded when they are needed (`model`).
    """

    def __init__(self, path_or_repo, device="cpu", dtype=torch.float32):
        self.source = path_or_repo
        self.device = device
        self.dtype = dtype
        self.lock = threading.Lock()  # tiling is a state of the model, and batches are made in threads
        stored = load_part(AutoencoderKL.load_config, path_or_repo, "vae")
        name = stored.get("_class_name", "AutoencoderKL")
        if name != "AutoencoderKL":
            raise ValueError(f"the VAE in {path_or_repo} is an {name}, and must be an AutoencoderKL")
        with torch.device("meta"):
            config = AutoencoderKL.from_config(stored).config  # entries that it lacks have their defaults
        if config.latents_mean is not None or config.latents_std is not None:
            what = "latents_mean or latents_std, which are not supported"
            raise ValueError(f"the VAE in {path_or_repo} has {what}")
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.channels = config.latent_channels
        self.scale = config.scaling_factor
        self.shift = config.shift_factor or 0.0

    @functools.cached_property
    def model(self):
        model = load_model(AutoencoderKL, self.source, "vae", torch_dtype=self.dtype)
        # With channels last in memory, convolutions on a CPU take two thirds of the time.
        model.to(self.device, memory_format=torch.channels_last)
        return model.eval().requires_grad_(False)

    def unload(self):
        """Let the weights go; they are loaded again if they are needed."""
        self.__dict__.pop("model", None)

    def set_tiling(self, side, tile):
        """Encode or decode next in tiles of `tile` pixels if the longer `side` exceeds it (None: never)."""
        self.model.use_tiling = tile is not None and side > tile
        if self.model.use_tiling:
            self.model.tile_sample_min_size = tile
            self.model.tile_latent_min_size = tile // self.factor

    @torch.no_grad()
    def moments(self, images, tile=None):
        """Encode images in [-1, 1], (b, 3, h, w): mean and deviation of q(z|x), each (b, c, h/f, w/f)."""
        with self.lock, torch.autocast(torch.device(self.device).type, enabled=False):
            self.set_tiling(max(images.shape[-2:]), tile)
            q = self.model.encode(images.to(self.device, self.dtype)).latent_dist
        mean = (q.mean.float() - self.shift) * self.scale
        std = q.std.float() * self.scale
        return mean, std

    @torch.no_grad()
    def decode(self, latents, tile=1024):
        """Decode latents (b, c, h/f, w/f) to images in [-1, 1], (b, 3, h, w).

        A side longer than `tile` pixels is decoded in overlapping, blended tiles (diffusers'); smaller tiles
        leave seams in flat skies.
        """
        latents = (latents / self.scale + self.shift).to(self.device, self.dtype)
        with self.lock, torch.autocast(torch.device(self.device).type, enabled=False):
            self.set_tiling(max(latents.shape[-2:]) * self.factor, tile)
            return self.model.decode(latents).sample.float().clamp(-1, 1)


class TextEncoder:
    """A frozen T5 encoder with its tokenizer. Captions are lower-cased and stripped, as diffusers does.

    path_or_repo: a folder or repository with both, or a pipeline with `text_encoder/` and `tokenizer/`.
    max_length: tokens kept of a caption (PixArt-alpha: 120).
    Attributes: width: of the features.  cut: how many captions were longer, so far.  source.
    Only config and tokenizer are read at first; the weights are loaded when they are needed (`model`).
    """

    def __init__(self, path_or_repo, max_length=120, device="cpu", dtype=torch.float32):
        self.source = path_or_repo
        self.max_length = max_length
        self.device = device
        self.dtype = dtype
        self.cut = 0
        self.lock = threading.Lock()  # batches are made in threads
        config = load_part(AutoConfig.from_pretrained, path_or_repo, "text_encoder")
        if config.model_type != "t5":
            raise ValueError(f"the text encoder in {path_or_repo} is a {config.model_type}, and must be a t5")
        self.width = config.d_model
        self.tokenizer = load_part(AutoTokenizer.from_pretrained, path_or_repo, "tokenizer")
        words = set(self.tokenizer.get_vocab()) - set(self.tokenizer.all_special_tokens)
        if len(words) < 2:  # transformers makes an empty one where there is none
            raise ValueError(f"{path_or_repo} lacks its tokenizer: spiece.model or tokenizer.json")

    @functools.cached_property
    def model(self):
        model = load_model(T5EncoderModel, self.source, "text_encoder", dtype=self.dtype)
        return model.to(self.device).eval().requires_grad_(False)

    def unload(self):
        """Let the weights go; they are loaded again if they are needed."""
        self.__dict__.pop("model", None)

    @torch.no_grad()
    def __call__(self, captions):
        """Encode b captions: features (b, s, width) and mask (b, s), 1 for a token, s <= max_length.

        s is the longest caption's length. diffusers' pipeline pads to 120 tokens, but masks the padding.
        """
        captions = [caption.lower().strip() for caption in captions]
        with self.lock, torch.autocast(torch.device(self.device).type, enabled=False):
            whole = self.tokenizer(captions, verbose=False)
            self.cut += sum(len(ids) > self.max_length for ids in whole.input_ids)
            tokens = self.tokenizer(
                captions, return_tensors="pt", padding="longest", truncation=True, max_length=self.max_length
            )
            tokens = tokens.to(self.device)
            out = self.model(tokens.input_ids, attention_mask=tokens.attention_mask)
        return out.last_hidden_state, tokens.attention_mask


def pad_features(features):
    """Pad a list of caption features (s_i, width) to features (b, s, width) and mask (b, s)."""
    masks = [torch.ones(len(one), dtype=torch.long) for one in features]
    padded = nn.utils.rnn.pad_sequence(features, batch_first=True)
    return padded, nn.utils.rnn.pad_sequence(masks, batch_first=True)


# ---------------------------------------------------------------------------------------------------
# 8. Loading
# ---------------------------------------------------------------------------------------------------


def load_part(load, path_or_repo, subfolder, **kwargs):
    """Return load(place, **kwargs); place is the pipeline's `subfolder`, or path_or_repo if it has none.

    load: a library's function, such as AutoTokenizer.from_pretrained.
    """
    if os.path.isfile(path_or_repo):
        raise ValueError(f"{path_or_repo} is a file; give the folder that holds the {subfolder}")
    if os.path.isdir(path_or_repo):
        inside = os.path.join(path_or_repo, subfolder)
        return load(inside if os.path.isdir(inside) else path_or_repo, **kwargs)
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", path_or_repo):
        hint = "a repository of the Hugging Face hub is given as owner/name"
        raise FileNotFoundError(f"there is no folder {path_or_repo} to load a {subfolder} from; {hint}")
    # transformers says by ValueError that a repository has no tokenizer there, diffusers by OSError.
    try:
        return load(path_or_repo, subfolder=subfolder, **kwargs)
    except (OSError, ValueError) as error:
        try:
            return load(path_or_repo, **kwargs)
        except (OSError, ValueError):
            reason = error.__cause__ or error.__context__ or error  # no network, which the error itself hides
            what = f"there is no folder {path_or_repo}, and no {subfolder} in a repository of that name"
            raise OSError(f"{what} could be loaded: {reason}") from error


def load_model(cls, path_or_repo, subfolder, **kwargs):
    """Like `load_part`, but raise ValueError if the checkpoint lacks weights (the libraries only warn)."""
    try:
        load = functools.partial(cls.from_pretrained, output_loading_info=True)
        model, info = load_part(load, path_or_repo, subfolder, **kwargs)
    except OSError as error:
        folders = [glob.escape(path_or_repo), glob.escape(os.path.join(path_or_repo, subfolder))]
        if any(glob.glob(f"{folder}/*.fp16.*") for folder in folders):
            advice = "take '.fp16' out of their names, or save the model without a variant"
            raise ValueError(f"{path_or_repo} holds its weights' fp16 variant alone: {advice}") from error
        raise
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(f"{path_or_repo} lacks {len(missing)} weights of {cls.__name__}: {missing[0]}")
    return model


def load_config(path_or_repo):
    """Return the entries of config.json, of a backbone or of a pipeline's transformer."""
    return load_part(T2MD.load_config, path_or_repo, "transformer")


def load_backbone(path_or_repo, **overrides):
    """Load the T2MD of a checkpoint, or of a diffusers PixArt transformer, whichever is there; in float32.

    overrides: any argument of T2MD that changes no weight, e.g. pos_embed="centered".
    """
    name = load_config(path_or_repo).get("_class_name")
    if name == "T2MD":
        return load_model(T2MD, path_or_repo, "transformer", torch_dtype=torch.float32, **overrides)
    if name == "DiM":
        return load_model(DiM, path_or_repo, "transformer", torch_dtype=torch.float32, **overrides)
    return from_pixart(path_or_repo, **overrides)


def from_pixart(path_or_repo, **overrides):
    """Load a teacher as a T2MD, from a diffusers PixArt transformer, or from a pipeline that has one.

    The learned null caption in PixArt-alpha's own files (y_embedding) is left out, as in diffusers.
    """
    check_scheduler(path_or_repo)
    pixart = load_model(PixArtTransformer2DModel, path_or_repo, "transformer", torch_dtype=torch.float32)
    config = pixart.config
    arguments = dict(
        pattern="S" * config.num_layers,
        width=config.num_attention_heads * config.attention_head_dim,
        heads=config.num_attention_heads,
        patch_size=config.patch_size,
        in_channels=config.in_channels,
        out_channels=config.out_channels or config.in_channels,
        caption_width=config.caption_channels,
        pos_embed="pixart",
        sample_size=config.sample_size,
        interpolation_scale=config.interpolation_scale,
        use_additional_conditions=config.use_additional_conditions,
    )
    arguments.update(overrides)
    teacher = T2MD(**arguments)
    teacher.load_state_dict(rename_pixart(pixart.state_dict()))
    return teacher


def check_scheduler(path_or_repo):
    """Raise ValueError if a pipeline's scheduler names another noise schedule or prediction than ours."""
    try:
        stored = load_part(DPMSolverMultistepScheduler.load_config, path_or_repo, "scheduler")
    except OSError:
        return  # a transformer without a pipeline says nothing of it
    known = dict(SCHEDULE, beta_schedule="linear", prediction_type="epsilon", rescale_betas_zero_snr=False)
    for name, value in known.items():
        if stored.get(name, value) != value:
            reason = f"its scheduler says {name} = {stored[name]}, and this method knows {value} only"
            raise ValueError(f"{path_or_repo} cannot be a teacher: {reason}")


def load_denoiser(path_or_repo, device="cpu", dtype=torch.float32, **overrides):
    """Load a checkpoint, or PixArt transformer, with `overrides` of its config, as a frozen, folded T2MD."""
    return freeze(load_backbone(path_or_repo, **overrides), device, dtype)


def freeze(model, device, dtype):
    """Freeze a T2MD for good, in place: fold its Mamba layers, and move it to `device` in `dtype`."""
    for block in model.blocks:
        if isinstance(block.mixer, MambaMixer):
            block.mixer.fold()
    model.eval().requires_grad_(False)
    # Not diffusers' own `to`, which warns of the float32 parameters that Mamba2 takes care of.
    return nn.Module.to(model, device, dtype)


def component_path(checkpoint, reference):
    """Return where a checkpoint's VAE or text encoder is: a folder relative to it, or a repository.

    A plain PixArt pipeline names none (None): its parts are in the pipeline itself.
    """
    if reference is None:
        return checkpoint
    beside = os.path.normpath(os.path.join(checkpoint, reference))
    if os.path.isdir(beside):
        return beside
    if reference.startswith("."):
        named = f"{checkpoint} names its VAE and text encoder relative to itself, and there is no {beside}"
        raise FileNotFoundError(f"{named}: copy it along, give --vae and --text-encoder, or use --export")
    return reference


def load_parts(model, folder, device="cpu", dtype=torch.float32):
    """Return the frozen (VAE, TextEncoder) that the config of the checkpoint in `folder` names.

    The text encoder is in `dtype`; the VAE in float32, as SDXL's overflows in less.
    """
    vae = VAE(component_path(folder, model.config.vae), device)
    text_encoder = TextEncoder(component_path(folder, model.config.text_encoder), device=device, dtype=dtype)
    check_widths(model, vae, text_encoder)
    return vae, text_encoder


def check_widths(model, vae, text_encoder):
    """Raise ValueError if a model does not fit its VAE's latents, or its text encoder's features."""
    if vae.channels != model.config.in_channels:
        expected = f"the model's in_channels are {model.config.in_channels}"
        raise ValueError(f"the VAE {vae.source} has {vae.channels} latent channels, but {expected}")
    if text_encoder.width != model.config.caption_width:
        width = f"width {text_encoder.width}, but the model's caption_width is {model.config.caption_width}"
        raise ValueError(f"the text encoder {text_encoder.source} has {width}")


# ---------------------------------------------------------------------------------------------------
# 9. Optional kernels
# ---------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=None)
def optional_kernel(module, name):
    """Return a function of an optional `module`; None if it is not there or (said) cannot be imported."""
    if importlib.util.find_spec(module.split(".")[0]) is None:
        return None
    compiled = "selective_scan_cuda"  # Mamba-1's: mamba_ssm imports it, a build may lack it, nobody calls it
    try:
        if compiled not in sys.modules and importlib.util.find_spec(compiled) is None:
            sys.modules[compiled] = types.ModuleType(compiled)
        return torch.compiler.disable(getattr(importlib.import_module(module), name))
    except Exception as error:  # built against another torch or Triton, a package raises anything
        print(f"{module} is installed but cannot be imported, going on without: {error!r}", file=sys.stderr)
        return None


def scan_kernel(device, dtype):
    """Return mamba-ssm's scan where it can run, or None."""
    if torch.device(device).type != "cuda" or dtype == torch.float64:
        return None
    return optional_kernel("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")


def attention_kernel(device, dtype):
    """Return flash-attn's attention where it can run, or None."""
    if torch.device(device).type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return None
    return optional_kernel("flash_attn", "flash_attn_func")


def kernels_in_use(device, dtype, float32_attention=False):
    """Return a line that says what computes scan and self-attention."""
    scan = "mamba-ssm" if scan_kernel(device, dtype) else "plain PyTorch"
    attention_dtype = torch.float32 if float32_attention else dtype
    attention = "flash-attn" if attention_kernel(device, attention_dtype) else "PyTorch SDPA"
    if attention_dtype != dtype:
        attention += " in float32"
    return f"{device} in {str(dtype).removeprefix('torch.')}: scan by {scan}, self-attention by {attention}"


# ---------------------------------------------------------------------------------------------------
# 10. DiM's additions, off in T2MD
# ---------------------------------------------------------------------------------------------------


class PaddingTokens(nn.Module):
    """DiM's padding: 3 learned tokens end each row and each column of the grid.

    So a convolution of 4 tokens does not reach from one line into the next. The grid (rows, columns) becomes
    (rows + 3, columns + 3): every row ends in p0, p1, p2, and row `rows + k` holds p_k before them.
    """

    def __init__(self, width):
        super().__init__()
        self.tokens = nn.Parameter(0.02 * torch.randn(3, width))

    def forward(self, h, grid):
        """Turn (b, rows * columns, d) into (b, (rows+3) * (columns+3), d), and return the new grid too."""
        rows, columns = grid
        batch, _, width = h.shape
        below = self.tokens[:, None].expand(batch, 3, columns, width)
        beside = self.tokens.expand(batch, rows + 3, 3, width)
        h = torch.cat([h.unflatten(1, grid), below], dim=1)
        h = torch.cat([h, beside], dim=2)
        return h.flatten(1, 2), (rows + 3, columns + 3)

    @staticmethod
    def remove(h, grid):
        """Turn (b, (rows+3) * (columns+3), d) of the padded grid into (b, rows * columns, d)."""
        return h.unflatten(1, grid)[:, :-3, :-3].flatten(1, 2)


class LocalEnhancement(nn.Module):
    """DiM's depthwise 3x3 convolution over a grid of tokens (b, rows * columns, d), at first the identity."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width)
        nn.init.dirac_(self.conv.weight, groups=width)
        nn.init.zeros_(self.conv.bias)

    def forward(self, h, grid):
        return self.conv(h.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)


class DiM(T2MD):
    """T2MD with DiM's padding tokens and local enhancement.  Args: both switches; then T2MD's."""

    __module__ = "t2md"  # see T2MD

    def __init__(self, padding_tokens=False, local_enhancement=False, **arguments):
        super().__init__(**arguments)
        self.register_to_config(padding_tokens=padding_tokens, local_enhancement=local_enhancement)
        width = self.config.width
        self.padding = PaddingTokens(width) if padding_tokens else None
        self.enhance_first = LocalEnhancement(width) if local_enhancement else None
        self.enhance_last = LocalEnhancement(width) if local_enhancement else None

    @staticmethod
    def _get_init_keys(cls):  # diffusers takes these from a config
        return ConfigMixin._get_init_keys(T2MD) | {"padding_tokens", "local_enhancement"}

    def patchify(self, hidden_states):
        h, grid = super().patchify(hidden_states)
        if self.enhance_first is not None:
            h = self.enhance_first(h, grid)
        if self.padding is not None:
            h, grid = self.padding(h, grid)
        return h, grid

    def unpatchify(self, h, embedding, grid):
        if self.padding is not None:
            h = self.padding.remove(h, grid)
            grid = (grid[0] - 3, grid[1] - 3)
        if self.enhance_last is not None:
            h = self.enhance_last(h, grid)
        return super().unpatchify(h, embedding, grid)

    def forward(self, hidden_states, *args, return_mixers=False, **kwargs):
        """Do as T2MD; the mixers' inputs and outputs are those of the image's tokens, without padding."""
        result = super().forward(hidden_states, *args, return_mixers=return_mixers, **kwargs)
        if self.padding is None or not return_mixers:
            return result
        sample, mixers = result
        rows = hidden_states.shape[2] // self.config.patch_size
        columns = hidden_states.shape[3] // self.config.patch_size
        padded = (rows + 3, columns + 3)
        unpadded = []
        for mixer_input, mixer_output in mixers:
            mixer_input = self.padding.remove(mixer_input, padded)
            mixer_output = self.padding.remove(mixer_output, padded)
            unpadded.append((mixer_input, mixer_output))
        return sample, unpadded


# ---------------------------------------------------------------------------------------------------
# 11. Pooled pictures: upsample guidance, and a loss of the shapes world. Not in the paper
# ---------------------------------------------------------------------------------------------------

LAYOUT = 300  # timestep from which on a picture's layout is open; below it only outlines are


def pool_noisy(z_t, t, alphas_cumprod, m):
    """Return z_t, pooled to (b, c, height / m, width / m), and the timestep of a picture as noisy as that.

    z_t: (b, c, height, width).  t: one timestep, or (b,).
    The mean of m x m latents is about the smaller picture's latent, and it averages the noise. So its SNR is
    m^2 times that of z_t. It is scaled to what the forward process makes of a smaller picture. From upsample
    guidance (2404.01709), as in DiM.
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    matched = (snr - m**2 * snr[t][..., None]).abs().argmin(-1)
    power = alphas_cumprod[t] + (1 - alphas_cumprod[t]) / m**2  # of a pooled z_t, per element
    deviation = power.sqrt().to(z_t).view(-1, 1, 1, 1)  # one for each image, or one for all
    return F.avg_pool2d(z_t, m) / deviation, matched


def pooled_loss(predicted, smaller, schedule, m, z_t, t, text, mask, **conditions):
    """Return how far predicted noise, pooled, is from what a model of the smaller size predicts, (b,).

    predicted: noise in z_t, (b, c, height, width).  smaller: the model that training began with, frozen; its
    side is height / m, and `conditions` are its own (see `size_conditions`).  schedule: diffusers', of both.
    `smaller` knows where things are. Outlines of the larger size it does not know, so nothing is asked below
    timestep LAYOUT of the pooled picture.
    """
    unit = m * smaller.config.patch_size
    rows = z_t.shape[2] // unit * unit
    columns = z_t.shape[3] // unit * unit
    alphas_cumprod = schedule.alphas_cumprod.to(z_t.device)
    pooled, matched = pool_noisy(z_t[:, :, :rows, :columns], t, alphas_cumprod, m)
    with torch.no_grad():
        target = predict_noise(smaller, pooled, matched, text, mask, **conditions)
    own = m * F.avg_pool2d(upcast(predicted)[:, :, :rows, :columns], m)  # of deviation 1, as `target`
    errors = (own - upcast(target)).square().mean(dim=(1, 2, 3))
    return torch.where(matched >= LAYOUT, errors, 0.0)
