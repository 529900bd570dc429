"""What is not there, and says so when it is used."""


class Absent:
    def __init__(self, *arguments, **options):
        raise NotImplementedError(f"{type(self).__name__}: torchvision itself is needed; this one stands in for it")
