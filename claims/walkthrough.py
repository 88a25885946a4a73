# %% [markdown]
# # T2MD, step by step
#
# The method of the paper on the shapes world, in small pieces that you can change. Open this file as a
# notebook in VS Code or Jupyter, started in the project's folder, or run `python -m claims.walkthrough`. It
# takes less than a minute on one core, downloads nothing, and writes its pictures to `runs/walkthrough/`.

# %%
import os
import sys

sys.path.insert(0, os.getcwd())  # the project's folder

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image

import sample
import t2md
import train
from data.images import to_pixels
from data.shapes import draw_shapes, heldout_records

ASSETS = os.path.join(sample.HERE, "assets")
FOLDER = os.path.join("runs", "walkthrough")
os.makedirs(FOLDER, exist_ok=True)
torch.manual_seed(0)


def show(picture, name):
    """Save a PIL image or a plot and return it as an image, which a notebook displays."""
    path = os.path.join(FOLDER, name)
    if isinstance(picture, Figure):
        picture.savefig(path, dpi=100)
    else:
        picture.save(path)
    print(path)
    return Image.open(path)


# %% [markdown]
# ## 1. The recurrence, and the same in chunks
#
# A Mamba-2 head reads its tokens one after the other and keeps a state. At each token the state decays a
# little, and the token is added to it; the output is what the token reads from the state.
# `t2md.ssd_recurrence` is that definition, one token at a time. It is slow, because nothing runs in
# parallel.
#
# `t2md.ssd` cuts the sequence into chunks. Inside a chunk the sum over all earlier tokens is a matrix
# product; only the state goes from chunk to chunk. Both give the same numbers.

# %%
tokens = 200
heads = 4
x = torch.randn(1, tokens, heads, 16)  # what each token brings
dt = torch.rand(1, tokens, heads)  # how much of it is written, and how far the state decays
A = -torch.rand(heads)  # how fast each head forgets
B = torch.randn(1, tokens, 1, 8)  # where in the state a token is written
C = torch.randn(1, tokens, 1, 8)  # where it reads
slow = t2md.ssd_recurrence(x, dt, A, B, C)
fast = t2md.ssd(x, dt, A, B, C, chunk_size=64)
difference = ((fast - slow).norm() / slow.norm()).item()
print(f"recurrence and ssd differ by {difference:.1e} of the output's size")

# %% [markdown]
# ## 2. The teacher, and the pictures that we look at
#
# The teacher is a small diffusion transformer: seven blocks, each with self-attention. We draw 32 pictures,
# encode them, and add noise (equation 1). The teacher then predicts that noise. `return_mixers` hands out
# what goes into each block's token mixer and what comes out of it: distillation needs nothing else.

# %%
teacher = t2md.load_backbone(os.path.join(ASSETS, "teacher")).requires_grad_(False)
vae = t2md.VAE(os.path.join(ASSETS, "vae"))
text_encoder = t2md.TextEncoder(os.path.join(ASSETS, "text_encoder"))
records = heldout_records(32, 0)
pictures = [draw_shapes(record, 128, np.random.default_rng(k)) for k, record in enumerate(records)]
latents, _ = vae.moments(to_pixels(pictures))  # (32, 4, 16, 16)
noise = torch.randn_like(latents)
t = torch.randint(200, 900, (32,))
z_t = train.noise_schedule(teacher).add_noise(latents, noise, t)
text, mask = text_encoder([record["prompt"] for record in records])
_, teacher_mixers = t2md.predict_noise(teacher, z_t, t, text, mask, return_mixers=True)
grid = (8, 8)  # tokens: each covers 2 x 2 latent pixels
print(f"{len(teacher_mixers)} blocks; a mixer's input is {tuple(teacher_mixers[0][0].shape)}")

# %% [markdown]
# ## 3. A Mamba head applies a matrix, as attention does
#
# Token i receives from token j, which it has read before, the share `(C_i . B_j) exp(s_i - s_j) dt_j`,
# where s is the running sum of dt A. That is a lower triangular matrix: the further back, the weaker.
# Softmax attention is a full matrix that costs tokens x tokens; Mamba never writes its matrix down. Read in
# both directions, as the student's `H` and `W` mixers do, Mamba's is full too.
#
# Left: one head of the trained student's third block, its two directions added. Right: a head of the
# teacher's.


# %%
def head_matrix(mamba, u, head):
    """The matrix that one head of a Mamba-2 layer applies to u (1, tokens, d); and what it is applied to."""
    _, xBC, dt = mamba.in_proj(u).split(mamba.split_sizes, dim=-1)
    inner = mamba.n_heads * mamba.head_dim
    x, B, C = F.silu(mamba.conv1d(xBC)).split([inner, mamba.d_state, mamba.d_state], dim=-1)
    dt = F.softplus(dt + mamba.dt_bias)[0, :, head]
    s = (dt * -mamba.A_log[head].exp()).cumsum(0)
    decay = (s[:, None] - s[None, :]).tril().exp()
    return (C[0] @ B[0].T * decay * dt).tril(), x[0].unflatten(-1, (mamba.n_heads, -1))[:, head]


