"""MedNeXt v1 with Global Response Normalisation in every block.

References: Roy et al., "MedNeXt: Transformer-driven Scaling of ConvNets for Medical Image Segmentation", MICCAI 2023;
GRN from Woo et al., "ConvNeXt V2", CVPR 2023. Wiring as in github.com/MIC-DKFZ/MedNeXt, parameter names as in MONAI.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from torch import Tensor, nn

from .blocks import Block, Head, UpBlock, pointwise

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
        if torch.jit.is_tracing() or torch.compiler.is_compiling():
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


def mednext_small(
    in_channels: int = 4,
    out_channels: int = 3,
    kernel_size: int = 3,
    deep_supervision: bool = True,
    grn: bool = True,
    checkpointing: bool = False,
) -> MedNeXt:
    """MedNeXt-S: two blocks a stage, expansion 2. Arguments as in `MedNeXt`."""
    shape = (32, (2,) * 9, (2,) * 9)
    return MedNeXt(in_channels, out_channels, *shape, kernel_size, deep_supervision, grn, checkpointing)


def mednext_base(
    in_channels: int = 4,
    out_channels: int = 3,
    kernel_size: int = 3,
    deep_supervision: bool = True,
    grn: bool = True,
    checkpointing: bool = False,
) -> MedNeXt:
    """MedNeXt-B: two blocks a stage, expansion 2 to 4. Arguments as in `MedNeXt`."""
    shape = (32, (2, 3, 4, 4, 4, 4, 4, 3, 2), (2,) * 9)
    return MedNeXt(in_channels, out_channels, *shape, kernel_size, deep_supervision, grn, checkpointing)


def mednext_medium(
    in_channels: int = 4,
    out_channels: int = 3,
    kernel_size: int = 3,
    deep_supervision: bool = True,
    grn: bool = True,
    checkpointing: bool = False,
) -> MedNeXt:
    """MedNeXt-M: three or four blocks a stage, expansion 2 to 4. Arguments as in `MedNeXt`."""
    shape = (32, (2, 3, 4, 4, 4, 4, 4, 3, 2), (3, 4, 4, 4, 4, 4, 4, 4, 3))
    return MedNeXt(in_channels, out_channels, *shape, kernel_size, deep_supervision, grn, checkpointing)


def mednext_large(
    in_channels: int = 4,
    out_channels: int = 3,
    kernel_size: int = 3,
    deep_supervision: bool = True,
    grn: bool = True,
    checkpointing: bool = False,
) -> MedNeXt:
    """MedNeXt-L: three to eight blocks a stage, expansion 3 to 8. Arguments as in `MedNeXt`."""
    shape = (32, (3, 4, 8, 8, 8, 8, 8, 4, 3), (3, 4, 8, 8, 8, 8, 8, 4, 3))
    return MedNeXt(in_channels, out_channels, *shape, kernel_size, deep_supervision, grn, checkpointing)


def mednext_tiny(
    in_channels: int = 4,
    out_channels: int = 3,
    kernel_size: int = 3,
    deep_supervision: bool = True,
    grn: bool = True,
    checkpointing: bool = False,
) -> MedNeXt:
    """For tests and demonstrations: eight filters, one block a stage, expansion 2. Arguments as in `MedNeXt`."""
    shape = (8, (2,) * 9, (1,) * 9)
    return MedNeXt(in_channels, out_channels, *shape, kernel_size, deep_supervision, grn, checkpointing)


def mednext_light(
    in_channels: int = 4,
    out_channels: int = 3,
    kernel_size: int = 3,
    deep_supervision: bool = True,
    grn: bool = True,
    checkpointing: bool = False,
) -> MedNeXt:
    """For two CPU cores: as narrow as tiny, deeper and wider only where voxels are few. Arguments as in `MedNeXt`."""
    shape = (8, (2, 2, 3, 4, 4, 4, 3, 2, 2), (1, 1, 2, 2, 2, 2, 2, 1, 1))
    return MedNeXt(in_channels, out_channels, *shape, kernel_size, deep_supervision, grn, checkpointing)


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
    target = {_translate(name): tensor for name, tensor in source.items()}
    if any(name.endswith("global_resp_gamma") for name in target):
        absent = target["down_blocks.0.conv2.bias"].new_zeros(1, len(target["down_blocks.0.conv2.bias"]), 1, 1, 1)
        target.setdefault("down_blocks.0.global_resp_beta", absent)
        target.setdefault("down_blocks.0.global_resp_gamma", absent.clone())
    return target


def _translate(name: str) -> str:
    part, _, rest = name.partition(".")
    return f"{MIC_DKFZ_NAMES[part]}.{rest.replace('grn_', 'global_resp_')}"


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _advice(unknown: Sequence[str]) -> str:
    if "state_dict" in unknown:
        return "Pass checkpoint['state_dict']"
    if any(name.startswith(("enc_stages.", "down_blocks.", "up_blocks.")) for name in unknown):
        return "These names are already the target's: load the state dict without translation"
    return "Expected stem, enc_block_0..3, down_0..3, bottleneck, up_3..0, dec_block_3..0 and out_0..4"
