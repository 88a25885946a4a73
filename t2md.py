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
a teacher - 8 DiM's additions. The first six are the method.
"""

import importlib.util
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
from torch.utils.checkpoint import checkpoint
from transformers import AutoTokenizer, T5EncoderModel

# ---------------------------------------------------------------------------------------------------
# 1. Frozen components
# ---------------------------------------------------------------------------------------------------


def load_part(cls, path_or_repo, subfolder, **kwargs):
    """`cls.from_pretrained` on a pipeline's `subfolder`, or where there is none on what is named itself."""
    inside = os.path.join(path_or_repo, subfolder)
    if os.path.isdir(path_or_repo):
        return cls.from_pretrained(inside if os.path.isdir(inside) else path_or_repo, **kwargs)
    if os.path.isabs(path_or_repo) or path_or_repo.startswith(".") or path_or_repo.count("/") != 1:
        raise FileNotFoundError(f"there is no folder {path_or_repo} to load a {subfolder} from")
    try:
        return cls.from_pretrained(path_or_repo, subfolder=subfolder, **kwargs)
    except OSError as error:
        try:
            return cls.from_pretrained(path_or_repo, **kwargs)
        except OSError:
            reason = error.__cause__ or error.__context__ or error  # no network, which the error itself hides
            raise OSError(f"no {subfolder} could be loaded from {path_or_repo}: {reason}") from error


def load_model(cls, path_or_repo, subfolder, **kwargs):
    """`load_part` of a model; unlike its library it raises ValueError for a weight that the files lack."""
    model, info = load_part(cls, path_or_repo, subfolder, output_loading_info=True, **kwargs)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(f"{path_or_repo} lacks {len(missing)} weights of {cls.__name__}: {missing[0]}")
    return model


class VAE:
    """A frozen AutoencoderKL (SD1.5's, SDXL's or a small one), in the latent units the denoiser works in.

    Agrees with diffusers' pipelines: latents are multiplied by the VAE's own `scaling_factor` (and shifted
    by its `shift_factor` where it has one); neither is a literal here. Never runs in autocast.
    path_or_repo: a folder or repository with the VAE, or a whole pipeline that has one under `vae/`.
    Attributes: factor: image pixels per latent pixel, along one side.  channels: latent channels.  source.
    """

    def __init__(self, path_or_repo, device="cpu", dtype=torch.float32):
        self.source = path_or_repo
        self.model = load_model(AutoencoderKL, path_or_repo, "vae", torch_dtype=dtype)
        self.model = self.model.to(device).eval().requires_grad_(False)
        config = self.model.config
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.channels = config.latent_channels
        self.scale, self.shift = config.scaling_factor, config.shift_factor or 0.0

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
        """Latents (B, C, h/f, w/f) -> images in [-1, 1], (B, 3, h, w). A side longer than `tile` pixels is
        decoded in overlapping, blended tiles (diffusers'); smaller ones leave seams in flat skies."""
        latents = (latents / self.scale + self.shift).to(self.model.device, self.model.dtype)
        with self.in_tiles(tile, max(latents.shape[-2:]) * self.factor):
            return self.model.decode(latents).sample.float().clamp(-1, 1)


