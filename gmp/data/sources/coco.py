"""COCO's captions: `{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": "…"}]}`.

https://cocodataset.org/#format-data, "5. Image Captioning".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..captions import Picture, _some
from .found import Listing
from .opened import Opened

_SHAPE = 'Expected {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": "…"}]}.'


def looks(opened: Opened) -> bool:
    if opened.form != "json" or not isinstance(opened.content, tuple):
        return False
    values = dict(opened.content)
    return isinstance(values.get("images"), list) and all(isinstance(one, tuple) for one in values["images"][:3])


def read(opened: Opened, problems: list[str]) -> Listing:
    values = dict(opened.content)
    images, annotations = values["images"], values.get("annotations")
    names: dict[Any, str] = {}
    captions: dict[Any, list[str]] = {}
    strange = 0
    for image in images:
        one = dict(image) if isinstance(image, tuple) else {}
        key, name = one.get("id"), one.get("file_name")
        if isinstance(name, str) and isinstance(key, (int, str)) and key not in names:
            names[key] = name
            captions[key] = []
        else:
            strange += 1
    if strange:
        problems.append(
            f"In {opened.place}, {strange} of {len(images)} images have no id of their own or no file_name. {_SHAPE}"
        )
    if not isinstance(annotations, list) or not annotations:
        problems.append(f"{opened.place} has images and no annotations. {_SHAPE}")
        return Listing(())
    unknown, wordless = [], 0
    for annotation in annotations:
        one = dict(annotation) if isinstance(annotation, tuple) else {}
        key, caption = one.get("image_id"), one.get("caption")
        if not isinstance(caption, str):
            wordless += 1
        elif isinstance(key, (int, str)) and key in captions:
            captions[key].append(caption)
        else:
            unknown.append(str(key))
    if wordless == len(annotations):
        problems.append(
            f"{opened.place} is a COCO file without captions, of boxes or key points: take captions_train2017.json in "
            "place of instances_train2017.json."
        )
    elif wordless:
        problems.append(f"In {opened.place}, {wordless} of {len(annotations)} annotations have no caption. {_SHAPE}")
    if unknown and not strange:
        problems.append(
            f"In {opened.place}, {len(unknown)} captions are of images that it does not list{_some(unknown)}. {_SHAPE}"
        )
    return Listing([(names[key], captions[key]) for key in names])


def write(pictures: Sequence[Picture]) -> dict[str, Any]:
    """The value of the JSON file; sizes of pictures are not in it, since none is opened."""
    annotations: list[dict[str, Any]] = []
    for number, picture in enumerate(pictures, 1):
        for caption in picture.captions:
            annotations.append({"id": len(annotations) + 1, "image_id": number, "caption": caption})
    images = [{"id": number, "file_name": picture.path} for number, picture in enumerate(pictures, 1)]
    return {"info": {"description": "captions"}, "images": images, "annotations": annotations}
