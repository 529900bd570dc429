"""ComfyUI's entry to the pack. Importing it does nothing: nodes and routes load when ComfyUI asks for them."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    from .nodes import extension

    return extension()
