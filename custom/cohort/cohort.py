"""The cohort as bundle configurations see it: items to train on, to validate on, and to infer on."""

from __future__ import annotations

import copy
import logging
import os
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

from ..files import UserError
from .datalist import build_datalist, load_datalist, with_absolute_paths, write_datalist
from .layouts import DatasetDir, PathLike, find_subjects
from .subject import Exclusion

logger = logging.getLogger("comnet")

Item = dict[str, Any]
OF_USE_ONLY = ("rebuild", "show_masks")
"""Fields of a `Cohort` that do not change the datalist."""


@dataclass(eq=False)
class Cohort:
    """Checked subjects of a dataset, in folds.

    Construction reads nothing. The first use of `training`, `validation` or `subjects` loads the datalist, or builds
    it, which reads every file of the dataset once; `inputs` only looks for names.

    Args:
        dataset_dir: a folder of subject folders, one subject's own folder, or a list of such folders; for `inputs`
            also one subject as the arguments of `subject_from_files`.
        datalist_file: JSON to load; where it does not exist yet it is written, with the exclusion report beside it. By
            default the datalist is built in memory.
        layout: one of `LAYOUTS`, or "auto".
        palette: key of `PALETTES`; by default that of each subject's layout.
        num_folds: number of folds; a loaded datalist must have as many.
        seed: of the folds.
        unknown_labels: "exclude" or "background", see `check_subject`.
        allow_empty_mask: keep subjects without tumour.
        num_workers: threads that check subjects.
        progress: show a bar while subjects are checked.
        rebuild: build the datalist even where there is one, which is replaced once the new one is ready.
        show_masks: whether `inputs` say where a subject's mask is, to be drawn beside the result.

    Attributes:
        exclusions: what the last check left out.
    """

    dataset_dir: DatasetDir
    datalist_file: PathLike | None = None
    layout: str = "auto"
    palette: str | None = None
    num_folds: int = 5
    seed: int = 0
    unknown_labels: str = "exclude"
    allow_empty_mask: bool = False
    num_workers: int | None = None
    progress: bool = True
    rebuild: bool = False
    show_masks: bool = False
    exclusions: list[Exclusion] = field(default_factory=list, init=False)

    def training(self, fold: int | str | None = None) -> list[Item]:
        """Items of all folds but `fold`; all items for None or "all".

        Each item has "subject", "patient", "image" (four absolute paths in order of `MODALITIES`), "label", "palette",
        "label_source", "has_et" and "fold".

        Raises:
            ValueError: no such fold, or nothing is left to train on; whatever `build_datalist` raises.
        """
        if fold is None or fold == "all":
            return self.subjects()
        return self._part(fold, "training", [item for item in self.subjects() if item["fold"] != fold])

    def validation(self, fold: int) -> list[Item]:
        """Items of `fold`, like those of `training`.

        Raises:
            ValueError: no such fold, or it is empty; whatever `build_datalist` raises.
        """
        return self._part(fold, "validation", [item for item in self.subjects() if item["fold"] == fold])

    def subjects(self) -> list[Item]:
        """All items, like those of `training`, in order of subject names; the caller may change them."""
        return copy.deepcopy(self._datalist["training"])

    def inputs(self) -> list[Item]:
        """Items to infer on, found by name alone: "subject" and "image", with `show_masks` also "truth" and "palette".

        "image" is four absolute paths in order of `MODALITIES`; that of an absent modality is empty. Nothing is opened:
        each subject is checked as it is loaded, see `custom.transforms.LoadSubjectd`. Folders whose files tell neither
        T1c nor T2-FLAIR, or leave open what is missing, are in `exclusions` and in the log.

        Raises:
            ValueError: nothing there could be a subject.
            OSError: the dataset folder is absent or is none.
        """
        return copy.deepcopy(self._inputs)

    @cached_property
    def _inputs(self) -> list[Item]:
        subjects, self.exclusions = find_subjects(self.dataset_dir, self.layout, self.palette, False, subsets=True)
        logger.info("%s: %d subjects to infer on, %d excluded", self.dataset_dir, len(subjects), len(self.exclusions))
        for exclusion in self.exclusions:
            logger.warning("excluded: %s", exclusion)
        return [
            {"subject": subject.name, "image": list(subject.images)}
            | ({"truth": subject.label, "palette": subject.palette} if self.show_masks and subject.label else {})
            for subject in subjects
        ]

    @cached_property
    def _datalist(self) -> dict[str, Any]:
        if self.datalist_file is not None and os.path.isdir(self.datalist_file):
            raise UserError(f"{self.datalist_file} is a folder: name the datalist's file, such as datalist.json in it")
        if self.datalist_file is None or self.rebuild or not os.path.exists(self.datalist_file):
            settings = {
                one.name: getattr(self, one.name) for one in fields(self) if one.init and one.name not in OF_USE_ONLY
            }
            datalist, self.exclusions = build_datalist(**settings)
            if self.datalist_file is None:
                return with_absolute_paths(datalist, self.dataset_dir)
            table = write_datalist(datalist, self.exclusions, self.datalist_file, self.dataset_dir)
            logger.info("wrote %s and %s", self.datalist_file, table)
        datalist = load_datalist(self.datalist_file, self.dataset_dir)
        self._check_settings(datalist)
        logger.info("%s: loaded %d subjects", self.datalist_file, len(datalist["training"]))
        return datalist

    def _check_settings(self, datalist: dict[str, Any]) -> None:
        folds = datalist.get("num_folds", 1 + max(item["fold"] for item in datalist["training"]))
        if folds != self.num_folds:
            raise UserError(
                f"{self.datalist_file} has {folds} folds, but num_folds is {self.num_folds}: "
                f"set num_folds to {folds}, or delete the datalist to have it built again."
            )
        palettes = {item["palette"] for item in datalist["training"]}
        if self.palette is not None and palettes != {self.palette}:
            raise UserError(
                f"{self.datalist_file} was built with palette {', '.join(sorted(palettes))}, not {self.palette}: "
                "ask for that one, or delete the datalist to have it built again."
            )
        for key in ("seed", "unknown_labels", "allow_empty_mask"):
            asked, stands = getattr(self, key), datalist.get(key, getattr(self, key))
            if stands != asked:
                advice = f"{asked!r} was asked for. Delete it to have it built again"
                logger.warning("%s was built with %s=%r, which stands; %s.", self.datalist_file, key, stands, advice)

    def _part(self, fold: int | str | None, part: str, items: list[Item]) -> list[Item]:
        if isinstance(fold, bool) or not isinstance(fold, int) or not 0 <= fold < self.num_folds:
            raise UserError(f"no fold {fold!r} to take {part} items of: give a number from 0 to {self.num_folds - 1}.")
        if not items:
            raise UserError(
                f"fold {fold} of {self.num_folds} leaves no subject for {part}: give fewer folds or more subjects."
            )
        return items
