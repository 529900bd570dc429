"""What a person sees in the graph: forms over the engine in `gmp/`."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import host, routes
from .compare import CompareCLIPs, InspectGmP
from .dataset import CaptionDataset, DatasetFromLists, MixDatasets, TarFileDataset
from .dataset_report import DatasetReport
from .demo import DemoWorld
from .diagnose import Diagnose
from .inspect import InspectFile
from .join import ReassembleCLIP
from .load import LoadTextEncoder, LoadVisionTower, TextEncoderFromCLIP
from .measure import MeasureCLIP
from .repair import Repair
from .result import ApplyToCLIP, RepairedTextEncoder
from .save import SaveTextEncoder
from .strength import BlendTextEncoders, StrengthScan

NODES: list[type[io.ComfyNode]] = [
    LoadTextEncoder,
    TextEncoderFromCLIP,
    LoadVisionTower,
    ReassembleCLIP,
    CaptionDataset,
    DatasetFromLists,
    MixDatasets,
    TarFileDataset,
    DatasetReport,
    Repair,
    RepairedTextEncoder,
    ApplyToCLIP,
    SaveTextEncoder,
    InspectFile,
    CompareCLIPs,
    InspectGmP,
    MeasureCLIP,
    BlendTextEncoders,
    StrengthScan,
    DemoWorld,
    Diagnose,
]


class _Extension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


def extension() -> ComfyExtension:
    host.add_model_folders()
    routes.register()
    return _Extension()