class TextEncoder:
    """A frozen T5 encoder with its tokenizer. Captions are lower-cased and stripped, as diffusers does.
    path_or_repo: a folder or repository with both, or a pipeline with `text_encoder/` and `tokenizer/`.
    max_length: tokens kept of a caption (PixArt-alpha: 120).  cut: how many captions were longer, so far.
    """

    def __init__(self, path_or_repo, max_length=120, device="cpu", dtype=torch.float32):
        self.source, self.max_length, self.cut = path_or_repo, max_length, 0
        self.tokenizer = load_part(AutoTokenizer, path_or_repo, "tokenizer")
        self.model = load_model(T5EncoderModel, path_or_repo, "text_encoder", dtype=dtype)
        self.model = self.model.to(device).eval().requires_grad_(False)
        self.width = self.model.config.d_model

    @torch.no_grad()
    def __call__(self, captions):
        """List of B captions -> features (B, T, width) and mask (B, T), 1 for a token, T <= max_length.

        T is the longest caption's length: what pads it to 120 in diffusers' pipeline is masked there anyway.
        """
        tokenize = partial(self.tokenizer, [caption.lower().strip() for caption in captions])
        self.cut += sum(len(ids) > self.max_length for ids in tokenize(verbose=False).input_ids)
        tokens = tokenize(return_tensors="pt", padding="longest", truncation=True, max_length=self.max_length)
        tokens = tokens.to(self.model.device)
        with torch.autocast(self.model.device.type, enabled=False):
            features = self.model(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        return features, tokens.attention_mask


def pad_features(features):
    """List of (T_i, width) caption features -> features (B, T, width) and mask (B, T), as `TextEncoder`'s."""
    pad = partial(nn.utils.rnn.pad_sequence, batch_first=True)
    return pad(features), pad([torch.ones(len(f), dtype=torch.long) for f in features])


# ---------------------------------------------------------------------------------------------------
# 2. Positional embeddings: 2-D sine-cosine, half the channels for x, half for y
# ---------------------------------------------------------------------------------------------------


def sincos(positions, channels):
    """Positions (n,) -> (n, channels): sines then cosines at frequencies 10000^(-2k/channels)."""
    frequencies = 10000 ** (-torch.arange(channels // 2, dtype=torch.float64) / (channels / 2))
    angles = torch.outer(positions.double(), frequencies)
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
    return [torch.arange(n, dtype=torch.float32) / (n / base) / interpolation_scale for n in (H, W)]


def centered_coordinates(H, W, base, interpolation_scale):
    """The student's embedding after adaptation: token i of n sits at (i - (n-1)/2) / max(H, W), centred.

    The long edge spans the same interval at any size, so a larger image is a denser sampling of known
    coordinates: this is what zero-shot 4K rests on. The factor base / interpolation_scale (our choice)
    gives neighbours at the trained resolution the distance that they had for the teacher.
    """
    step = base / interpolation_scale / max(H, W)
    return [(torch.arange(n, dtype=torch.float64) - (n - 1) / 2) * step for n in (H, W)]


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


def chunk(state, x, dt, A, B, C):
    """The same map over one chunk of c tokens, as matrix products: state space duality.

    Write s_i for the running sum of dt A inside the chunk and u_j = dt_j x_j. Unrolled from its start,

        y_i       = sum_{j <= i} (C_i . B_j) exp(s_i - s_j) u_j  +  exp(s_i) C_i^T state_in
        state_out = exp(s_last) state_in  +  sum_j exp(s_last - s_j) B_j u_j^T

    so inside it is causal attention without a softmax, (G * L) u. Every exponent is <= 0: strong decay
    underflows to zero and nothing overflows. Decays and states are float32 (or float64), whatever x is.

    With r heads in each of g groups: state (b, g, r, p, n) or None at the start, x (b, c, g, r, p),
    dt (b, c, g, r), A (g, r), B and C (b, c, g, n) -> y like x, state after the chunk.
    """
    u = x * dt[..., None].to(x.dtype)  # 1. what each token brings: dt x
    s = (dt * A).cumsum(1)  # 2. the log of the decay from the chunk's start to each token
    s_last, s_rows = s[:, -1], s.movedim(1, -1)  # (b, g, r), (b, g, r, c)
    L = (s_rows[..., :, None] - s_rows[..., None, :]).tril().exp()  # 3. decay from j to i
    G = torch.einsum("bign,bjgn->bgij", C, B).tril()[:, :, None]  # 4. C_i . B_j where j <= i, else 0
    y = torch.einsum("bgrij,bjgrp->bigrp", (G * L).to(x.dtype), u)  # 5. what the chunk reads of itself
    if state is not None:  # 6. what it reads of all before it
        from_start = s.exp()[..., None].to(x.dtype)
        y = y + from_start * torch.einsum("bign,bgrpn->bigrp", C, state.to(x.dtype))
    to_end = (s_last[:, None] - s).exp()[..., None].to(x.dtype)
    added = torch.einsum("bjgrp,bjgn->bgrpn", u * to_end, B).to(s.dtype)
    return y, added if state is None else s_last.exp()[..., None, None] * state + added  # 7. what is left


def ssd(x, dt, A, B, C, chunk_size, D=None):
    """`ssd_recurrence`, in value and gradient, chunk by chunk: linear in l, and nearly all matrix products.

    Shapes and argument order are those of mamba-ssm's `mamba_chunk_scan_combined`. Where gradients are
    wanted each chunk is checkpointed, so that of its matrices only one chunk's are in memory at once.
    """
    precise, g = torch.promote_types(x.dtype, torch.float32), B.shape[2]
    heads = x.unflatten(2, (g, -1)), dt.to(precise).unflatten(2, (g, -1))  # (b, l, g, r, p), (b, l, g, r)
    A, step = A.to(precise).unflatten(0, (g, -1)), chunk
    if torch.is_grad_enabled() and x.shape[1] > chunk_size:
        step = partial(checkpoint, chunk, use_reentrant=False)
    state, y = None, []
    for x_c, dt_c, B_c, C_c in zip(*(v.split(chunk_size, dim=1) for v in (*heads, B, C))):
        y_c, state = step(state, x_c, dt_c, A, B_c, C_c)  # the state crosses from chunk to chunk here
        y.append(y_c)
    y = torch.cat(y, dim=1).flatten(2, 3)
    return y if D is None else y + D[:, None].to(x.dtype) * x


@lru_cache(maxsize=None)
def optional_kernel(module, name):
    """Function `name` of an optional `module`; None if it is not installed, or (said) cannot be imported."""
    if importlib.util.find_spec(module.split(".")[0]) is None:
        return None
    compiled = "selective_scan_cuda"  # Mamba-1's: mamba_ssm imports it, a build may lack it, nobody calls it
    try:
        if compiled not in sys.modules and importlib.util.find_spec(compiled) is None:
            sys.modules[compiled] = types.ModuleType(compiled)
        return torch.compiler.disable(getattr(importlib.import_module(module), name))
    except Exception as error:  # built against another torch or Triton, a package raises anything
        print(f"{module} is installed but cannot be imported, going on without: {error!r}", file=sys.stderr)


def scan_kernel(device, dtype):
    """mamba-ssm's scan where it can run, or None."""
    runs = torch.device(device).type == "cuda" and dtype != torch.float64
    return optional_kernel("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined") if runs else None


def attention_kernel(device, dtype):
    """flash-attn's attention where it can run, or None."""
    runs = torch.device(device).type == "cuda" and dtype in (torch.float16, torch.bfloat16)
    return optional_kernel("flash_attn", "flash_attn_func") if runs else None


def kernels_in_use(device, dtype):
    """A line that says what computes scan and self-attention."""
    scan = "mamba-ssm" if scan_kernel(device, dtype) else "plain PyTorch"
    attention = "flash-attn" if attention_kernel(device, dtype) else "PyTorch SDPA"
    return f"{device} in {str(dtype)[6:]}: scan by {scan}, self-attention by {attention}"


# ---------------------------------------------------------------------------------------------------
# 4. Token mixers
# ---------------------------------------------------------------------------------------------------


def upcast(x):
    """A tensor in float32, or in float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class GatedRMSNorm(nn.Module):
    """RMSNorm(y * SiLU(z)) with a learned weight, in float32, by group; mamba-ssm's `RMSNormGated`."""

    def __init__(self, width, groups=1, eps=1e-5):
        super().__init__()
        self.weight, self.groups, self.eps = nn.Parameter(torch.ones(width)), groups, eps

    def forward(self, y, z):
        v = (upcast(y) * F.silu(upcast(z))).unflatten(-1, (self.groups, -1))
        v = (v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + self.eps)).flatten(-2)
        return v.to(y.dtype) * self.weight.to(y.dtype)


class CausalConv1d(nn.Conv1d):
    """Depthwise causal convolution over a sequence, x (b, l, channels) -> the same; `nn.Conv1d`'s names."""

    def forward(self, x):
        # As a line of pixels, channels last in memory, it takes a third of conv1d's time on a CPU.
        line = F.pad(x, (0, 0, self.kernel_size[0] - 1, 0)).mT[:, :, None]  # (b, channels, 1, l + k - 1)
        y = F.conv2d(line, self.weight[:, :, None], groups=self.groups)[:, :, 0].mT
        return y + self.bias.to(y.dtype)


# Parameters that stay float32: rounded, they would change every decay of a long sequence
ALWAYS_FLOAT32 = ("A_log", "dt_bias")


class Mamba2(nn.Module):
    """The Mamba-2 layer over a sequence, u (b, l, d) -> (b, l, d), causal.

    Parameter names and shapes are those of mamba-ssm's `Mamba2` and transformers' `Mamba2Mixer`, so that
    weights move between them unchanged.  width d; d_state N; expand: inner width / d; head_dim P; chunk_size
    of mamba-ssm's kernels.
    """

    def __init__(self, width, d_state=256, expand=2, head_dim=64, d_conv=4, n_groups=1, chunk_size=256):
        super().__init__()
        inner = expand * width
        self.d_state, self.head_dim, self.n_groups, self.chunk_size = d_state, head_dim, n_groups, chunk_size
        self.n_heads = inner // head_dim
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
        """mamba-ssm's initialisation: step log-uniform in [dt_min, dt_max], A uniform in A_range, D one."""
        dt = torch.exp(torch.rand(self.n_heads) * (math.log(dt_max) - math.log(dt_min)) + math.log(dt_min))
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
        self.A_log.copy_(torch.empty(self.n_heads).uniform_(*A_range).log())
        self.D.fill_(1.0)

    def scan(self, xBC, dt):
        """Convolution, recurrence: xBC (b, l, conv_width), dt (b, l, n_heads) -> y (b, l, inner)."""
        states = self.n_groups * self.d_state
        sizes = [self.n_heads * self.head_dim, states, states]
        x, B, C = F.silu(self.conv1d(xBC)).split(sizes, dim=-1)
        x = x.unflatten(-1, (self.n_heads, self.head_dim))  # (b, l, h, p)
        B, C = (m.unflatten(-1, (self.n_groups, self.d_state)) for m in (B, C))  # (b, l, g, n)
        dt = F.softplus(upcast(dt) + upcast(self.dt_bias))  # (b, l, h)
        A = -upcast(self.A_log).exp()  # (h,)
        kernel = scan_kernel(x.device, x.dtype)
        if kernel is not None:
            return kernel(x, dt, A, B, C, self.chunk_size, D=self.D).flatten(2)
        # The result does not depend on the chunk; on a CPU 64 is fastest at every size measured.
        return ssd(x, dt, A, B, C, 128 if x.is_cuda else 64, D=self.D).flatten(2)

    def forward(self, u, backward=(False,)):
        """backward: an entry a scan; True reads from the last token to the first. Scans share all weights."""

        def flip(v, yes):
            return v.flip(1) if yes else v

        # in_proj, norm and out_proj see one token at a time and so commute with the reversal: only
        # convolution and recurrence run once for each direction, as one larger batch.
        z, xBC, dt = self.in_proj(u).split(self.split_sizes, dim=-1)
        both = (torch.cat([flip(v, yes) for yes in backward]) for v in (xBC, dt))
        scans = self.scan(*both).chunk(len(backward))
        return self.out_proj(sum(self.norm(flip(y, yes), z) for y, yes in zip(scans, backward)))


# letter -> (raster of the image, is it read backwards? once for each scan)
SCANS = {
    "W": ("rows", (False, True)),  # width-first, both ways
    "H": ("columns", (False, True)),  # height-first, both ways
    ">": ("rows", (False,)),
    "<": ("rows", (True,)),
    "v": ("columns", (False,)),
    "^": ("columns", (True,)),
}


class MambaMixer(nn.Module):
    """Mamba-2 over the raster of an image, tokens (B, H*W, d) -> (B, H*W, d).

    letter: see `SCANS`. Two scans share their weights and are fused by a linear layer (`fuse`) on their sum
    (paper 3.3; sum instead of concatenation is our choice, it gives the paper's 0.7B).
    """

    def __init__(self, letter, width, **mamba):
        super().__init__()
        self.raster, self.backward = SCANS[letter]
        self.mamba = Mamba2(width, **mamba)
        self.fuse = nn.Linear(width, width) if len(self.backward) == 2 else nn.Identity()

    def forward(self, x, grid):
        H, W = grid
        if self.raster == "columns":
            x = x.unflatten(1, (H, W)).transpose(1, 2).flatten(1, 2)
        y = self.fuse(self.mamba(x, self.backward))
        return y.unflatten(1, (W, H)).transpose(1, 2).flatten(1, 2) if self.raster == "columns" else y

    @torch.no_grad()
    def fold(self):
        """For sampling: `fuse` after `out_proj` is one linear map; make it one, not to be saved."""
        if isinstance(self.fuse, nn.Linear):
            out = self.mamba.out_proj
            out.weight, out.bias = nn.Parameter(self.fuse.weight @ out.weight), self.fuse.bias
            self.fuse = nn.Identity()


def attention(q, k, v, heads, mask=None):
    """Multi-head softmax attention: q (B, L, d), k, v (B, T, d), mask that broadcasts to (B, heads, L, T)."""
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))  # (B, L, heads, d/heads)
    kernel = attention_kernel(q.device, q.dtype) if mask is None else None
    if kernel is not None:
        return kernel(q, k, v).flatten(2)
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
    """A number per image, (B,) -> (B, width) in `dtype`: sinusoid, Linear, SiLU, Linear."""

    def __init__(self, width):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(256, width), nn.Linear(width, width)

    def forward(self, values, dtype):
        return self.linear_2(F.silu(self.linear_1(sinusoid(values).to(dtype))))


