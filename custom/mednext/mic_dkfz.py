"""State dicts of MIC-DKFZ's MedNeXt v1 (github.com/MIC-DKFZ/MedNeXt) for `MedNeXt`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

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
