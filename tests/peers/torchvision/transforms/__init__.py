import enum

from ..absent import Absent


class InterpolationMode(enum.Enum):
    BICUBIC = "bicubic"
    BILINEAR = "bilinear"
    NEAREST = "nearest"


class CenterCrop(Absent):
    pass


class ColorJitter(Absent):
    pass


class Compose(Absent):
    pass


class Grayscale(Absent):
    pass


class Normalize(Absent):
    pass


class RandomResizedCrop(Absent):
    pass


class Resize(Absent):
    pass


class ToTensor(Absent):
    pass
