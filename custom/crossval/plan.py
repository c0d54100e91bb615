"""The plan of a cross-validation: every model and fold as jobs, in stages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import UserError
from ..report import MODELS
from ..weights import fold_checkpoint
from .job import Job, Stage
from .overlays import Overlays
from .subjects import Subjects

BASELINES = {"segresnet": ("segresnet.json",), "mednext": ()}
OF_THE_PARTS = ("backbone", "corrector", "spacing", "patch_size")


def make_plan(
    run_dir: str | Path,
    subjects: Subjects,
    models: Iterable[str] = tuple(MODELS),
    overlays: Sequence[str] = (),
    seed: int = 0,
    notes: str = "",
) -> list[Stage]:
    """Plan the cross-validation of some models.

    Args:
        run_dir: folder of everything that comes out.
        subjects: who is cross-validated.
        models: some of segresnet, mednext and comnet; ``"comnet"`` needs ``"mednext"``, which is added.
        overlays: files to lay over the bundles' configs, see `Overlays`.
        seed: seed of everything.
        notes: what the checkpoints are to say of themselves.

    Returns:
        Stages to be run one after the other.

    Raises:
        ValueError: unknown model, or an overlay that cannot be laid over.
        FileNotFoundError: an overlay does not exist.
    """
    chosen = choose_models(models)
    return _Planner(Path(run_dir), subjects, chosen, Overlays(overlays, run_dir), seed, notes).stages()


def choose_models(models: Iterable[str]) -> tuple[str, ...]:
    """Return the models in the order of the table, with what they need.

    Raises:
        ValueError: unknown model, or none.
    """
    asked = set(models)
    unknown = sorted(asked - set(MODELS))
    if unknown or not asked:
        raise UserError(f"unknown model {', '.join(unknown) or '(none)'}: choose from {', '.join(MODELS)}")
    return tuple(model for model in MODELS if model in asked or (model == "mednext" and "comnet" in asked))


@dataclass(frozen=True)
class _Planner:
    run_dir: Path
    subjects: Subjects
    models: tuple[str, ...]
    overlays: Overlays
    seed: int
    notes: str

    @property
    def folds(self) -> range:
        return range(self.subjects.num_folds)

    def stages(self) -> list[Stage]:
        baselines = [model for model in self.models if model in BASELINES]
        every = [(model, fold) for model in baselines for fold in self.folds]
        stages = [
            Stage("train_backbones", tuple(self.train_backbone(model, fold) for model, fold in every)),
            Stage("score_backbones", tuple(self.score_backbone(model, fold) for model, fold in every)),
        ]
        if "comnet" in self.models:
            stages += [
                Stage("predict_coarse", (self.predict_coarse(),)),
                Stage("train_correctors", tuple(self.train_corrector(fold) for fold in self.folds)),
                Stage("score_comnet", tuple(self.score_comnet(fold) for fold in self.folds)),
                Stage("ensemble", (self.ensemble(),)),
            ]
        return [*stages, Stage("report", (self.report(),))]

    def train_backbone(self, model: str, fold: int) -> Job:
        overrides = self.training(fold) | {"models_dir": self.run_dir / model, "ckpt_dir": self.folder(model, fold)}
        configs = (*self.overlays.over("comnet_mednext", "train.json"), *BASELINES[model])
        return self.train_job(model, fold, "comnet_mednext", configs, overrides)

    def train_corrector(self, fold: int) -> Job:
        overrides = self.training(fold) | self.coarse_dirs() | {"models_dir": self.run_dir / "comnet"}
        configs = self.overlays.over("comnet_corrdiff", "train.json")
        return self.train_job("comnet", fold, "comnet_corrdiff", configs, overrides, reads=self.checkpoints("mednext"))

    def score_backbone(self, model: str, fold: int) -> Job:
        configs = (*self.overlays.over("comnet_mednext", "inference.json", "evaluate.json"), *BASELINES[model])
        return self.score_job(model, fold, "comnet_mednext", configs)

    def score_comnet(self, fold: int) -> Job:
        configs = self.overlays.over("comnet_corrdiff", "inference.json", "evaluate.json")
        return self.score_job("comnet", fold, "comnet_corrdiff", configs)

    def predict_coarse(self) -> Job:
        return Job(
            "predict_coarse",
            self.run_dir,
            "comnet_corrdiff",
            self.overlays.over("comnet_corrdiff", "train.json"),
            run_id="predict_coarse",
            overrides=self.data() | {"seed": self.seed} | self.coarse_dirs(),
            reads=self.checkpoints("mednext"),
            writes=(self.run_dir / "coarse",),
            cohort=self.subjects.digest,
        )

    def ensemble(self) -> Job:
        folder = self.run_dir / "ensemble"
        places = self.coarse_dirs() | {"correctors_dir": self.run_dir / "comnet", "models_dir": folder}
        parts = self.overlays.values("comnet_corrdiff", "train.json")
        settings = self.run_facts() | {key: parts[key] for key in OF_THE_PARTS}
        return Job(
            "ensemble",
            self.run_dir,
            "comnet_ensemble",
            self.overlays.over("comnet_ensemble", "train.json"),
            overrides=self.data() | places | settings,
            reads=self.checkpoints("mednext") + self.checkpoints("comnet"),
            writes=(folder / "model.pt", folder / "tuning.json"),
            cohort=self.subjects.digest,
        )

    def report(self) -> Job:
        scores = [self.run_dir / model / "scores" for model in self.models]
        records = [folder / name / "record.json" for folder in scores for name in self.subjects.folds]
        tuning = [self.run_dir / "ensemble" / "tuning.json"] if "comnet" in self.models else []
        return Job(
            "report",
            self.run_dir,
            reads=(*records, *tuning),
            writes=(self.run_dir / "report" / "report.html",),
            cohort=self.subjects.digest,
        )

    def train_job(
        self, model: str, fold: int, bundle: str, configs: Any, overrides: Any, reads: tuple[Path, ...] = ()
    ) -> Job:
        return Job(
            f"train_{model}_fold{fold}",
            self.run_dir,
            bundle,
            configs,
            overrides=overrides,
            reads=reads,
            writes=(fold_checkpoint(self.run_dir / model, fold),),
            folder=self.folder(model, fold),
            cohort=self.subjects.digest,
        )

    def score_job(self, model: str, fold: int, bundle: str, configs: Any) -> Job:
        checkpoint = fold_checkpoint(self.run_dir / model, fold)
        scores = self.run_dir / model / "scores"
        places = {"dataset_dir": self.subjects.dataset_dir, "datalist_file": self.subjects.datalist_file}
        settings = {"fold": fold, "cohort#num_folds": self.subjects.num_folds, "batch#model": MODELS[model]}
        return Job(
            f"score_{model}_fold{fold}",
            self.run_dir,
            bundle,
            configs,
            overrides=places | {"checkpoint": checkpoint, "output_dir": scores} | settings,
            reads=(checkpoint,),
            writes=(scores / "scores.csv",),
            cohort=self.subjects.digest,
        )

    def data(self) -> dict[str, Any]:
        return {
            "dataset_dir": self.subjects.dataset_dir,
            "datalist_file": self.subjects.datalist_file,
            "num_folds": self.subjects.num_folds,
        }

    def training(self, fold: int) -> dict[str, Any]:
        return self.data() | {"fold": fold} | self.run_facts()

    def run_facts(self) -> dict[str, Any]:
        return {"seed": self.seed} | ({"notes": self.notes} if self.notes else {})

    def coarse_dirs(self) -> dict[str, Any]:
        return {"backbones_dir": self.run_dir / "mednext", "coarse_dir": self.run_dir / "coarse"}

    def folder(self, model: str, fold: int) -> Path:
        return fold_checkpoint(self.run_dir / model, fold).parent

    def checkpoints(self, model: str) -> tuple[Path, ...]:
        return tuple(fold_checkpoint(self.run_dir / model, fold) for fold in self.folds)