student = t2md.load_backbone(os.path.join(ASSETS, "student_kd")).requires_grad_(False)
block = 2  # a W: its sequence is the image row by row
mamba = student.blocks[block].mixer.mamba
h, _ = teacher_mixers[block]
forwards, values = head_matrix(mamba, h[:1], head=0)
backwards, _ = head_matrix(mamba, h[:1].flip(1), head=0)
both_ways = forwards + backwards.flip(0, 1)

_, xBC, dt = mamba.in_proj(h[:1]).split(mamba.split_sizes, dim=-1)
by_scan = mamba.scan(xBC, dt).unflatten(-1, (mamba.n_heads, -1))[0, :, 0]
by_matrix = forwards @ values + mamba.D[0] * values
matrix_difference = ((by_matrix - by_scan).norm() / by_scan.norm()).item()
print(f"the layer's scan and the matrix differ by {matrix_difference:.1e}")

attention = teacher.blocks[block].mixer
q = attention.to_q(h[0]).unflatten(-1, (attention.heads, -1))[:, 0]
k = attention.to_k(h[0]).unflatten(-1, (attention.heads, -1))[:, 0]
softmax = (q @ k.T / q.shape[1] ** 0.5).softmax(dim=1)

figure = Figure(figsize=(8, 4), layout="constrained")
for place, (name, matrix) in enumerate([("Mamba, two scans", both_ways.abs()), ("softmax", softmax)], 1):
    axis = figure.add_subplot(1, 2, place)
    axis.imshow(matrix, cmap="viridis")
    axis.set(title=name, ylabel="the token that reads", xlabel="the token that is read")
show(figure, "matrices.png")

# %% [markdown]
# ## 4. The order of the scans
#
# An image has no first token, so the order is a choice. `>` reads rows forwards, `<` rows backwards, `v`
# and `^` the same with columns. `W` is `>` and `<` in one mixer, `H` is `v` and `^`. We do not print what
# the code says but measure it: in a mixer of one direction, a token's place in the order is the number of
# tokens that its output depends on.


# %%
def visiting_order(letter):
    """The order in which a mixer of one direction visits a 4 x 4 grid, from 1."""
    mixer = t2md.MambaMixer(letter, 16, d_state=4, head_dim=8)
    inputs = torch.randn(1, 16, 16)
    jacobian = torch.autograd.functional.jacobian(lambda h: mixer(h, (4, 4)).sum((0, 2)), inputs)
    depends = jacobian[:, 0].abs().sum(-1) > 0  # (16 outputs, 16 inputs)
    return depends.sum(1).reshape(4, 4)


orders = {letter: visiting_order(letter) for letter in "><v^"}
for letter, order in orders.items():
    print(letter)
    print("\n".join(" ".join(f"{place:2}" for place in row) for row in order.tolist()))

# %% [markdown]
# ## 5. Forcing by hand
#
# Layer-level teacher forcing (equation 6): a new Mamba mixer gets the *teacher's* input of one block, and
# learns to give the teacher's output. Each block learns alone, so the errors of one block do not disturb
# the next. Here are twenty steps of it for one block, on half of the pictures; the error is that on the
# other half, as a share of the output's own size.

# %%
mixer = t2md.MambaMixer("H", teacher.config.width, d_state=32, head_dim=64)
h, target = teacher_mixers[1]
optimizer = torch.optim.AdamW(mixer.parameters(), lr=3e-3)


def error_on_others():
    with torch.no_grad():
        output = mixer(h[16:], grid)
    return (t2md.mean_square(output, target[16:]) / t2md.mean_square(target[16:], 0 * target[16:])).item()


before = error_on_others()
for _ in range(20):
    loss = t2md.mean_square(mixer(h[:16], grid), target[:16])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
after = error_on_others()
print(f"error before {before:.2f}, after twenty steps {after:.2f}")

# %% [markdown]
# ## 6. The three terms of kd
#
# After forcing, the whole student learns (equation 11). `mse` compares its noise with the true noise
# (equation 8), `soft` with the teacher's prediction (equation 9), `mixer` compares the mixers' outputs,
# each model on its own hidden states (equation 10). A student whose Mamba mixers are new does badly in all
# three. The shipped one has learned; its `mse` stays, because nobody can guess the noise exactly.

# %%
fresh = t2md.student_of(teacher, "SHWHWHW", **train.CONFIGS["shapes"].student)
terms = {}
for name, model in (("fresh", fresh), ("trained", student)):
    with torch.no_grad():
        loss, terms[name] = t2md.kd_loss(model, teacher, z_t, t, text, mask, noise=noise)
    print(f"{name:8} loss {loss:.3f} = ", end="")
    print("mse {mse:.3f} + 0.5 soft {soft:.3f} + 0.2 mixer {mixer:.3f}".format(**terms[name]))

# %% [markdown]
# ## 7. A picture
#
# The sampler starts from noise and asks the student twenty times. Teacher and student get the same noise
# and draw nearly the same picture.

# %%
prompt = "a photo of a red circle and a blue square"
sheet = Image.new("RGB", (256, 128))
for place, model in enumerate((teacher, student)):
    (picture,) = sample.generate(model, vae, text_encoder, [prompt], (128, 128), [1])
    sheet.paste(picture, (128 * place, 0))
show(sheet, "teacher-and-student.png")
