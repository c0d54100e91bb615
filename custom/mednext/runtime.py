"""Which library executes the backbones, decided once and said in one line."""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..files import UserError
from .network import MedNeXt

if TYPE_CHECKING:
    from .openvino import Program

logger = logging.getLogger("comnet")

RUNTIMES = ("auto", "torch", "openvino")
PRECISIONS = ("fp32", "bf16")
WORTH_COMPILING = 1_000_000
"""Parameters; MedNeXt-S has 5.5 million. A tiny network runs in the time that it takes to compile."""
INSTALL = 'pip install "comnet-glioma[cpu]"'


class Runtime:
    """What executes the MedNeXt backbones of a network; everything else stays with PyTorch.

    Args:
        network: a MedNeXt, or what holds some.
        runtime: ``"openvino"`` on a CPU; ``"torch"``; ``"auto"`` is OpenVINO where it is installed, the device is a CPU
            and the network is large enough to be worth compiling.
        precision: of OpenVINO: ``"fp32"``, or ``"bf16"`` for processors with matrix units for it (AMX). Elsewhere it
            is slower, and everywhere it moves more voxels than fp32 does: see docs/benchmarks.md.
        device: where the network runs.
        cache_dir: folder for compiled networks, under a key of weights, size and precision; ``True`` is the user's own
            cache folder (``$XDG_CACHE_HOME/comnet``, else ``~/.cache/comnet``), ``None`` or ``False`` keeps none.

    Attributes:
        network: ``network`` with its MedNeXts executed as decided; it shares all weights, so that those loaded into
            either later count for both.
        label: what was decided, such as ``"openvino fp32"``: part of what a result depends on.

    Raises:
        ValueError: no such runtime or precision, or OpenVINO is asked for by name where it cannot serve.
    """

    def __init__(
        self,
        network: nn.Module,
        runtime: str = "auto",
        precision: str = "fp32",
        device: torch.device | str = "cpu",
        cache_dir: str | Path | bool | None = None,
    ) -> None:
        for value, known, option in ((runtime, RUNTIMES, "runtime"), (precision, PRECISIONS, "precision")):
            if value not in known:
                raise UserError(f"no {option} {value!r}: choose one of {', '.join(known)}")
        self.choice, self.precision, self.device = runtime, precision, torch.device(device)
        self.required = runtime == "openvino"
        self.cache_dir = user_cache() if cache_dir is True else cache_dir or None
        self.served: tuple[nn.Module, nn.Module] | None = None
        self.network, self.label = network, "torch"
        if runtime != "torch" and self._fits(network) and self._is_possible():
            self.network, self.label = self._executed(network), f"openvino {precision}"

    def __call__(self, network: nn.Module) -> nn.Module:
        """Return a network of someone else's, such as the copy that MONAI Label keeps, executed by the same settings.

        A server keeps its networks, so that compiling pays at any size. And PyTorch's threads spin there between two
        tasks (GOMP_SPINCOUNT is read when PyTorch is imported), which on shared cores takes most of the time.
        """
        if self.choice == "torch" or network is self.network or not isinstance(network, nn.Module):
            return network
        if self.served is None or network not in self.served:
            possible = mednexts(network) and self._is_possible()
            self.served = network, self._executed(network) if possible else network
        return self.served[1]

    def _executed(self, network: nn.Module) -> nn.Module:
        from .openvino import Program, has_bf16

        if self.precision == "bf16" and not has_bf16():
            raise UserError("this processor has no bfloat16 arithmetic: use --precision fp32")
        return self._replaced(network, Program(self.precision, self.cache_dir, fixed=len(mednexts(network)) == 1))

    def _fits(self, network: nn.Module) -> bool:
        backbones = mednexts(network)
        if self.required and not backbones:
            raise UserError(
                f"runtime openvino executes MedNeXt, and {type(network).__name__} has none: use --runtime torch"
            )
        sizes = [sum(parameter.numel() for parameter in backbone.parameters()) for backbone in backbones]
        return self.required or any(size >= WORTH_COMPILING for size in sizes)

    def _is_possible(self) -> bool:
        if self.device.type != "cpu":
            if self.required:
                raise UserError(f"runtime openvino runs on the CPU, not on {self.device}: use --device cpu")
            return False
        try:
            if importlib.util.find_spec("openvino") is None:
                raise ImportError("it is not installed")
        except (ImportError, AttributeError, OSError) as error:
            reason = f"openvino cannot be used: {error}"
            if self.required:
                raise UserError(f"{reason}: {INSTALL}, or use --runtime torch") from error
            logger.info("%s, PyTorch runs the networks; %s is faster on a CPU", reason, INSTALL)
            return False
        return True

    def _replaced(self, module: nn.Module, program: Program) -> nn.Module:
        if isinstance(module, MedNeXt):
            from .openvino import OpenVINOMedNeXt

            return OpenVINOMedNeXt(module, program, fall_back=not self.required).train(module.training)
        if not mednexts(module):
            return module
        twin = copy.copy(module)  # shares all parameters and buffers
        twin._modules = {
            name: child if child is None else self._replaced(child, program) for name, child in module._modules.items()
        }
        return twin


def mednexts(network: nn.Module) -> list[MedNeXt]:
    """All MedNeXts within a network."""
    return [module for module in network.modules() if isinstance(module, MedNeXt)]


def user_cache() -> Path | None:
    """Where this user's programs keep what they can make again; ``None`` for a user without a home."""
    home = os.path.expanduser("~")
    cache = os.environ.get("XDG_CACHE_HOME") or (os.path.join(home, ".cache") if os.path.isabs(home) else "")
    return Path(cache) / "comnet" if cache else None
