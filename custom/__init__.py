"""CoMNeT: MedNeXt with GRN, CorrDiff refinement and fold ensembling for glioma segmentation, as MONAI bundles share it."""

__version__ = "0.1.0"
