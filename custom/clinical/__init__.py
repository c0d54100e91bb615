"""From the study as it left the scanner to four prepared modalities, and from masks back to the study as DICOM-SEG.

Needs the extra `clinical`; nothing else in the package does.
"""
