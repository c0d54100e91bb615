"""What the name of a file says: which modality it is, or a mask, and whether that is certain."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise

from .subject import MODALITIES

LAYOUTS = ("utsw", "brats2021", "brats2023", "plain")
LABEL_SOURCES = ("manual", "expert", "unknown", "automatic")

_UTSW_ROLES = {
    "brain_t1": "t1n",
    "brain_t1ce": "t1c",
    "brain_t2": "t2w",
    "brain_flair": "flair",
    "rtumorseg_manual_correction": "manual",
    "tumorseg_fets": "automatic",
}
_CASE_SUFFIXES = {
    "brats2021": ("_", {"t1": "t1n", "t1ce": "t1c", "t2": "t2w", "flair": "flair", "seg": "expert"}),
    "brats2023": ("-", {"t1n": "t1n", "t1c": "t1c", "t2w": "t2w", "t2f": "flair", "seg": "expert"}),
}
_PLAIN_WORDS = {
    "t1n": {"t1", "t1n", "t1w", "t1pre", "t1native"},
    "t1c": {
        *("t1c", "t1ce", "t1gd", "t1gad", "t1post", "t1contrast", "t1wce", "t1wgd"),
        *("t1c+", "t1+c", "t1+", "ct1", "cet1"),
    },
    "t2w": {"t2", "t2w"},
    "flair": {"flair", "t2flair", "t2f", "t2wflair"},
}
_AGENTS = {
    *("ce", "gd", "gad", "gado", "gadolinium", "gadovist", "gadavist", "gadobutrol", "dotarem", "multihance"),
    *("prohance", "contrast", "contraste", "kontrast", "kontrastmittel", "km", "mdc", "iv"),
}
CONTRAST_WORDS = _AGENTS - {"iv"} | {
    *("post", "postgd", "postcontrast", "enhanced", "enh", "inj", "injecte", "injection", "+c", "c+"),
    *(word for agent in _AGENTS for word in (f"{agent}+", f"+{agent}")),
}
NO_CONTRAST_WORDS = {
    *("pre", "pregd", "precontrast", "nonenhanced", "noncontrast", "nativ", "native", "without", "wo", "ohne", "sans"),
    *("plain", "unenhanced", "non", "before", "vor", "prae", "avant", "senza", "sin"),
}
_DENIED = re.compile(rf"(?<![a-z0-9])(c|{'|'.join(sorted(_AGENTS))})-(?![a-z0-9])")
_BIDS_OF_CASE = re.compile(r"_(?:run-|rec-|space-|ses-(?=[a-z]))[^_]+(?=_)")
_BIDS_AGENT = re.compile(r"(_ce-[^_]+)(.*)(?=_)")
_MASK_WORDS = {"seg", "segm", "segmentation", "label", "labels", "labelmap", "mask", "tumorseg", "tumourseg"}
_OTHER_IMAGES = {"ants", "map", "mapping", "star", "swi", "adc", "dwi", "dti", "diffusion", "perfusion", "cbv", "cbf"}


def is_nifti(name: str) -> bool:
    """Whether a file name is that of a visible NIfTI file (`._T1.nii.gz`, which macOS leaves behind, is not)."""
    return name.lower().endswith((".nii", ".nii.gz")) and not name.startswith(".")


def stem(name: str) -> str:
    """File name in lower case without folder and without `.nii` or `.nii.gz`."""
    return name.rpartition("/")[2].lower().removesuffix(".gz").removesuffix(".nii")


def case_of(name: str, layout: str) -> str:
    """The `<case>` part of a BraTS file name, empty in the other layouts."""
    return stem(name).rpartition(_CASE_SUFFIXES[layout][0])[0] if layout in _CASE_SUFFIXES else ""


def role_of(name: str, layout: str) -> str | None:
    """A modality key, a label source (then the file is a tumour mask), or None where the name says neither."""
    if layout == "utsw":
        return _UTSW_ROLES.get(stem(name))
    if layout == "plain":
        return _plain_role(name_words(name))
    separator, roles = _CASE_SUFFIXES[layout]
    case, _, suffix = stem(name).rpartition(separator)
    return roles.get(suffix) if case else None


def by_role(names: Iterable[str], layout: str) -> dict[str, list[str]]:
    """All candidates for each role; names that play none are left out.

    In the plain layout a word for contrast that the names of all modalities have belongs to the case (`P1_post_T2`);
    what is corrected for shading (`T1_bias`) is none beside the image itself.
    """
    candidates: dict[str, list[str]] = {}
    names = sorted(names)
    shared = _shared_words(names) & CONTRAST_WORDS if layout == "plain" else set()
    for name in names:
        if role := _plain_role([w for w in name_words(name) if w not in shared]) if shared else role_of(name, layout):
            candidates.setdefault(role, []).append(name)
    for role, rivals in candidates.items():
        candidates[role] = [name for name in rivals if "bias" not in name_words(name)] or rivals
    return candidates


def _shared_words(names: Iterable[str]) -> set[str]:
    """Words that the plain names of all modalities have, where there are several."""
    words = [set(name_words(name)) for name in names if is_nifti(name) and role_of(name, "plain") in MODALITIES]
    return set.intersection(*words) if len(words) > 1 else set()


def recognise(names: Iterable[str]) -> str:
    """The layout in which most modalities have a name.

    On a tie the stricter convention wins: every BraTS name can also be read as a plain one, and the palette hangs on
    the difference.
    """
    names = list(names)
    return max(LAYOUTS, key=lambda layout: sum(key in MODALITIES for key in by_role(names, layout)))


def _plain_role(words: list[str]) -> str | None:
    roles = {role for role, known in _PLAIN_WORDS.items() if known.intersection(words)}
    if "t1n" in roles and _names_contrast(words):
        roles = roles - {"t1n"} | {"t1c"}
    if roles == {"t2w", "flair"}:
        roles = {"flair"}
    if _MASK_WORDS.intersection(words):
        return None if roles or "brain" in words else "unknown"
    return roles.pop() if len(roles) == 1 and not _OTHER_IMAGES.intersection(words) else None


def _names_contrast(words: list[str]) -> bool | None:
    """Whether a T1's name says that contrast was given.

    A word for contrast counts behind T1 and right before it, unless a word such as `no` or `pre` denies it. Farther in
    front it may belong to the name of the case, and so may `c` everywhere but right behind T1 (`pat-c_01_T1`): None.
    """
    t1 = [place for place, word in enumerate(words) if word in _PLAIN_WORDS["t1n"]]
    given = [
        place
        for place, (before, word) in enumerate(pairwise(["", *words]))
        if word in CONTRAST_WORDS or (word == "c" and place - 1 in t1)
        if before not in NO_CONTRAST_WORDS | {"no"}
    ]
    if any(place > t1[0] or place + 1 in t1 for place in given):
        return True
    return None if given else False


def without_contrast(text: str) -> str:
    """Write out what a minus denies, in lower case: `t1_km-` is `t1_no_km`."""
    return _DENIED.sub(r"no_\1", text)


def name_words(name: str) -> list[str]:
    """Words of a file's name in lower case; what BIDS says of the session stays out of them."""
    text = stem(name)
    if text.startswith("sub-"):
        text = _BIDS_AGENT.sub(r"\2\1", _BIDS_OF_CASE.sub("", text))  # the agent next to the suffix, wherever it stood
    return re.split(r"[_\-. ]+", without_contrast(text))