def modulate(h, shift, scale):
    """adaLN: LN(h) * (1 + scale) + shift, with shift and scale (B, 1, d)."""
    return F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Block(nn.Module):
    """One PixArt block around any token mixer (Fig. 2):

    h = h + gate1 * Mixer(LN(h) * (1 + scale1) + shift1)
    h = h + CrossAttention(h, text)
    h = h + gate2 * MLP(LN(h) * (1 + scale2) + shift2)
    """

    def __init__(self, letter, width, heads, mlp_ratio, mamba):
        super().__init__()
        self.mixer = Attention(width, heads) if letter == "S" else MambaMixer(letter, width, **mamba)
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
        start_size, renoise: latent side at which progressive sampling begins (sample_size if None), and the
            timestep that it goes back to with an enlarged picture.
        guidance, guidance_interval: classifier-free guidance, and the timestep below which there is none.
        vae, text_encoder: what it was trained with: folder (relative to the checkpoint's own) or repository.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = _repeated_blocks = ["Block"]  # the latter for diffusers' compile_repeated_blocks

    # fmt: off
    @register_to_config
    def __init__(self, pattern="SHWHWHW" * 4, width=1152, heads=16, mlp_ratio=4, patch_size=2, in_channels=4,
                 out_channels=4, caption_width=4096, d_state=256, expand=2, head_dim=64, d_conv=4, n_groups=1,
                 chunk_size=256, pos_embed="centered", sample_size=64, interpolation_scale=None,
                 use_additional_conditions=None, beta_schedule="linear", start_size=None, renoise=500,
                 guidance=4.5, guidance_interval=0, vae=None, text_encoder=None):
        # fmt: on
        super().__init__()
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
        """What this model was made with: type(model)(**model.arguments()) is like it, of fresh weights."""
        return {name: value for name, value in self.config.items() if not name.startswith("_")}

    def tokens(self, hidden_states):
        """Latents (B, C, h, w) -> tokens with positions (B, L, d), grid (H, W)."""
        p, (height, width) = self.config.patch_size, hidden_states.shape[-2:]
        if height % p or width % p:
            raise ValueError(f"latents of {height} x {width} cannot be cut into patches of {p} x {p}")
        h = self.patch_embed(hidden_states)
        grid, h = tuple(h.shape[-2:]), h.flatten(2).transpose(1, 2)
        where = *grid, self.config.width, self.base, self.interpolation_scale
        return h + position_embedding(self.config.pos_embed, *where, h.device, h.dtype), grid

    def embed_time(self, timestep, h, added_cond_kwargs):
        """Timesteps (B,) or scalar, size conditions -> embedding (B, width), adaLN's input (B, 6, width)."""
        batch, dtype = len(h), h.dtype
        embedded = self.timestep_embedder(torch.as_tensor(timestep, device=h.device).expand(batch), dtype)
        if self.conditioned_on_size:
            if not added_cond_kwargs or added_cond_kwargs.get("resolution") is None:
                needed = "added_cond_kwargs needs resolution (B, 2) and aspect_ratio (B, 1)"
                raise ValueError(f"this model is conditioned on size: {needed}")
            resolution = self.resolution_embedder(added_cond_kwargs["resolution"].flatten(), dtype)
            aspect = self.aspect_ratio_embedder(added_cond_kwargs["aspect_ratio"].flatten(), dtype)
            embedded = embedded + torch.cat([resolution.view(batch, -1), aspect.view(batch, -1)], dim=1)
        return embedded, self.adaln_single(F.silu(embedded)).unflatten(1, (6, -1))

    def latents(self, h, embedded, grid):
        """Tokens (B, L, d) after the last block, and time's embedding (B, d) -> (B, out_channels, h, w)."""
        p, (H, W) = self.config.patch_size, grid
        shift, scale = (self.scale_shift_table + embedded[:, None]).chunk(2, dim=1)  # (B, 1, d)
        h = self.proj_out(modulate(h, shift, scale)).view(len(h), H, W, p, p, self.config.out_channels)
        return torch.einsum("nhwpqc->nchpwq", h).reshape(len(h), self.config.out_channels, H * p, W * p)

    def checkpointed(self, module, *inputs):
        """module(*inputs); with gradient checkpointing its inside is computed again in the backward pass."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(module, *inputs)
        return module(*inputs)

    # fmt: off
    def forward(self, hidden_states, encoder_hidden_states, timestep, added_cond_kwargs=None,
                encoder_attention_mask=None, return_dict=True, return_mixers=False):
        # fmt: on
        """Predict the noise; the signature of diffusers' PixArtTransformer2DModel.

        Args:
            hidden_states: noisy latents (B, in_channels, h, w), h and w multiples of patch_size.
            encoder_hidden_states: caption features (B, T, caption_width).
            encoder_attention_mask: (B, T), 1 = token, 0 = padding; or diffusers' bias (B, 1, T).
            timestep: (B,) or a scalar, in [0, 1000).
            added_cond_kwargs: {"resolution": (B, 2) pixels, "aspect_ratio": (B, 1)} for PixArt-1024 weights.
            return_mixers: what distillation needs: return the sample and for each block n its mixer's input
                h_n and output, both (B, L, width).
        Returns Transformer2DModelOutput with `sample` (B, out_channels, h, w), or a 1-tuple.
        """
        h, grid = self.tokens(hidden_states)  # (B, L, d)
        embedded, time = self.embed_time(timestep, h, added_cond_kwargs)  # (B, d), (B, 6, d)
        text, mask = self.caption_projection(encoder_hidden_states), encoder_attention_mask  # (B, T, d)
        if mask is not None:
            mask = mask[:, None, None].bool() if mask.ndim == 2 else mask[:, None].to(text.dtype)

        mixers = []
        for block in self.blocks:
            h, mixer_input, mixer_output = self.checkpointed(block, h, time, text, mask, grid)
            if return_mixers:
                mixers.append((mixer_input, mixer_output))

        sample = self.latents(h, embedded, grid)
        if return_mixers:
            return sample, mixers
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


# ---------------------------------------------------------------------------------------------------
# 6. Losses. z_t (B, C, h, w); every loss is a scalar, a mean over elements
# ---------------------------------------------------------------------------------------------------


def predict_noise(model, z_t, t, text, mask, return_mixers=False, **conditions):
    """epsilon(z_t, t, tau), (B, C, h, w), of a model with learned variance the noise half; with return_mixers
    also [(input, output)] of each block's mixer.  conditions: size conditions, if any."""
    inputs = dict(encoder_attention_mask=mask, added_cond_kwargs=conditions or None, return_dict=False)
    sample, *mixers = model(z_t, text, t, return_mixers=return_mixers, **inputs)
    noise = sample[:, : z_t.shape[1]]
    return (noise, *mixers) if return_mixers else noise


def mean_square(a, b):
    """|| a - b ||^2 as used everywhere here: the mean over elements, in float32 at least."""
    return F.mse_loss(upcast(a), upcast(b))


def forcing_loss(student, teacher, z_t, t, text, mask, **conditions):
    """Equation 6, layer-level teacher forcing: sum over Mamba blocks n of ||Mamba_n(h'_n) - SA'_n(h'_n)||^2.

    h'_n is the TEACHER's input to its n-th mixer (equation 5), fed to both. With gradient checkpointing one
    mixer at a time is in memory, beside all h'_n and the teacher's outputs: at full size 48 tensors of 1,024
    tokens, 0.11 GiB an image of 512 px in bfloat16.
    """
    with torch.no_grad():
        _, mixers = predict_noise(teacher, z_t, t, text, mask, return_mixers=True, **conditions)
    grid = tuple(side // student.config.patch_size for side in z_t.shape[2:])
    loss = 0.0
    for block, letter, (h, target) in zip(student.blocks, student.config.pattern, mixers, strict=True):
        if letter != "S":
            loss = loss + mean_square(student.checkpointed(block.mixer, h, grid), target)
    return loss


def mse_loss(noise, student_noise):
    """Equation 8, the diffusion loss: ||eps - eps_theta(z_t, t, tau)||^2."""
    return mean_square(student_noise, noise)


def soft_loss(teacher_noise, student_noise):
    """Equation 9 (the paper's pseudo loss): ||eps_theta'(z_t, t, tau) - eps_theta(z_t, t, tau)||^2."""
    return mean_square(student_noise, teacher_noise)


def mixer_loss(teacher_mixers, student_mixers):
    """Equation 10: 1/N sum over all N blocks of ||mixer output of theta' - theta||^2, each on its OWN h.
    Both are [(input, output)] of each block's mixer."""
    terms = [mean_square(s, t) for (_, s), (_, t) in zip(student_mixers, teacher_mixers, strict=True)]
    return sum(terms) / len(terms)


def kd_loss(student, teacher, z_t, t, text, mask, noise, soft_weight=0.5, mixer_weight=0.2, **conditions):
    """Equation 11: L_mse + 0.5 L_soft + 0.2 L_mixer -> (loss, {"mse", "soft", "mixer"} detached)."""
    inputs = dict(z_t=z_t, t=t, text=text, mask=mask, return_mixers=True, **conditions)
    with torch.no_grad():
        teacher_noise, teacher_mixers = predict_noise(teacher, **inputs)
    student_noise, student_mixers = predict_noise(student, **inputs)
    mse, soft = mse_loss(noise, student_noise), soft_loss(teacher_noise, student_noise)
    mixer = mixer_loss(teacher_mixers, student_mixers)
    loss = mse + soft_weight * soft + mixer_weight * mixer
    return loss, dict(mse=mse.detach(), soft=soft.detach(), mixer=mixer.detach())


# ---------------------------------------------------------------------------------------------------
# 7. Weights from a teacher
# ---------------------------------------------------------------------------------------------------

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
        for diffusers_name, name_here in PIXART_NAMES:
            name = name.replace(diffusers_name, name_here)
        renamed[name] = weight
    renamed.pop("pos_embed.pos_embed", None)  # computed, not learned
    return renamed


def from_pixart(path_or_repo, **overrides):
    """The teacher as a T2MD, from a diffusers PixArt transformer or a pipeline that has one. The learned null
    caption in PixArt-alpha's own files (y_embedding) is left out, as in diffusers."""
    pixart = load_model(PixArtTransformer2DModel, path_or_repo, "transformer", torch_dtype=torch.float32)
    config, heads = pixart.config, pixart.config.num_attention_heads
    same = ("patch_size", "in_channels", "sample_size", "interpolation_scale", "use_additional_conditions")
    arguments = {name: config[name] for name in same}
    arguments |= dict(pattern="S" * config.num_layers, caption_width=config.caption_channels)
    arguments |= dict(width=heads * config.attention_head_dim, heads=heads, pos_embed="pixart")
    arguments |= dict(out_channels=config.out_channels or config.in_channels)
    teacher = T2MD(**arguments | overrides)
    teacher.load_state_dict(rename_pixart(pixart.state_dict()))
    return teacher


def load_config(path_or_repo):
    """What is in a backbone's config.json, or in that of a pipeline's transformer."""
    reader = types.SimpleNamespace(from_pretrained=T2MD.load_config)
    return load_part(reader, path_or_repo, "transformer")


def load_backbone(path_or_repo, **overrides):
    """The T2MD of a checkpoint, or of a diffusers PixArt transformer, whichever is there; in float32.

    overrides: any argument of T2MD that changes no weight, e.g. pos_embed="centered".
    """
    name = load_config(path_or_repo).get("_class_name")
    if name not in ("T2MD", "DiM"):
        return from_pixart(path_or_repo, **overrides)
    return load_model(globals()[name], path_or_repo, "transformer", torch_dtype=torch.float32, **overrides)


def student_of(teacher, pattern, llama=False, **overrides):
    """A student: what is no mixer, and every mixer whose letter stays, is the teacher's bit for bit; the
    others, and DiM's additions, are fresh. It predicts noise only, by that half of the output layer.

    teacher: a T2MD.  overrides: any argument of T2MD, or of DiM.
    llama: Mamba too starts from the attention, see `copy_attention`.
    """
    arguments = teacher.arguments()
    if len(pattern) != (blocks := len(teacher.blocks)):
        raise ValueError(f"{pattern} has {len(pattern)} letters, but the teacher has {blocks} blocks")
    if llama:
        head = teacher.config.width // teacher.config.heads
        overrides |= dict(expand=1, d_state=head, head_dim=head, n_groups=teacher.config.heads)
    arguments |= dict(pattern=pattern, out_channels=arguments["in_channels"]) | overrides
    student = (DiM if arguments.keys() & {"padding_tokens", "local_enhancement"} else T2MD)(**arguments)
    changed = [n for n, letter in enumerate(pattern) if letter != teacher.config.pattern[n]]
    fresh = tuple(f"blocks.{n}.mixer." for n in changed)
    copied = {name: w for name, w in teacher.state_dict().items() if not name.startswith(fresh)}
    for name in ("proj_out.weight", "proj_out.bias"):  # rows are (p, p, channel), first the noise's
        rows = copied[name].unflatten(0, (-1, teacher.config.out_channels))
        copied[name] = rows[:, : student.config.out_channels].flatten(0, 1)
    student.load_state_dict(student.state_dict() | copied)
    for n in changed if llama else ():
        copy_attention(student.blocks[n].mixer, teacher.blocks[n].mixer)
    return student


@torch.no_grad()
def copy_attention(mixer, attention):
    """Mamba-in-the-Llama's initialisation of a MambaMixer: C <- W_q, B <- W_k, x <- W_v, out_proj <- W_o.

    The mixer has the attention's geometry (expand 1, groups = heads, state = head width); the rest keeps its
    own initialisation, but `fuse` starts as the mean of both directions plus W_o's bias. The biases of W_q,
    W_k and W_v are dropped: in_proj has none.
    """
    m, a = mixer.mamba, attention
    z, _, dt = m.in_proj.weight.split(m.split_sizes)
    m.in_proj.weight.copy_(torch.cat([z, a.to_v.weight, a.to_k.weight, a.to_q.weight, dt]))
    m.out_proj.weight.copy_(a.to_out[0].weight)
    if isinstance(mixer.fuse, nn.Linear):
        nn.init.eye_(mixer.fuse.weight).mul_(0.5)
        mixer.fuse.bias.copy_(a.to_out[0].bias)


# ---------------------------------------------------------------------------------------------------
# 8. DiM's additions, off in T2MD
# ---------------------------------------------------------------------------------------------------


class PaddingTokens(nn.Module):
    """DiM's padding: 3 learned tokens end each row and each column, so that a convolution of 4 does not
    reach from one line into the next. The grid (H, W) becomes (H + 3, W + 3): rows end in p0, p1, p2;
    row H + k is p_k up to there."""

    def __init__(self, width):
        super().__init__()
        self.tokens = nn.Parameter(0.02 * torch.randn(3, width))

    def forward(self, h, grid):
        """(B, H * W, d) -> (B, (H+3) * (W+3), d) and the new grid."""
        (H, W), (B, _, d) = grid, h.shape
        below = self.tokens[:, None].expand(B, 3, W, d)
        beside = self.tokens.expand(B, H + 3, 3, d)
        h = torch.cat([torch.cat([h.unflatten(1, grid), below], dim=1), beside], dim=2)
        return h.flatten(1, 2), (H + 3, W + 3)

    @staticmethod
    def remove(h, grid):
        """(B, (H+3) * (W+3), d) and the padded grid -> (B, H * W, d)."""
        return h.unflatten(1, grid)[:, :-3, :-3].flatten(1, 2)


class LocalEnhancement(nn.Module):
    """DiM's depthwise 3x3 convolution over the grid, (B, H * W, d) -> the same; an identity at first."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width)
        nn.init.dirac_(self.conv.weight, groups=width)
        nn.init.zeros_(self.conv.bias)

    def forward(self, h, grid):
        return self.conv(h.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)


class DiM(T2MD):
    """T2MD with DiM's padding tokens and local enhancement.  Args: both switches; then T2MD's."""

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

    def tokens(self, hidden_states):
        h, grid = super().tokens(hidden_states)
        h = self.enhance_first(h, grid) if self.enhance_first else h
        return self.padding(h, grid) if self.padding else (h, grid)

    def latents(self, h, embedded, grid):
        if self.padding:
            h, grid = self.padding.remove(h, grid), (grid[0] - 3, grid[1] - 3)
        h = self.enhance_last(h, grid) if self.enhance_last else h
        return super().latents(h, embedded, grid)

    def forward(self, hidden_states, *args, return_mixers=False, **kwargs):
        """T2MD's; the mixers' inputs and outputs are those of the image's tokens, without padding."""
        result = super().forward(hidden_states, *args, return_mixers=return_mixers, **kwargs)
        if not return_mixers or not self.padding:
            return result
        sample, mixers = result
        grid = [side // self.config.patch_size + 3 for side in hidden_states.shape[2:]]
        return sample, [tuple(self.padding.remove(h, grid) for h in pair) for pair in mixers]
