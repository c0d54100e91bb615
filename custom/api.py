"""The door for notebooks and pipelines: `from custom import Segmenter`."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import nibabel as nib
import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.transforms import Compose, CopyItemsd

from .bundle_run import bundle_root, config_value, ensemble_settings, plainly, refuse_unknown
from .cohort import MODALITIES, missing_modalities, subject_from_files
from .files import UserError
from .inference import NativeGridWriter, PostprocessRegionsd, SaveSubjectd, told_warnings, volumes_ml
from .transforms import check_spacing
from .weights import Weights

Image: TypeAlias = "str | os.PathLike[str] | nib.Nifti1Image"


@dataclass(frozen=True)
class Segmentation:
    """What `Segmenter.segment` found in one subject.

    Attributes:
        label_map: on the grid of the first image, ``[x, y, z]`` uint8; values as the bundle's ``output_palette``
            says: 1 core, 2 oedema, 3 enhancing tumour by default.
        volumes: of ET, TC and WT, in ml.
        warnings: what is odd about images or result, as sentences.
        probabilities: of ET, TC and WT on the same grid, ``[x, y, z, 3]`` float32 in [0, 1], where they were asked for.
        missing: keys of the modalities that were not given; what that costs is among the warnings.
    """

    label_map: nib.Nifti1Image
    volumes: dict[str, float]
    warnings: list[str]
    probabilities: nib.Nifti1Image | None = None
    missing: tuple[str, ...] = ()


class Segmenter:
    """Segments gliomas as `comnet segment` does, in this process: it runs the ensemble bundle's own ``inference.json``.

    Networks are built, loaded and where possible compiled once, for as many subjects as are given to `segment`.

    Args:
        weights: folder with model.pt (a whole CoMNeT) or fold<k>/model.pt, or one checkpoint; by default the bundle's.
        device: "cpu", "cuda", "cuda:1"; by default a GPU if there is one.
        runtime: "auto", "torch" or "openvino", see `custom.mednext.runtime.Runtime`.
        settings: any other value of the bundle's inference.json, by name, e.g. ``thresholds=[0.4, 0.5, 0.5]``.

    Raises:
        CheckpointError: there are no weights, or they cannot be read.
        UserError: no such device, runtime or setting.
    """

    @plainly()
    def __init__(
        self,
        weights: str | os.PathLike[str] | None = None,
        device: str | None = None,
        runtime: str = "auto",
        **settings: Any,
    ) -> None:
        root = bundle_root("comnet_ensemble")
        config = root / "configs" / "inference.json"
        refuse_unknown(settings, [str(config)])
        found = Weights(Path(weights).expanduser() if weights else root / "models")
        places = {"bundle_root": root, "weights_dir": found.path}
        parser = ConfigParser()
        parser.read_config(str(config))
        parser.update(config_value(places | {"runtime": runtime} | ensemble_settings(found, device) | settings))
        found.refuse_other_spacing(check_spacing(parser.get_parsed_content("spacing")))
        self._device = parser.get_parsed_content("device")
        self._amp = parser.get_parsed_content("amp") and self._device.type == "cuda"
        self._palette = parser.get_parsed_content("output_palette")
        self._preprocessing = parser.get_parsed_content("preprocessing")
        self._inferer = parser.get_parsed_content("inferer")
        self._network = parser.get_parsed_content("execution").network.eval()
        found.load(parser.get_parsed_content("network"))
        steps: list[Any] = []
        for step in parser.get_parsed_content("postprocessing").transforms:
            if isinstance(step, PostprocessRegionsd):
                steps.append(CopyItemsd("pred", names="probabilities"))
            if not isinstance(step, SaveSubjectd):
                steps.append(step)
        self._postprocessing = Compose(steps)
        (self._regions,) = (step.postprocess for step in steps if isinstance(step, PostprocessRegionsd))

    @plainly()
    def segment(
        self,
        t1n: Image | None = None,
        t1c: Image | None = None,
        t2w: Image | None = None,
        flair: Image | None = None,
        name: str | None = None,
        probabilities: bool = False,
    ) -> Segmentation:
        """Segment one subject by the modalities there are: T1c or T2-FLAIR must be among them.

        Weights that were not trained for missing modalities refuse fewer than four, unless ``allow_missing=True`` is
        among the settings.

        Args:
            t1n: T1 before contrast: a NIfTI file, or an image as nibabel loads it; skull-stripped, as all four.
            t1c: T1 after contrast, on the same grid.
            t2w: T2, on the same grid.
            flair: T2-FLAIR, on the same grid.
            name: of the subject, for messages.
            probabilities: return the probability maps as well.

        Raises:
            SubjectError: an image is absent, damaged, or does not fit the others; says which, and what to do.
        """
        given = dict(zip(MODALITIES, (t1n, t1c, t2w, flair), strict=True))
        images = {key: image for key, image in given.items() if image is not None}
        with tempfile.TemporaryDirectory(prefix="comnet-") as folder:
            files: dict[str, Any] = {key: _file(image, Path(folder, f"{key}.nii")) for key, image in images.items()}
            in_memory = not isinstance(next(iter(images.values()), ""), (str, os.PathLike))
            subject = subject_from_files(**files, name=name or ("subject" if in_memory else None))
            item = self._preprocessing({"subject": subject.name, "image": list(subject.images)})
            with torch.no_grad(), torch.autocast("cuda", enabled=self._amp):
                item["pred"] = self._inferer(item["image"][None].to(self._device), self._network)[0].float()
            warnings = item["warnings"]
            item = self._postprocessing(item)
            label_map = _image(item["pred"], np.uint8)
            maps = _image(item["probabilities"], np.float32) if probabilities else None
        volumes = volumes_ml(item["pred"], self._palette)
        told = [*warnings, *told_warnings(item["erased"], volumes)]
        return Segmentation(label_map, volumes, told, maps, missing_modalities(subject.images))

    @plainly()
    def segment_raw(
        self,
        study: str | os.PathLike[str],
        output_dir: str | os.PathLike[str],
        every_series: bool = False,
        **preparing: Any,
    ) -> Segmentation:
        """Segment a study as it left the scanner, as `comnet segment --raw` does.

        Args:
            study: folder or zip file of DICOM or NIfTI files.
            output_dir: for the prepared images, masks on the scanner's own grids, DICOM-SEG and pictures.
            every_series: masks on the grids of all series, not of T1c alone.
            preparing: options of `custom.clinical.study.prepare_study`.

        Returns:
            Label map on the grid of T1c as scanned; volumes from the 1 mm images; probabilities on these.

        Raises:
            SubjectError: the study cannot be prepared; says why, or asks.
            UserError: the extra `clinical` is not installed.
        """
        from .clinical.masks import deliver
        from .clinical.study import prepare_study

        prepared = prepare_study(Path(study), Path(output_dir) / "prepared", **preparing)
        images = {modality: str(path) for modality, path in prepared.images.items()}
        found = self.segment(**images, name=prepared.name, probabilities=True)
        folder = Path(output_dir) / prepared.name
        label_map, warnings = deliver(prepared, found.probabilities, folder, self._regions, every_series)
        return replace(found, label_map=label_map, warnings=[*found.warnings, *warnings])


def _file(image: Image, temporary: Path) -> str | os.PathLike[str]:
    """Return the path of an image; one in memory is written first, since what is checked is a file."""
    if isinstance(image, (str, os.PathLike)):
        return image
    if not isinstance(image, nib.Nifti1Image):
        kind = type(image).__name__
        raise UserError(f"{temporary.stem} is a {kind}: give the path of a NIfTI file, or an image as nibabel loads it")
    nib.save(image, temporary)
    return temporary


def _image(array: Any, dtype: Any) -> nib.Nifti1Image:
    writer = NativeGridWriter(output_dtype=dtype)
    writer.set_data_array(array.cpu())
    writer.set_metadata(array.meta, resample=False)
    return writer.image()