def numbers_of(name: str) -> tuple[str, ...]:
    """Words with a digit that name neither a modality nor a sequence, such as that of a patient."""
    words = [word for word in name_words(name) if re.search(r"\d", word) and word not in ("2d", "3d")]
    return tuple(word for word in words if not _plain_role([word]))


def doubtful_names(names: Iterable[str], layout: str, missing: Sequence[str]) -> list[str]:
    """Files that may be what seems to be missing: images whose names say nothing, and what a lost image has left.

    Names of masks are known, and so are the series that `comnet prepare` keeps beside what it has made of them. Where
    a T1 is missing, so is one whose word for contrast may be of the case: all names have it, or it stands far from T1.
    """
    words = {name: name_words(name) for name in names}
    prepared = "preparation.json" in words
    images = [name for name in words if is_nifti(name) and role_of(name, layout) in MODALITIES]
    shared = _shared_words(images)
    of_case = [
        name
        for name in images
        if layout == "plain" and {"t1n", "t1c"} & set(missing) and _PLAIN_WORDS["t1n"] & set(words[name])
        if _names_contrast(words[name]) is None or CONTRAST_WORDS & shared
    ]
    return of_case + [
        name
        for name, said in words.items()
        if not name.startswith(".")
        and not _MASK_WORDS.intersection(said)
        and not (prepared and said[0] == "series")
        and (role_of(name, layout) is None if is_nifti(name) else _plain_role(said) in missing)
    ]
