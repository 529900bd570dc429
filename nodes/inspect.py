"""What is this file? For any file of the model folders."""

from __future__ import annotations

from comfy_api.latest import io

from . import files, host, routes
from .sockets import CATEGORY


class InspectFile(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GmPInspectFile",
            display_name="Inspect File (GmP)",
            category=CATEGORY,
            description="Tells what a model file is: which towers it holds, in which layout and precision, what it "
            "lacks, what it is good for, and what is wrong with it. Only the file's header is read.",
            search_aliases=["what is this file", "model info", "safetensors header", "identify model", "gmp"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "file",
                    options=host.menu("any"),
                    tooltip="A file of the model folders. Those of models/text_encoders stand as they are, others "
                    "below the name of their folder.",
                ),
            ],
            outputs=[io.String.Output(display_name="text", tooltip="What the node shows.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, **_) -> str:
        return host.stamp(host.model_path("any", file))

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        lines = files.look("any", file)["lines"]
        shown = "\n· ".join(line.strip() for line in lines)  # one canvas shows no line breaks
        return routes.with_text(cls, shown, "\n".join(lines))
