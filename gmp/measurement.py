"""What a measurement document says, in lines for people."""

from __future__ import annotations

from collections.abc import Mapping

from .measure import DIRECTIONS, SUMMARY

READERS = {"penultimate": "SDXL, SD2, SD3", "last": "SD1", "pooled": "Flux", "projected": "clip_g's vector"}


def lines(found: Mapping[str, object]) -> list[str]:
    """What a measurement says, a line for each row of a table; also readable with single spaces between words."""
    rows = [f"{found['encoder']['path']} on {_measured_on(found)}; 95 % intervals"]
    if "retrieval" in found:
        rows += _retrieval_lines(found["retrieval"])
    rows += _change_lines(found.get("change"))
    if "alignment" in found:
        rows += _alignment_lines(found["alignment"], found.get("calibration"))
    for section, what in (("structure", "prompts"), ("structure_of_captions", "captions")):
        rows += [f"{what}:"] if section in found else []
        rows += [_structure_line(point, one) for point, one in found.get(section, {}).items()]
    if "drift" in found:
        cosines = ", ".join(f"{point} {_number(one['cosine'])}" for point, one in found["drift"].items())
        rows.append(f"cosine of captions' states to the original's: {cosines}")
    rows += _zero_shot_lines(found.get("zero_shot")) + _attack_lines(found.get("typographic"))
    rows += [
        f"relations, {kind}: {_told(one['accuracy'])} of {one['captions']} captions told from false ones; chance 0.5"
        for kind, one in found.get("relations", {"kinds": {}})["kinds"].items()
        if one["accuracy"]
    ]
    for section in ("data", "zero_shot"):
        if section in found:
            rows += [f"left out: {path} ({reason})" for path, reason in found[section]["broken"].items()]
    return rows + [f"note: {sentence}" for sentence in found["warnings"]]


def _measured_on(found: Mapping[str, object]) -> str:
    parts = []
    if "data" in found:
        parts.append(f"{found['data']['images']} pictures with {found['data']['captions']} captions")
    if "zero_shot" in found:
        parts.append(f"{found['zero_shot']['pictures']} pictures of {found['zero_shot']['classes']} classes")
    return " and ".join(parts)


def _told(interval: Mapping[str, float | None], digits: int = 3, sign: str = "") -> str:
    numbers = (_number(interval[name], digits, sign) for name in ("value", "low", "high"))
    return "{} ({} … {})".format(*numbers)


def _number(value: float | None, digits: int = 3, sign: str = "") -> str:
    return "not defined" if value is None else f"{round(value, digits) + 0.0:{sign}.{digits}f}"  # no -0.000


def _retrieval_lines(section: Mapping[str, object], sign: str = "") -> list[str]:
    rows = []
    for name in SUMMARY:
        digits = 1 if name.endswith("rank") else 3
        both = [f"{d.replace('_to_', ' → ')} {_told(section[d][name], digits, sign):<26}" for d in DIRECTIONS]
        rows.append(f"{name.replace('_at_', '@').replace('_', ' '):<12} {'  '.join(both)}".rstrip())
    return rows


def _change_lines(section: Mapping[str, object] | None) -> list[str]:
    if not section:
        return []
    rows = [f"change from {section['from']['path']}:"]
    if "text_to_image" in section:
        rows += _retrieval_lines(section, "+")
    if "zero_shot" in section:
        rows.append(f"zero-shot top-1 {_told(section['zero_shot']['top_1'], sign='+')}")
    return rows


def _alignment_lines(one: Mapping[str, float | None], calibrated: Mapping[str, object] | None) -> list[str]:
    rows = [
        f"modality gap {_number(one['modality_gap'])}, cosine of matched pairs {_number(one['matched_cosine'])}, "
        f"uniformity of pictures {_number(one['uniformity_images'], 2)}, of captions "
        f"{_number(one['uniformity_texts'], 2)}"
    ]
    if calibrated:
        errors = ", ".join(f"{d.replace('_to_', ' → ')} {_number(calibrated[d]['error'])}" for d in DIRECTIONS)
        rows.append(
            f"calibration error among {calibrated['candidates']}: {errors} at scale {_number(calibrated['scale'], 1)}; "
            f"best scale {_number(calibrated['best_scale'], 1)}"
        )
    return rows


def _structure_line(point: str, one: Mapping[str, float | None]) -> str:
    agreement = {"CKA": one["cka"], "rank correlation": one["rank_correlation"]}
    told = [f"{name} {_number(value)}" for name, value in agreement.items() if value is not None]
    told += [f"mean cosine {_number(one['mean_cosine'])}", f"told apart {_number(one['told_apart'])}"]
    rank = f"effective rank {_number(one['effective_rank'], 1)}"
    return f"{point + ' (' + READERS[point] + ')':<30} " + ", ".join([*told, rank])


def _zero_shot_lines(one: Mapping[str, object] | None) -> list[str]:
    if not one:
        return []
    bare = [group["name"] for group in one["per_class"] if not group["pictures"]]
    without = [f"zero-shot: no readable picture of {', '.join(bare)}: mean of classes is that of the others"]
    return [
        f"zero-shot: top-1 {_told(one['top_1'])}, mean of classes {_told(one['mean_per_class'])} on {one['pictures']} "
        f"pictures of {one['classes']} classes; chance {one['chance']:.3f}",
        *(without if bare else []),
    ]


def _attack_lines(one: Mapping[str, object] | None) -> list[str]:
    if not one:
        return []
    return [
        f"written words: accuracy {_told(one['clean_accuracy'])} without a word on the picture, "
        f"{_told(one['attacked_accuracy'])} with one, on {one['pictures']} pictures; chance 0.5"
    ]
