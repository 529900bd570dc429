"""What a person sees in the graph: forms over the engine in `gmp/`."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import routes
from .dataset import CaptionDataset, DatasetFromLists
from .demo import DemoWorld
from .join import ReassembleCLIP
from .load import LoadTextEncoder, LoadVisionTower, TextEncoderFromCLIP
from .repair import Repair
from .result import ApplyToCLIP, RepairedTextEncoder, SaveTextEncoder

NODES: list[type[io.ComfyNode]] = [
    LoadTextEncoder,
    TextEncoderFromCLIP,
    LoadVisionTower,
    ReassembleCLIP,
    CaptionDataset,
    DatasetFromLists,
    Repair,
    RepairedTextEncoder,
    ApplyToCLIP,
    SaveTextEncoder,
    DemoWorld,
]


class _Extension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


def extension() -> ComfyExtension:
    routes.register()
    return _Extension()
