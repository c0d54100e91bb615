"""Which series of a study is which modality, told by facts of DICOM and, where they are silent, by names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from ..cohort import MODALITIES, SubjectError
from ..cohort.names import CONTRAST_WORDS, NO_CONTRAST_WORDS
from .reading import NAMES, Series, Study, words_of

MIN_SLICES = 8
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_DERIVED = {
    *("ADC", "TRACEW", "TRACE", "FA", "EADC", "CBV", "CBF", "RBV", "RBF", "MTT", "TTP", "KTRANS", "DIFFUSION"),
    *("PERFUSION", "SUBTRACTION", "SUBTRACT", "SUB", "MIN IP", "MAX IP", "MIP", "MINIP", "PROJECTION IMAGE", "T1MAP"),
    *("T2MAP", "PHASE MAP", "MOSAIC"),
}
_OTHER_WORDS = {
    "diffusion": {"adc", "dwi", "dti", "diff", "diffusion", "tracew", "trace", "ep2d", "resolve", "isodwi", "b1000"},
    "perfusion": {"perf", "perfusion", "dsc", "dce", "pwi", "asl", "cbv", "cbf", "mtt", "ttp", "twist"},
    "susceptibility": {"swi", "swan", "t2star", "t2*", "hemo", "haem", "gre_t2"},
    "angiography": {"tof", "mra", "mrv", "angio", "venogram", "mip"},
    "function": {"bold", "fmri", "spectroscopy", "mrs", "svs", "csi", "fieldmap", "b0map", "b1map"},
    "subtraction": {"subtraction", "subtracted"},
    "another inversion": {"stir", "psir", "dir"},
    "a map": {"map", "t1map", "t2map", "relaxometry"},
}
_LOCALIZER_WORDS = {"localizer", "localiser", "loc", "scout", "survey", "topogram", "3plane", "plane", "aahead"}
_BODY_WORDS = {
    "spine",
    "cspine",
    "tspine",
    "lspine",
    "cervical",
    "thoracic",
    "lumbar",
    "neck",
    "orbit",
    "knee",
    "chest",
}
_HEAD_PARTS = {"", "HEAD", "BRAIN", "SKULL", "HEADNECK", "HEAD AND NECK", "WHOLEBODY"}
_CONTRAST = CONTRAST_WORDS | {"t1c", "t1ce", "t1gd", "t1gad", "t1post", "t1+c"}
_NO_CONTRAST = NO_CONTRAST_WORDS | {"t1n", "t1pre"}
_T1_WORDS = {"t1", "t1w", "t1n", "t1c", "t1ce", "t1gd", "t1gad", "t1post", "t1pre", "t1+c", "t1wce"}
_T1_SEQUENCES = {"mprage", "spgr", "fspgr", "bravo", "mp2rage", "tfl", "vibe", "flash3d"}
_T2_WORDS = {"t2", "t2w", "t2tse", "t2fse"}
_FLAIR_WORDS = {"flair", "t2flair", "t2f", "darkfluid", "t2wflair", "spaceflair"}
_KNOWN_WORDS = _CONTRAST | _NO_CONTRAST | _T1_WORDS | _T1_SEQUENCES | _T2_WORDS | _FLAIR_WORDS
_MOTION_WORDS = {"motion", "moved", "movement", "bewegt", "artefact", "artifact"}


def choose(
    study: Study, chosen: Mapping[str, str], without: Sequence[str] = (), name: str = "study"
) -> dict[str, Series]:
    """Choose a series for each modality, or ask.

    Args:
        study: its series get `used` and a reason each.
        chosen: labels (or, for NIfTI, file names) of series by modality: the user's own answers.
        without: modalities that may be missing.
        name: what the study is called in errors.

    Returns:
        Series by modality, in the order of `MODALITIES`.

    Raises:
        SubjectError: a modality is missing or cannot be told; the remedy names the option.
    """
    for one in study.series:
        _decide(one)
    answers = {modality: _named(study, label, modality, name) for modality, label in chosen.items()}
    for modality, one in answers.items():
        one.modality, one.contrast = modality, {"t1c": True, "t1n": False}.get(modality)
        one.reason = f"chosen by --{modality}"
    taken = [id(one) for one in answers.values()]
    if len(set(taken)) < len(taken):
        raise SubjectError(name, "the options", "one series was given for two modalities", "Give each its own")
    _tell_contrast([one for one in study.series if one.modality in ("t1", "t1n", "t1c")])
    found = dict(answers)
    for modality in MODALITIES:
        if modality not in found:
            rivals = [one for one in study.series if one.modality == modality and id(one) not in taken]
            if rivals:
                found[modality] = _best(rivals, modality, name)
    _ask_about_contrast(study, found, name, without)
    missing = [modality for modality in MODALITIES if modality not in found and modality not in without]
    if missing:
        raise SubjectError(name, "the study", _missing(study, missing), _remedy(missing))
    for one in found.values():
        one.used = True
    return {modality: found[modality] for modality in MODALITIES if modality in found}


def _decide(one: Series) -> None:
    """Set modality, contrast and reason of one series by itself."""
    if excluded := _why_not(one.facts, one.kind):
        one.reason = f"not used: {excluded}"
        return
    facts = one.facts
    words = words_of(facts["name"])
    one.known_words = [word for word in words if word in _KNOWN_WORDS]
    measured, named = weighting(facts), _named_weighting(words)
    timing = ", ".join(f"{k.upper()} {facts[k]:g}" for k in ("tr", "te", "ti") if facts.get(k) is not None)
    timing = f"{timing} ms" if timing else ""
    if measured and named and measured != named:
        one.reason = f"not used: its name says {named.upper()}, but {timing} is {measured.upper()}"
        return
    told = measured or named
    if told is None or told == "pd":
        one.reason = "not used: " + ("proton density" if told else "neither TR, TE and TI nor the name say what it is")
        return
    by = " and ".join(part for part in (timing, "its name" if named else "") if part)
    one.modality = {"t1": "t1", "t2": "t2w", "flair": "flair"}[told]
    one.reason = f"by {by}"
    if told == "t1":
        one.contrast, why = _contrast(facts, words)
        one.reason += f"; {why}" if why else ""


def weighting(facts: Mapping[str, Any]) -> str | None:
    """T1, T2, FLAIR or proton density by TR, TE and TI in ms; None where they are absent or fit none."""
    tr, te, ti = (facts.get(key) for key in ("tr", "te", "ti"))
    if tr is None or te is None:
        return None
    if ti is not None and 1400 <= ti <= 3200 and te >= 60:
        return "flair"
    if te > 12 and "GR" in str(facts.get("sequence", "")) and te < 60:
        return None  # T2*
    if te < 40 and (tr < 1200 or (ti is not None and 300 <= ti < 1400)):
        return "t1"
    if te >= 60 and tr >= 1800 and (ti is None or ti < 400):
        return "t2"
    if te < 40 and tr >= 1800 and ti is None:
        return "pd"
    return None


def _named_weighting(words: Sequence[str]) -> str | None:
    said = set(words)
    joined = " ".join(words)
    t1 = bool(said & (_T1_WORDS | _T1_SEQUENCES))
    if said & _FLAIR_WORDS or "dark fluid" in joined or "da fl" in joined:
        return "t1" if said & _T1_WORDS else "flair"
    t2 = bool(said & _T2_WORDS)
    if t1 and t2:
        return None
    return "t1" if t1 else "t2" if t2 else "pd" if said & {"pd", "pdw"} else None


def _contrast(facts: Mapping[str, Any], words: Sequence[str]) -> tuple[bool | None, str]:
    agent = str(facts.get("agent") or "")
    said = set(words)
    beside = any(a in _T1_WORDS and b in ("c", "k", "gd") for a, b in pairwise(words))
    named_post = bool(said & _CONTRAST) or beside
    named_pre = bool(said & _NO_CONTRAST) or any(a == "no" and b in _CONTRAST | {"c", "iv"} for a, b in pairwise(words))
    if agent and agent.upper() not in ("NO", "NONE", "N", "0", "NA", "N/A"):
        if named_pre and not named_post:
            return None, f"its name says before contrast, but the agent {agent} is recorded"
        return True, f"contrast agent {agent} is recorded"
    if named_pre:
        return False, "its name says before contrast"
    if named_post:
        return True, "its name says after contrast"
    return None, ""


def _why_not(facts: Mapping[str, Any], kind: str) -> str | None:
    """Why a series cannot be one of the four modalities, or None."""
    words, types = set(words_of(facts["name"])), set(facts["image_type"])
    if kind == "dicom" and "sub" in words:  # in the names of files it is BIDS for subject
        words.add("subtraction")
    if not facts["image"]:
        damage = facts.get("damage")
        return f"the file cannot be read ({damage})" if damage else "it holds no image"
    if facts["modality"] != "MR":
        return f"its modality is {facts['modality'] or 'not given'}, not MR"
    if facts.get("colour"):
        return "it is in colour: a screenshot or a fused map"
    if facts.get("burnt_in"):
        return "annotations are burnt into its pixels"
    if {"SECONDARY", "SCREEN SAVE"} <= set(types) or facts.get("sop_class", "").startswith(_SECONDARY_CAPTURE):
        return "it is a secondary capture (a screenshot)"
    if facts["body_part"] not in _HEAD_PARTS or words & _BODY_WORDS:
        return f"it shows {facts['body_part'].lower() or 'another part of the body'}, not the brain"
    if "LOCALIZER" in types or words & _LOCALIZER_WORDS:
        return "it is a localizer"
    if facts.get("planes", 1) > 1:
        return f"its slices lie in {facts['planes']} orientations"
    if derived := types & _DERIVED:
        return f"it is a derived map ({', '.join(sorted(derived))})"
    for other, known in _OTHER_WORDS.items():
        if words & known:
            return f"by its name it is {other}"
    if "EP" in re.split(r"[\\', \[\]]+", facts.get("sequence", "")):
        return "it is echo-planar: diffusion or perfusion"
    if facts.get("places") and facts["slices"] >= 2 * facts["places"]:
        return f"each place was imaged several times ({facts['slices']} images at {facts['places']} places)"
    shape = facts.get("shape", ())
    if len(shape) > 3 and shape[3] > 1:
        return f"it has four dimensions ({' x '.join(map(str, shape))})"
    if len(shape) < 3 and shape:
        return f"it has {len(shape)} dimensions"
    if words & {"seg", "mask", "label", "labels"}:
        return "by its name it is a mask"
    if facts.get("slices", 0) < MIN_SLICES:
        return f"it has {facts.get('slices', 0)} slices only"
    return None


def _tell_contrast(candidates: Sequence[Series]) -> None:
    """Give T1s whose contrast is not known the contrast that their place beside known ones implies."""
    post = [one for one in candidates if one.contrast is True]
    for one in candidates:
        if one.modality == "t1" and one.contrast is None and "recorded" not in one.reason and post:
            times = [str(other.facts.get("time") or "") for other in post]
            if one.facts.get("time") and all(times) and one.facts["time"] > min(times):
                one.contrast = True
                one.reason += "; taken after a series with contrast"
            else:
                one.contrast = False
                one.reason += f"; taken to be before contrast, which series {post[0].label} alone is known to have"
        if one.modality == "t1" and one.contrast is not None:
            one.modality = "t1c" if one.contrast else "t1n"


def _ask_about_contrast(study: Study, found: dict[str, Series], name: str, without: Sequence[str]) -> None:
    unknown = [one for one in study.series if one.modality == "t1"]
    wanted = [modality for modality in ("t1n", "t1c") if modality not in found and modality not in without]
    if not unknown or not wanted:
        return
    if len(unknown) == 1 and wanted == ["t1n"] and "t1c" in without:
        found["t1n"] = unknown[0]
        unknown[0].modality = "t1n"
        unknown[0].reason += "; without T1c it is taken to be before contrast"
        return
    shown = "; ".join(_describe(one) for one in unknown)
    reason = f"whether contrast was given cannot be told of {len(unknown)} T1 series: {shown}"
    options = " ".join(f"--{modality} SERIES" for modality in wanted)
    remedy = f"Look at them and say which is which by {options}"
    if len(unknown) < len(wanted):
        one = unknown[0].label
        remedy = f"Look at it: if there was none, say --t1n {one} --without t1c, else --t1c {one} --without t1n"
    raise SubjectError(name, "the study", reason, remedy)


def _best(rivals: Sequence[Series], modality: str, name: str) -> Series:
    """The best of several candidates; says of the others why they were left.

    Raises:
        SubjectError: the two best cannot be told apart.
    """
    ranked = sorted(rivals, key=_rank, reverse=True)
    best = ranked[0]
    equals = [one for one in ranked if _rank(one) == _rank(best)]
    if len(equals) > 1:
        labels = " or ".join(f"--{modality} {one.label}" for one in equals)
        shown = "; ".join(_describe(one) for one in equals)
        reason = f"{len(equals)} series could be the {NAMES[modality]} and cannot be told apart: {shown}"
        raise SubjectError(name, "the study", reason, f"Say which: {labels}")
    for one in ranked[1:]:
        one.reason += f"; not used: series {best.label} is better ({_difference(best, one)})"
    return best


_RANKED = ("no motion in its name", "3D", "not derived", "axial", "more slices", "thinner slices")


def _rank(one: Series) -> tuple:
    facts = one.facts
    return (
        not set(words_of(facts["name"])) & _MOTION_WORDS,
        facts.get("dimensions") == "3D",
        "DERIVED" not in facts["image_type"],
        facts.get("plane") == "axial",
        facts.get("slices", 0),
        -round(facts.get("thickness") or 99, 1),
    )


def _difference(best: Series, other: Series) -> str:
    return next(said for said, a, b in zip(_RANKED, _rank(best), _rank(other), strict=True) if a != b)


def _missing(study: Study, missing: Sequence[str]) -> str:
    names = " and ".join(NAMES[modality] for modality in missing)
    shown = "; ".join(_describe(one) for one in study.series)
    return f"no {names} among its {len(study.series)} series: {shown}"


def _remedy(missing: Sequence[str]) -> str:
    options = " ".join(f"--{modality} SERIES" for modality in missing)
    return f"If one of them is it, say {options}; to go on without, --without {','.join(missing)}"


def _describe(one: Series) -> str:
    modality = NAMES.get(one.modality or "", "T1" if one.modality == "t1" else "")
    order = one.facts.get("order")
    when = f", taken as number {order}" if order and one.modality == "t1" else ""
    return f"{one.label} ({', '.join(part for part in (modality, one.reason) if part)}{when})"


def _named(study: Study, label: str, modality: str, name: str) -> Series:
    for one in study.series:
        if str(label) in (one.label, *((path.name for path in one.files) if one.kind == "nifti" else ())):
            if not one.facts["image"]:
                raise SubjectError(name, f"series {label}", one.reason.removeprefix("not used: "), "Choose another")
            return one
    labels = ", ".join(one.label for one in study.series)
    raise SubjectError(name, f"--{modality} {label}", "there is no such series", f"Choose one of {labels}")
