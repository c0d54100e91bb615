"""MedNeXt blocks with both normalisations folded into the pointwise convolutions.

A block is: depthwise convolution -> per-channel normalisation -> 1x1x1 expansion -> GELU -> GRN -> 1x1x1 compression.
Each normalisation is a per-channel scale of what a pointwise convolution reads next, so it becomes a change of that
convolution's weights, one set for each sample, and no normalised feature map is ever written:

    normalisation of y - mean:  s = weight / sqrt(var + eps)     expansion W * s, its bias + W @ norm.bias
    GRN of h:                   n = |h_c| / mean_c |h_c|         compression W * (1 + gamma * n), its bias + W @ beta

Feature maps (N, C, D, H, W) are in channels-last memory, so that a pointwise convolution is a matrix product over the
rows of (N, V, C), V = D * H * W voxels, and a depthwise one is several times faster on a CPU. In training a block keeps
x, the centred y and the hidden layer before GELU; statistics are fp32 under autocast too (fp64 in a network of fp64).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Block(nn.Module):
    """One MedNeXt block: (N, in_channels, D, H, W) to (N, out_channels, D', H', W').

    State dicts are those of MONAI's MedNeXtBlock (stride 1) and MedNeXtDownBlock (stride 2) with residual connections.

    Args:
        in_channels: channels of the input and of the depthwise convolution.
        out_channels: channels of the output; equal to `in_channels` where `stride` is 1.
        expansion: width of the hidden layer as a multiple of `in_channels`.
        kernel_size: odd edge length of the depthwise kernel.
        stride: 1 keeps the resolution, 2 halves it.
        grn: whether Global Response Normalisation follows the activation.
        checkpointing: recompute this block in the backward pass rather than keep its activations.
    """

    conv: type[nn.Module] = nn.Conv3d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        expansion: int,
        kernel_size: int = 3,
        stride: int = 1,
        grn: bool = True,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        hidden = expansion * in_channels
        self.checkpointing = checkpointing
        self.conv1 = self.conv(in_channels, in_channels, kernel_size, stride, kernel_size // 2, groups=in_channels)
        self.norm = nn.GroupNorm(in_channels, in_channels)
        self.conv2 = nn.Conv3d(in_channels, hidden, 1)
        self.conv3 = nn.Conv3d(hidden, out_channels, 1)
        self.res_conv = nn.Identity() if stride == 1 else self.conv(in_channels, out_channels, 1, stride)
        self.global_resp_beta = nn.Parameter(torch.zeros(1, hidden, 1, 1, 1)) if grn else None
        self.global_resp_gamma = nn.Parameter(torch.zeros(1, hidden, 1, 1, 1)) if grn else None

    def forward(self, x: Tensor) -> Tensor:
        """Run the block, keeping its activations for the backward pass or not."""
        if not torch.jit.is_scripting() and self.checkpointing and self.training:
            return checkpoint(self.run, x, use_reentrant=False)
        return self.run(x)

    def run(self, x: Tensor) -> Tensor:
        """Residual plus the mixed output of the depthwise convolution."""
        return self.mix(self.conv1(x), to_rows(self.res_conv(x)))

    def mix(self, y: Tensor, residual: Tensor) -> Tensor:
        """Normalise, expand, activate, respond, compress y (N, C, D, H, W), onto a residual (N, V, O) or (O,)."""
        y = y.sub_(y.mean((2, 3, 4), keepdim=True, dtype=statistics_type(y)))
        rows = to_rows(y)
        if not torch.jit.is_scripting() and torch.is_grad_enabled() and not self.checkpointing and not is_recorded():
            z = self.mix_for_training(rows, residual)
        else:
            z = self.compress(self.expand(rows), residual)
        return to_volume(z, y)

    @torch.jit.unused
    def mix_for_training(self, y: Tensor, residual: Tensor) -> Tensor:
        """Expand and compress rows y (N, V, C); the backward pass computes the hidden layer anew.

        It does so from what precedes GELU, which GELU keeps anyway, so that one of the two widest tensors is not kept.
        """
        weight, bias = self.expansion(y)
        before = torch.baddbmm(bias.to(y.dtype), y, weight.to(y.dtype))
        h = F.gelu(before)
        address, shape = h.data_ptr(), h.shape

        def pack(tensor: Tensor) -> Tensor | None:
            return None if tensor.data_ptr() == address and tensor.shape == shape else tensor.detach()

        def unpack(tensor: Tensor | None) -> Tensor:
            return F.gelu(before.detach()) if tensor is None else tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return self.compress(h, residual)

    def compress(self, h: Tensor, residual: Tensor) -> Tensor:
        """Rows (N, V, O) of the hidden layer h (N, V, E), onto a residual (N, V, O) or (O,)."""
        weight, bias = self.compression(h)
        return torch.baddbmm(residual.to(h.dtype), h, weight.to(h.dtype)).add_(bias)

    def expand(self, y: Tensor) -> Tensor:
        """Hidden layer (N, V, E) of y (N, V, C), whose mean over voxels is zero."""
        weight, bias = self.expansion(y)
        weight, bias = weight.to(y.dtype), bias.to(y.dtype)
        if not streams(y):
            return F.gelu(torch.baddbmm(bias, y, weight))
        h = y.new_empty(y.shape[0], y.shape[1], bias.shape[0])
        for start in range(0, y.shape[1], 4096):
            stop = start + 4096
            h[:, start:stop] = F.gelu(torch.baddbmm(bias, y[:, start:stop], weight))
        return h

    def expansion(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (N, C, E) and bias (E,) of conv2 with the normalisation of y (N, V, C) inside."""
        weight, bias = self.conv2.weight.flatten(1).t(), self.conv2.bias  # (C, E), (E,)
        assert bias is not None
        var = norm_over_voxels(y).square() / y.shape[1]  # (N, C)
        scale = self.norm.weight * torch.rsqrt(var + self.norm.eps)
        return weight * scale[:, :, None], bias + (weight * self.norm.bias[:, None]).sum(0)

    def compression(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (N, E, O) and bias (O,) of conv3 with the GRN of h (N, V, E) inside."""
        weight, bias = self.conv3.weight.flatten(1).t(), self.conv3.bias  # (E, O), (O,)
        assert bias is not None
        gamma, beta = self.global_resp_gamma, self.global_resp_beta
        if gamma is None or beta is None:
            return weight.expand(h.shape[0], -1, -1), bias
        norm = norm_over_voxels(h)  # (N, E)
        response = 1 + gamma.flatten() * norm / (norm.mean(1, keepdim=True) + 1e-6)
        return weight * response[:, :, None], bias + (weight * beta.flatten()[:, None]).sum(0)


class UpBlock(Block):
    """A block that doubles the resolution, with the state dict of MONAI's MedNeXtUpBlock; takes `stride=2`.

    The transposed convolutions make 2n - 1 voxels of n, and a zero goes before each axis.
    """

    conv = nn.ConvTranspose3d

    def run(self, x: Tensor) -> Tensor:
        """Residual plus the mixed output of the transposed depthwise convolution."""
        n, _, d, h, w = x.shape
        weight, bias = self.res_conv.weight.flatten(1), self.res_conv.bias
        assert bias is not None
        z = self.mix(self.upsample(x), bias).permute(0, 2, 3, 4, 1)
        z = F.pad(z, (0, 0, 1, 0, 1, 0, 1, 0))
        residual = (to_rows(x) @ weight).view(n, d, 1, h, 1, w, 1, -1)
        residual = F.pad(residual, (0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0))  # zeros between voxels
        return (z + residual.view(z.shape)).permute(0, 4, 1, 2, 3)

    def upsample(self, x: Tensor) -> Tensor:
        """The depthwise convolution; on a CPU a plain one over zeros between voxels is twice as fast forward."""
        if not streams(x):
            return self.conv1(x)
        weight, size = self.conv1.weight.flip([2, 3, 4]), self.conv1.weight.shape[2]
        return F.conv3d(between_zeros(x), weight, self.conv1.bias, padding=size // 2, groups=x.shape[1])


class Head(nn.Module):
    """Pointwise convolution to logits; a transposed one, as in the checkpoints."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv_out = nn.ConvTranspose3d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, out_channels, D, H, W) of features (N, in_channels, D, H, W)."""
        bias = self.conv_out.bias
        assert bias is not None
        return pointwise(x, self.conv_out.weight.flatten(1), bias)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """1x1x1 convolution of x (N, C, D, H, W) with weight (C, O) and bias (O,), in channels-last memory."""
    z = to_rows(x) @ weight
    return to_volume(z + bias.to(z.dtype), x)


def between_zeros(x: Tensor) -> Tensor:
    """Put a zero between neighbours of x (N, C, D, H, W): (N, C, 2D - 1, 2H - 1, 2W - 1), in channels-last memory."""
    n, c, d, h, w = x.shape
    sparse = x.new_zeros(n, 2 * d - 1, 2 * h - 1, 2 * w - 1, c)
    sparse[:, ::2, ::2, ::2] = x.permute(0, 2, 3, 4, 1)
    return sparse.permute(0, 4, 1, 2, 3)


def to_rows(x: Tensor) -> Tensor:
    """View of (N, C, D, H, W) as (N, V, C)."""
    return x.flatten(2).transpose(1, 2)


def to_volume(rows: Tensor, like: Tensor) -> Tensor:
    """View of rows (N, V, C) as (N, C, D, H, W), with the spatial size of `like`."""
    n, d, h, w = like.shape[0], like.shape[2], like.shape[3], like.shape[4]
    return rows.view(n, d, h, w, rows.shape[2]).permute(0, 4, 1, 2, 3)


def norm_over_voxels(rows: Tensor) -> Tensor:
    """Euclidean norm (N, C) of rows (N, V, C) over V; its gradient is zero at an all-zero channel."""
    if rows.is_cuda:
        return torch.linalg.vector_norm(rows, dim=1, dtype=statistics_type(rows))
    total = torch.zeros(1, device=rows.device)
    for piece in rows.split(4096, 1) if streams(rows) else [rows]:
        total = total + (piece * piece).sum(1, dtype=statistics_type(rows))
    return total.clamp_min(1e-30).sqrt()


def statistics_type(x: Tensor) -> torch.dtype:
    """In which precision sums over voxels are taken."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def streams(x: Tensor) -> bool:
    """Whether this is inference on a CPU: then voxels go by in pieces that stay in cache."""
    if torch.is_grad_enabled() or x.device.type != "cpu":
        return False
    return torch.jit.is_scripting() or not is_recorded()


def is_recorded() -> bool:
    """Whether a graph is being recorded, for an export or a compiler."""
    return torch.jit.is_tracing() or torch.compiler.is_compiling()


LEVELS = 5
REDUCTION = 2 ** (LEVELS - 1)


class MedNeXt(nn.Module):
    """Five-level residual encoder-decoder of MedNeXt blocks.

    In training with deep supervision the output is a list of logits [full, 1/2, 1/4, 1/8, 1/16 resolution]; otherwise
    (evaluation, TorchScript, no deep supervision) it is the full-resolution logits tensor alone. State dicts load
    strictly either way.

    Args:
        in_channels: image channels; 4 for T1n, T1c, T2w, T2-FLAIR.
        out_channels: logit channels; 3 for the regions ET, TC, WT.
        filters: channels at full resolution, doubled at each of the four lower ones.
        expansions: nine expansion ratios: encoder stages 0-3, bottleneck, decoder stages 3-0. A down block takes the
            ratio of the stage below it, an up block that of the stage it leads to.
        blocks: nine numbers of blocks, in the same order.
        kernel_size: odd edge length of the depthwise kernels.
        deep_supervision: whether there are output heads at the four lower resolutions.
        grn: whether Global Response Normalisation is in every block, down and up blocks too.
        checkpointing: recompute each block in the backward pass rather than keep its activations.
    """

    def __init__(
        self,
        in_channels: int = 4,
        out_channels: int = 3,
        filters: int = 32,
        expansions: Sequence[int] = (2, 3, 4, 4, 4, 4, 4, 3, 2),
        blocks: Sequence[int] = (2, 2, 2, 2, 2, 2, 2, 2, 2),
        kernel_size: int = 3,
        deep_supervision: bool = True,
        grn: bool = True,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0 or len(expansions) != 9 or len(blocks) != 9:
            raise ValueError(
                "MedNeXt needs an odd kernel_size, nine expansions and nine blocks; "
                f"got kernel_size {kernel_size}, expansions {tuple(expansions)}, blocks {tuple(blocks)}"
            )
        self.in_channels = in_channels
        width = [filters * 2**level for level in range(LEVELS)]
        options: dict[str, Any] = {"kernel_size": kernel_size, "grn": grn, "checkpointing": checkpointing}

        def stage(level: int, index: int) -> nn.Sequential:
            channels, ratio = width[level], expansions[index]
            return nn.Sequential(*(Block(channels, channels, ratio, **options) for _ in range(blocks[index])))

        self.stem = nn.Conv3d(in_channels, filters, 1)
        self.enc_stages = nn.ModuleList(stage(i, i) for i in range(4))
        self.down_blocks = nn.ModuleList(
            Block(width[i], width[i + 1], expansions[i + 1], stride=2, **options) for i in range(4)
        )
        self.bottleneck = stage(4, 4)
        self.up_blocks = nn.ModuleList(
            UpBlock(width[4 - i], width[3 - i], expansions[5 + i], stride=2, **options) for i in range(4)
        )
        self.dec_stages = nn.ModuleList(stage(3 - i, 5 + i) for i in range(4))
        self.out_0 = Head(filters, out_channels)
        coarse = range(4) if deep_supervision else ()
        self.out_blocks = nn.ModuleList(Head(width[4 - i], out_channels) for i in coarse)

    def forward(self, x: Tensor):
        """Segment a batch of images.

        Args:
            x: (N, in_channels, D, H, W), sizes divisible by 16; a MetaTensor comes back as a plain tensor.

        Returns:
            Logits (N, out_channels, D, H, W), or in training with deep supervision the list of five.

        Raises:
            ValueError: for another number of channels, or a size that 16 does not divide.
        """
        if not torch.jit.is_scripting():
            x = x.as_tensor() if isinstance(x, MetaTensor) else x
            self.check(x)
        bias = self.stem.bias
        assert bias is not None
        x = pointwise(x, self.stem.weight.flatten(1).t(), bias)
        skips: list[Tensor] = []
        for enc_stage, down_block in zip(self.enc_stages, self.down_blocks):  # noqa: B905 (TorchScript)
            x = enc_stage(x)
            skips.append(x)
            x = down_block(x)
        x = self.bottleneck(x)
        coarse = [x]  # features at 1/16 resolution, then 1/8, 1/4, 1/2
        for up_block, dec_stage in zip(self.up_blocks, self.dec_stages):  # noqa: B905
            x = dec_stage(up_block(x) + skips.pop())
            if self.training:
                coarse.append(x)
        logits = self.out_0(x)
        if not torch.jit.is_scripting() and self.training and len(self.out_blocks) > 0:
            return [logits, *self.coarse_logits(coarse[:4])]
        return logits

    @torch.jit.unused
    def coarse_logits(self, coarse: list[Tensor]) -> list[Tensor]:
        """Logits at 1/2, 1/4, 1/8 and 1/16 resolution of features at 1/16 to 1/2 resolution."""
        return [head(x) for head, x in zip(self.out_blocks, coarse, strict=True)][::-1]

    @torch.jit.unused
    def check(self, x: Tensor) -> None:
        """Raise ValueError where the network cannot take this input; silent while a graph is recorded."""
        if is_recorded():
            return
        if x.dim() != 5 or x.shape[1] != self.in_channels:
            order = " in the order T1n, T1c, T2w, T2-FLAIR" if self.in_channels == 4 else ""
            raise ValueError(
                f"MedNeXt: input of shape {tuple(x.shape)}, expected (N, {self.in_channels}, D, H, W) with "
                f"{self.in_channels} channels{order}: stack the modalities on axis 1"
            )
        if any(size % REDUCTION for size in x.shape[2:]):
            raise ValueError(
                f"MedNeXt: spatial size {tuple(x.shape[2:])} of the input is not divisible by {REDUCTION}: use an "
                "inferer that pads (custom.inference for the whole brain, monai.inferers.SlidingWindowInferer with a "
                f"roi_size divisible by {REDUCTION}), or pad with monai.transforms.DivisiblePadd(k={REDUCTION})"
            )


def mednext_small(in_channels: int = 4, out_channels: int = 3, **options: Any) -> MedNeXt:
    """MedNeXt-S: two blocks a stage, expansion 2. Options as of `MedNeXt`."""
    return MedNeXt(in_channels, out_channels, 32, (2,) * 9, (2,) * 9, **options)


def mednext_base(in_channels: int = 4, out_channels: int = 3, **options: Any) -> MedNeXt:
    """MedNeXt-B: two blocks a stage, expansion 2 to 4. Options as of `MedNeXt`."""
    return MedNeXt(in_channels, out_channels, 32, (2, 3, 4, 4, 4, 4, 4, 3, 2), (2,) * 9, **options)


def mednext_medium(in_channels: int = 4, out_channels: int = 3, **options: Any) -> MedNeXt:
    """MedNeXt-M: three or four blocks a stage, expansion 2 to 4. Options as of `MedNeXt`."""
    return MedNeXt(in_channels, out_channels, 32, (2, 3, 4, 4, 4, 4, 4, 3, 2), (3, 4, 4, 4, 4, 4, 4, 4, 3), **options)


def mednext_large(in_channels: int = 4, out_channels: int = 3, **options: Any) -> MedNeXt:
    """MedNeXt-L: three to eight blocks a stage, expansion 3 to 8. Options as of `MedNeXt`."""
    return MedNeXt(in_channels, out_channels, 32, (3, 4, 8, 8, 8, 8, 8, 4, 3), (3, 4, 8, 8, 8, 8, 8, 4, 3), **options)


def mednext_tiny(in_channels: int = 4, out_channels: int = 3, **options: Any) -> MedNeXt:
    """For tests and demonstrations: eight filters, one block a stage, expansion 2. Options as of `MedNeXt`."""
    return MedNeXt(in_channels, out_channels, 8, (2,) * 9, (1,) * 9, **options)


def mednext_light(in_channels: int = 4, out_channels: int = 3, **options: Any) -> MedNeXt:
    """For two CPU cores: as narrow as tiny, deeper and wider only where voxels are few. Options as of `MedNeXt`."""
    return MedNeXt(in_channels, out_channels, 8, (2, 2, 3, 4, 4, 4, 3, 2, 2), (1, 1, 2, 2, 2, 2, 2, 1, 1), **options)


def mednext_slim(in_channels: int = 4, out_channels: int = 3, **options: Any) -> MedNeXt:
    """Half as wide as MedNeXt-B, with less where channels are many. Options as of `MedNeXt`."""
    return MedNeXt(in_channels, out_channels, 16, (2, 3, 4, 4, 2, 4, 4, 3, 2), (2, 2, 2, 2, 1, 2, 2, 2, 2), **options)


MIC_DKFZ_NAMES = {
    "stem": "stem",
    **{f"enc_block_{i}": f"enc_stages.{i}" for i in range(4)},
    **{f"down_{i}": f"down_blocks.{i}" for i in range(4)},
    "bottleneck": "bottleneck",
    **{f"up_{i}": f"up_blocks.{3 - i}" for i in range(4)},
    **{f"dec_block_{i}": f"dec_stages.{3 - i}" for i in range(4)},
    "out_0": "out_0",
    **{f"out_{i}": f"out_blocks.{4 - i}" for i in range(1, 5)},
}


def from_mic_dkfz(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate the state dict of a MIC-DKFZ MedNeXt v1 into one for `MedNeXt` of the same size.

    `MIC_DKFZ_NAMES` maps the first part of each name; `grn_beta` and `grn_gamma` become `global_resp_beta` and
    `global_resp_gamma`; `dummy_tensor` is dropped, as is a leading `module.`. With GRN on, MIC-DKFZ's `down_0` has
    none: zeros stand in for it, which make a GRN the identity.

    Args:
        state_dict: names and tensors, as under "state_dict" in an nnU-Net `.model` file.

    Returns:
        A state dict for `MedNeXt`; without `out_1` to `out_4` one for `deep_supervision=False`.

    Raises:
        ValueError: names the keys that do not fit or are missing.
    """
    source = {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}
    source.pop("dummy_tensor", None)
    unknown = [name for name in source if name.partition(".")[0] not in MIC_DKFZ_NAMES]
    if unknown:
        raise ValueError(f"not a MIC-DKFZ MedNeXt state dict: unknown keys {_shown(unknown)}. {_advice(unknown)}")
    present = {name.partition(".")[0] for name in source}
    missing = [part for part in MIC_DKFZ_NAMES if part not in present]
    if missing and missing != ["out_1", "out_2", "out_3", "out_4"]:
        raise ValueError(f"incomplete MIC-DKFZ MedNeXt state dict: no keys for {_shown(missing)}")
    target = {}
    for name, tensor in source.items():
        part, _, rest = name.partition(".")
        target[f"{MIC_DKFZ_NAMES[part]}.{rest.replace('grn_', 'global_resp_')}"] = tensor
    if any(name.endswith("global_resp_gamma") for name in target):
        absent = target["down_blocks.0.conv2.bias"].new_zeros(1, len(target["down_blocks.0.conv2.bias"]), 1, 1, 1)
        target.setdefault("down_blocks.0.global_resp_beta", absent)
        target.setdefault("down_blocks.0.global_resp_gamma", absent.clone())
    return target


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _advice(unknown: Sequence[str]) -> str:
    if "state_dict" in unknown:
        return "Pass checkpoint['state_dict']"
    if any(name.startswith(("enc_stages.", "down_blocks.", "up_blocks.")) for name in unknown):
        return "These names are already the target's: load the state dict without translation"
    return "Expected stem, enc_block_0..3, down_0..3, bottleneck, up_3..0, dec_block_3..0 and out_0..4"
