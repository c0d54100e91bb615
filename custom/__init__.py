"""CoMNeT: MedNeXt with GRN, CorrDiff and fold ensembling for glioma segmentation; the MONAI bundles share it."""

__version__ = "0.1.0"
