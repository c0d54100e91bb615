"""VQ-VAE of the residual between truth and coarse probabilities (paper §3.2, "CorrDiff residual refinement").

MONAI's `VQVAE` does not serve. Its `EMAQuantizer` starts from random codes with cluster sizes of zero, so that one
training step draws every unused code to the origin; and its encoder and decoder have no normalisation: with the L1 of
eq. 2 on real residuals, mostly zero, their latents shrank to one code within 100 steps whatever the quantiser. The
residual blocks here are those of MONAI's SegResNet.

Annotations stay evaluated here: TorchScript cannot resolve postponed ones in a `NamedTuple`.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import ignite.distributed as idist
import torch
import torch.nn.functional as F
from monai.networks.blocks.segresnet_block import ResBlock
from torch import Tensor, nn

NUM_GROUPS = 8


class Quantised(NamedTuple):
    """A latent on its codes.

    Attributes:
        latent: `[B, C, *latent]`, the nearest codes, with the gradient of what was quantised (straight-through).
        loss: scalar L_vq of eq. 2, not weighted by λ_vq.
        perplexity: scalar, the number of codes in effective use in this batch, from 1 to the size of the codebook.
    """

    latent: Tensor
    loss: Tensor
    perplexity: Tensor


class Codebook(nn.Module):
    """Vector quantiser that learns its codes as running cluster means (van den Oord et al. 2017, appendix A.1).

    Running means rather than a gradient: codes then follow the encoder whatever the learning rate, no weight decay or
    optimiser state touches them, and freezing them is not updating them. Codes start from the first batch, and those
    that fall out of use restart from a later one. Both draw vectors in proportion to their squared distance from the
    codes (k-means++), since most of a residual is alike: a uniform draw would give copies of "no error". Of several
    processes, each counts with its vectors; those that codes start from are the first one's.

    Args:
        num_codes: size of the codebook.
        dim: channels of a code. A latent of n times as many channels is n codes a position, all of this book.
        decay: of the running means; 0.9 averages over about ten batches. 0.99 lagged behind the encoder and used fewer
            codes (a perplexity of 22 against 57 over 500 steps on real residuals).
        commitment: weight of the commitment term within L_vq; λ_vq scales the whole.
        restart_below: running number of vectors a batch under which a code restarts.
        eps: Laplace smoothing of cluster sizes, in vectors.
    """

    def __init__(
        self,
        num_codes: int = 256,
        dim: int = 8,
        decay: float = 0.9,
        commitment: float = 1.0,
        restart_below: float = 0.1,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.decay = decay
        self.commitment = commitment
        self.restart_below = restart_below
        self.eps = eps
        self.register_buffer("codes", torch.randn(num_codes, dim))
        self.register_buffer("sizes", torch.zeros(num_codes))
        self.register_buffer("sums", torch.zeros(num_codes, dim))
        self.register_buffer("initialised", torch.tensor(False))

    def forward(self, latent: Tensor, update: bool = False) -> Quantised:
        """Quantise `latent` `[B, n·dim, *latent]`, and learn from it where `update` is set.

        The value of L_vq is that of eq. 2, codebook plus commitment term. Running means minimise the former, which
        therefore has no gradient.
        """
        latent = latent.float()
        vectors = latent.detach().movedim(1, -1).reshape(-1, self.codes.shape[1])  # (V, dim)
        if not torch.jit.is_scripting() and update and not bool(self.initialised):
            self.initialise(vectors)
        index = self.nearest(vectors)
        quantised = self.codes[index].view(latent.movedim(1, -1).shape).movedim(-1, 1)
        if not torch.jit.is_scripting() and update:
            self.update(vectors, index)
        distance = F.mse_loss(latent, quantised)
        loss = distance.detach() + self.commitment * distance
        return Quantised(latent + (quantised - latent).detach(), loss, self.perplexity(index))

    def nearest(self, vectors: Tensor) -> Tensor:
        """Index (V,) of the code nearest to each of `vectors` (V, C)."""
        return torch.cdist(vectors, self.codes).argmin(1)

    def perplexity(self, index: Tensor) -> Tensor:
        """Exponential of the entropy with which codes `index` (V,) are used."""
        share = torch.bincount(index, minlength=self.codes.shape[0]).float() / index.numel()
        return torch.special.entr(share).sum().exp()

    def initialise(self, vectors: Tensor) -> None:
        """Take codes from `vectors` (V, C) by k-means++ seeding, drawing from torch's generator."""
        error = (vectors - vectors.mean(0)).square().sum(1)
        for code in range(len(self.codes)):
            self.codes[code] = vectors[draw(error, 1)[0]]
            distance = (vectors - self.codes[code]).square().sum(1)
            error = distance if code == 0 else torch.minimum(error, distance)
        self.codes.copy_(idist.broadcast(self.codes))
        count, total = self.gather(vectors, self.nearest(vectors))
        self.sizes.copy_(count)
        self.sums.copy_(total)
        self.initialised.fill_(True)

    def update(self, vectors: Tensor, index: Tensor) -> None:
        """Move the running means towards `vectors` (V, C), quantised to `index` (V,), and restart dead codes."""
        error = (vectors - self.codes[index]).square().sum(1)
        count, total = self.gather(vectors, index)
        self.sizes.lerp_(count, 1 - self.decay)
        self.sums.lerp_(total, 1 - self.decay)
        dead = self.sizes < self.restart_below
        restarted = idist.broadcast(vectors[draw(error, int(dead.sum()))]) if dead.any() else vectors[:0]
        self.sizes[dead] = 1.0
        self.sums[dead] = restarted
        sizes = (self.sizes + self.eps) / (1 + len(self.sizes) * self.eps / self.sizes.sum())
        self.codes.copy_(self.sums / sizes[:, None])
        self.codes[dead] = restarted

    def gather(self, vectors: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Number (K,) and sum (K, C) of the `vectors` (V, C) of each code, over all processes."""
        count = torch.bincount(index, minlength=len(self.codes)).to(vectors.dtype)
        return idist.all_reduce(count), idist.all_reduce(torch.zeros_like(self.codes).index_add_(0, index, vectors))


class ResidualVQVAE(nn.Module):
    """3D VQ-VAE of residuals in [-1, 1].

    Args:
        num_regions: channels of the residual.
        channels: of each level, multiples of 8.
        num_codes: size of the codebook.
        latent_channels: channels of a latent vector.
        codes_per_vector: codes that make up one latent vector, side by side; must divide `latent_channels`.
        stride: factor between levels; an even number.
        codebook: the quantiser; one of the sizes above if not given.

    Raises:
        ValueError: the codes do not fill a latent vector.
    """

    def __init__(
        self,
        num_regions: int = 3,
        channels: Sequence[int] = (32, 64),
        num_codes: int = 256,
        latent_channels: int = 8,
        codes_per_vector: int = 1,
        stride: int = 2,
        codebook: Codebook | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder(num_regions, channels, latent_channels, stride)
        self.codebook = Codebook(num_codes, latent_channels // codes_per_vector) if codebook is None else codebook
        self.decoder = decoder(latent_channels, channels, num_regions, stride)
        self.num_regions = num_regions
        self.latent_channels = latent_channels
        self.factor = stride ** len(channels)
        if (width := int(self.codebook.codes.shape[1])) * codes_per_vector != latent_channels:
            raise ValueError(
                f"{codes_per_vector} codes of {width} channels do not fill a latent vector of {latent_channels}: "
                "choose channels that codes_per_vector divides, and a codebook as wide as that leaves"
            )

    def encode(self, residual: Tensor) -> Tensor:
        """Encode `residual` `[B, 3, *spatial]` to a latent, not quantised, of `[B, C, *ceil(spatial / factor)]`."""
        return self.encoder(pad_to_multiple(residual, self.factor))

    def decode(self, latent: Tensor) -> Tensor:
        """Decode a quantised `latent` to a residual in [-1, 1], `factor` times its size in space.

        The hyperbolic tangent bounds what any latent, sampled ones included, can add to the coarse logits.
        """
        return torch.tanh(self.decoder(latent).float())

    def forward(self, residual: Tensor, update: bool = False) -> tuple[Tensor, Quantised]:
        """Return the reconstruction `[B, 3, *spatial]` of `residual`, of any size, and its quantised latent."""
        quantised = self.codebook(self.encode(residual), update)
        return crop_like(self.decode(quantised.latent), residual), quantised


def encoder(in_channels: int, channels: Sequence[int], out_channels: int, stride: int = 2) -> nn.Sequential:
    """A strided convolution and a residual block for each level, then a projection."""
    layers: list[nn.Module] = []
    for width in channels:
        layers += [nn.Conv3d(in_channels, width, 2 * stride, stride, stride // 2), residual_block(width)]
        in_channels = width
    return nn.Sequential(*layers, *activated(in_channels), nn.Conv3d(in_channels, out_channels, 3, padding=1))


def decoder(in_channels: int, channels: Sequence[int], out_channels: int, stride: int = 2) -> nn.Sequential:
    """The encoder in reverse; its last layer starts at zero, so that an untrained one decodes "no residual"."""
    widths = list(reversed(channels))
    layers: list[nn.Module] = [nn.Conv3d(in_channels, widths[0], 3, padding=1), residual_block(widths[0])]
    for above, width in itertools.pairwise(widths):
        layers += [nn.ConvTranspose3d(above, width, 2 * stride, stride, stride // 2), residual_block(width)]
    last = nn.ConvTranspose3d(widths[-1], out_channels, 2 * stride, stride, stride // 2)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, *activated(widths[-1]), last)


def residual_block(channels: int) -> nn.Module:
    """MONAI's residual block: twice normalisation, activation, convolution."""
    return ResBlock(3, channels, norm=("group", {"num_groups": NUM_GROUPS}))


def activated(channels: int) -> tuple[nn.Module, nn.Module]:
    """Normalisation and activation before a last convolution."""
    return nn.GroupNorm(NUM_GROUPS, channels), nn.ReLU(inplace=True)


def draw(weight: Tensor, count: int) -> Tensor:
    """Draw `count` indices in proportion to `weight` (V,), from torch's generator; uniformly where all are zero."""
    return torch.multinomial(weight.double() + 1e-30, max(count, 1), replacement=True)[:count]


def pad_to_multiple(x: Tensor, divisor: int, value: float = 0.0) -> Tensor:
    """Pad the end of each spatial axis of `x` `[B, C, D, H, W]` with a value to a multiple of `divisor`."""
    d, h, w = -x.shape[2] % divisor, -x.shape[3] % divisor, -x.shape[4] % divisor
    return F.pad(x, [0, w, 0, h, 0, d], value=value)


def crop_like(x: Tensor, like: Tensor) -> Tensor:
    """Undo :func:`pad_to_multiple`: the first voxels of `x` `[B, C, D, H, W]` along each axis, as many as in `like`."""
    return x[:, :, : like.shape[2], : like.shape[3], : like.shape[4]]
