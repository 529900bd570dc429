"""All that the pack needs of ComfyUI: files, CLIP objects, memory, progress, interrupts.

No other file imports `comfy`, `folder_paths` or `nodes`, so that a change in the host is met in one place.
Unless said otherwise, call these on the prompt thread only.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import comfy.clip_model
import comfy.lora
import comfy.model_management as mm
import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.utils
import folder_paths
import torch
from comfy.cli_args import args
from torch import Tensor

from ..gmp.clip import TextConfig, text_config_from
from ..gmp.data.captions import PICTURE_SUFFIXES
from ..gmp.errors import InputError
from ..gmp.features import state_key
from ..gmp.files.folder import CONFIGS, has_config
from ..gmp.layouts import Source, TowerFile, huggingface, projection_fault
from ..gmp.layouts.canonical import LENT, assemble, expected, take_apart
from ..gmp.tokenizer import END_ID, START_ID, Tokens, has_special, plain

MEMBERS = ("clip_l", "clip_g", "clip_h")
NOTHING = "(none found)"  # the one choice of a menu without files
# Whose kinds of model a menu lists: the names of the first kind as they are, those of the others below its name.
MENUS = {
    "text": ("text_encoders", "checkpoints", "diffusers", "gmp"),
    "vision": ("clip_vision", "text_encoders", "checkpoints", "diffusers", "gmp"),
    "checkpoint": ("checkpoints",),
    "any": (
        "text_encoders",
        "checkpoints",
        "clip_vision",
        "loras",
        "diffusion_models",
        "upscale_models",
        "vae",
        "diffusers",
        "gmp",
    ),
}
# The folders of the output folder in which ComfyUI looks for a kind of model too.
SAVED = {
    "text_encoders": "clip",
    "loras": "loras",
    "checkpoints": "checkpoints",
    "diffusers": "diffusers",
    "gmp": "gmp",
}


# ---- files ---------------------------------------------------------------------------------------------------------


def add_model_folders() -> None:
    """Makes ComfyUI know the folders below models/ and output/ that Save Text Encoder writes and no loader lists yet.

    GmP files have a folder of their own: ComfyUI's loaders do not know r and theta and end in an error.
    """
    output = folder_paths.get_output_directory()
    folder_paths.add_model_folder_path("gmp", os.path.join(folder_paths.models_dir, "gmp"))
    folder_paths.add_model_folder_path("gmp", os.path.join(output, "gmp"))
    folder_paths.folder_names_and_paths["gmp"][1].update(folder_paths.supported_pt_extensions)
    folder_paths.add_model_folder_path("diffusers", os.path.join(output, "diffusers"))


def menu(role: str) -> list[str]:
    """Names for the menu of a role in `MENUS`."""
    return list(_menu(role)) or [NOTHING]


def _menu(role: str) -> dict[str, tuple[str, str]]:
    """Name in the menu -> kind of model, and name among these."""
    first, *others = MENUS[role]
    found = {name: (first, name) for name in _names(first)}
    for kind in others:
        for name in _names(kind):
            found.setdefault(f"{kind}/{name}", (kind, name))
    return found


def _names(kind: str) -> list[str]:
    if kind == "diffusers":
        return sorted(_model_folders())
    try:
        return folder_paths.get_filename_list(kind)
    except FileNotFoundError:  # one of its folders was deleted while ComfyUI runs, which its cache does not expect
        return []


def _model_folders() -> dict[str, Path]:
    """The folders with a model in models/diffusers and output/diffusers; the parts of a pipeline count as one."""
    found: dict[str, Path] = {}
    for root in map(Path, folder_paths.get_folder_paths("diffusers")):
        for folder, below, files in os.walk(root, followlinks=True):
            below[:] = [name for name in below if not name.startswith(".")]  # caches of downloads
            if Path(folder) != root and _is_model(files):
                found.setdefault(Path(folder).relative_to(root).as_posix(), Path(folder))
                below.clear()
    return found


def _is_model(files: list[str]) -> bool:
    """Whether these are the files of a model's folder."""
    indices = any(name == "model_index.json" or name.endswith(".index.json") for name in files)
    return indices or any(map(has_config, files))


def model_path(role: str, name: str) -> Path:
    """The file or folder of a name in a menu. Raises InputError for any other name."""
    folders = ", ".join(f"models/{kind}" for kind in MENUS[role])
    if name == NOTHING:
        raise InputError(f"There is no model in {folders}; put one there and press R in the page.")
    kind, rest = _menu(role).get(name, ("", ""))
    path = _model_folders().get(rest) if kind == "diffusers" else folder_paths.get_full_path(kind, rest)
    if path is None:
        raise InputError(f"{name} is not in {folders}; put it there or choose another.")
    return Path(path)


def stamp(path: Path) -> str:
    """Changes with the file and the config that is read with it, or with any file in the folder."""
    if path.is_dir():
        files = sorted(one for one in path.rglob("*") if one.is_file())
    else:
        configs = map(path.with_name, CONFIGS if has_config(path.name) else ())
        files = [path, *(one for one in configs if one.is_file())]
    states = [(one, one.stat()) for one in files]
    return "\n".join(f"{one} {state.st_size} {state.st_mtime_ns}" for one, state in states)


def input_folders() -> list[str]:
    return folder_paths.get_input_subfolders() or [NOTHING]


def input_files(*suffixes: str) -> list[str]:
    """Files below the input folder with one of these endings, as paths relative to it.

    One that is called like a picture beside it is that picture's alone: a data set may have thousands.
    """
    root = folder_paths.get_input_directory()
    found = []
    for folder, _, names in os.walk(root):
        pictures = {os.path.splitext(name)[0] for name in names if name.lower().endswith(PICTURE_SUFFIXES)}
        files = [name for name in names if name.lower().endswith(suffixes)]
        found += [os.path.join(folder, name) for name in files if os.path.splitext(name)[0] not in pictures]
    return sorted(Path(path).relative_to(root).as_posix() for path in found)


def input_path(name: str) -> Path:
    """A path below the input folder. Raises InputError for one outside of it."""
    root = Path(os.path.abspath(folder_paths.get_input_directory()))
    path = Path(os.path.abspath(root / name))  # a folder that is linked into the input folder is in it
    if not path.is_relative_to(root):
        raise InputError(f"{name} lies outside of ComfyUI's input folder; choose a folder in it.")
    return path


def runs_folder() -> Path:
    return Path(folder_paths.get_output_directory()) / "gmp_runs"


def reports_folder() -> Path:
    """Reports of data sets."""
    return Path(folder_paths.get_output_directory()) / "gmp_datasets"


def cache_folder() -> Path:
    """What can be computed again: picture features, hashes, the demo's pictures. Not reachable over HTTP."""
    return Path(folder_paths.get_system_user_directory("gmp"))


def save_path(kind: str, prefix: str, place: str, suffix: str = ".safetensors") -> tuple[Path, str, str]:
    """A fresh path for a model, its folder made; what to call it; and its name in the menus of its kind.

    place: "output" or "models". prefix: folder and beginning of the name below the folder of the kind; the name of such
    a folder at its beginning stands for that folder. Raises InputError for one that leads out of it, or names nothing.
    """
    plain = prefix.replace("\\", "/")
    first, slash, rest = plain.partition("/")
    inside = Path(os.path.normpath(rest if slash and first in {*SAVED, *SAVED.values()} else plain))
    if not inside.name or inside.is_absolute() or inside.drive or ".." in inside.parts:
        raise InputError(f"filename_prefix {prefix!r} names no file below {place}; give one such as clip/repaired.")
    output = os.path.abspath(folder_paths.get_output_directory())
    if place == "output":
        root = os.path.join(output, SAVED[kind])
    else:
        folders = [os.path.abspath(folder) for folder in folder_paths.get_folder_paths(kind)]
        root = next((folder for folder in folders if not Path(folder).is_relative_to(output)), folders[0])
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(str(inside), root)
    while (path := Path(folder) / f"{name}_{counter:05}_{suffix}").exists():
        counter += 1
    listed = (Path(subfolder) / path.name).as_posix()
    return path, f"{place}/{Path(root).name}/{listed}", listed


def without_folders(text: str) -> str:
    """A message for everyone: the host's folders are taken out of the paths in it."""
    if os.sep not in text and "/" not in text:
        return text
    roots = {folder_paths.base_path, folder_paths.get_output_directory(), folder_paths.get_input_directory()}
    roots |= {folder_paths.get_temp_directory(), folder_paths.get_user_directory(), str(Path(__file__).parents[1])}
    roots |= {folder for folders, _ in folder_paths.folder_names_and_paths.values() for folder in folders}
    for root in _longest_first(frozenset(roots)):
        text = text.replace(root, "")
    return text


@functools.lru_cache(maxsize=4)
def _longest_first(roots: frozenset[str]) -> list[str]:
    """Folders, what they link to, and the home folder, each with the separator behind it."""
    every = roots | {str(Path(root).resolve()) for root in roots} | {str(Path.home())}
    return [root.rstrip("/\\") + os.sep for root in sorted(every, key=len, reverse=True)]


def workflow_metadata(prompt: object, extra: dict[str, object] | None) -> dict[str, str]:
    """The graph as file metadata, as ComfyUI's own savers write it; empty with --disable-metadata."""
    if args.disable_metadata:
        return {}
    entries = {"prompt": prompt} if prompt is not None else {}
    return {name: json.dumps(value) for name, value in (entries | (extra or {})).items()}


# ---- CLIP objects --------------------------------------------------------------------------------------------------


def comfy_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Canonical tensors under the names, and in the orientation, of ComfyUI's CLIPTextModel."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        tensors |= take_apart(huggingface.piece(name), tensor)
    return tensors


def member_of(clip: comfy.sd.CLIP, member: str) -> str:
    """Checks which CLIP text encoder of a CLIP object is meant; "auto" takes the only one, or clip_l.

    Raises InputError naming what there is: a T5 alone can't be repaired.
    """
    children = dict(clip.cond_stage_model.named_children())
    found = [name for name in MEMBERS if hasattr(getattr(children.get(name), "transformer", None), "text_model")]
    if not found:
        held = ", ".join(children) or type(clip.cond_stage_model).__name__
        raise InputError(f"This CLIP holds no CLIP text encoder, only {held}; connect one with clip_l or clip_g.")
    if member == "auto":
        return found[0]
    if member not in found:
        raise InputError(f"This CLIP has no {member}; it holds {', '.join(children)}. Choose {' or '.join(found)}.")
    return member


def _weights(clip: comfy.sd.CLIP, member: str, patched: bool) -> dict[str, Tensor]:
    """fp32 CPU copies of a member's tensors, by their names below `member.transformer.`.

    Right whether or not the model is loaded or patched now: `get_key_patches` gives the backup of patched weights.
    `patched` adds what upstream nodes (LoRAs) patch.
    """
    prefix = f"{member}.transformer."
    tensors = {}
    for key, (first, *patches) in clip.get_key_patches().items():
        if not key.startswith(prefix):
            continue
        weight, convert = first
        weight = convert(mm.cast_to_device(weight, torch.device("cpu"), torch.float32, copy=True), inplace=True)
        if patched and patches:
            weight = comfy.lora.calculate_weight(patches, weight, key)
        tensors[key.removeprefix(prefix)] = weight.clone() if weight.is_inference() else weight
    return tensors


def read_clip(clip: comfy.sd.CLIP, member: str) -> TowerFile:
    """A member's effective weights, LoRAs included, in canonical form; without a projection that is no trained one."""
    tensors = _weights(clip, member, patched=True)
    layers = clip.cond_stage_model.get_submodule(f"{member}.transformer.text_model.encoder.layers")
    left_out = _not_taken(member)
    state = {}
    for name in expected("text", range(len(layers))):
        if name not in left_out:
            piece = huggingface.piece(name)
            state[name] = assemble(name, piece, tensors)
    notes = []
    if "text_projection" in state and (fault := projection_fault(state["text_projection"])):
        del state["text_projection"]
        left_out = LENT
        notes.append(f"its text_projection {fault} and is not used")
    broken = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if broken:
        raise InputError(f"The CLIP's {member} holds NaN or infinity in {len(broken)} tensors ({broken[0]}, …).")
    activations = {id(function): name for name, function in comfy.clip_model.ACTIVATIONS.items()}
    config = text_config_from(
        state, heads=layers[0].self_attn.heads, activation=activations[id(layers[0].mlp.activation)]
    )
    patches = sum(key.startswith(f"{member}.") for key in clip.patcher.patches)
    notes += [f"{patches} patched tensors (LoRAs) are baked in"] if patches else []
    source = Source(f"the CLIP's {member}", state_key(state), "comfyui", member, {}, (), left_out, (), tuple(notes))
    return TowerFile(state, config, source)


def _not_taken(member: str) -> tuple[str, ...]:
    """What is not taken from a member of a CLIP object, nor patched in it: the logit scale, which ComfyUI lacks.

    The projections of clip_l and clip_h too: the diffusion models that files of them are made for do not read them, and
    most files lack them, which leaves zeros or uninitialised memory in their place.
    """
    return ("logit_scale",) if member == "clip_g" else LENT


def patch_clip(clip: comfy.sd.CLIP, member: str, encoder: TowerFile, strength: float) -> comfy.sd.CLIP:
    """A clone of a CLIP whose member gives way to `encoder`, blended by `strength`.

    The patch is the difference to the bare weights that the host holds, so that LoRAs before and after still count.
    Raises InputError when the two have different shapes.
    """
    base = _weights(clip, member, patched=False)
    skipped = _not_taken(member)
    fresh = comfy_tensors({name: tensor for name, tensor in encoder.state.items() if name not in skipped})
    _check_shapes(base, encoder.config, member, encoder.source.path)
    patches = {
        f"{member}.transformer.{name}": ("diff", (difference,))
        for name, tensor in fresh.items()
        if (difference := tensor - base[name]).any()
    }
    patched = clip.clone()
    refused = set(patches) - set(patched.add_patches(patches, strength))
    if refused:
        raise InputError(f"ComfyUI refused {len(refused)} of {len(patches)} patches, {sorted(refused)[0]} among them.")
    return patched


def _check_shapes(base: dict[str, Tensor], config: TextConfig, member: str, name: str) -> None:
    vocabulary, width = base["text_model.embeddings.token_embedding.weight"].shape
    layers = {key.split(".")[3] for key in base if key.startswith("text_model.encoder.layers.")}
    there = {
        "layers": (config.layers, len(layers)),
        "width": (config.width, width),
        "vocabulary": (config.vocab_size, vocabulary),
        "positions": (config.context_length, len(base["text_model.embeddings.position_embedding.weight"])),
        "MLP width": (config.mlp_width, len(base["text_model.encoder.layers.0.mlp.fc1.bias"])),
    }
    wrong = [f"{what} {mine} against {theirs}" for what, (mine, theirs) in there.items() if mine != theirs]
    if wrong:
        raise InputError(
            f"{name} does not fit the CLIP's {member}: {', '.join(wrong)}. "
            "Connect the CLIP that this encoder belongs to."
        )


def build_clip(state: dict[str, Tensor], config: TextConfig) -> comfy.sd.CLIP:
    """ComfyUI's CLIP object, as for SD1, from a canonical text tower of any size, in fp32."""
    shape = {
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "hidden_act": config.activation,
    }
    tensors = {name: tensor for name, tensor in comfy_tensors(state).items() if name != "logit_scale"}
    return comfy.sd.load_text_encoder_state_dicts(
        [tensors],
        clip_type=comfy.sd.CLIPType.STABLE_DIFFUSION,
        model_options={"model_config": shape, "dtype": torch.float32},
    )


def tokenizer(member: str | None, context_length: int) -> Callable[[Sequence[str]], Tokens]:
    """Captions -> tokens with the tokenizer that ComfyUI reads prompts with. The function may run in any thread."""
    kind = comfy.sd1_clip.SDTokenizer if member in (None, "clip_l") else comfy.sdxl_clip.SDXLClipGTokenizer
    tokenizer = kind()
    room = context_length - 2

    def tokenize(captions: Sequence[str]) -> Tokens:
        ids = torch.full((len(captions), context_length), tokenizer.pad_token, dtype=torch.int64)
        rows = tokenizer.tokenizer([plain(c) for c in captions], verbose=False)["input_ids"] if captions else []
        truncated = 0
        for target, row in zip(ids, rows, strict=True):
            words = row[1:-1]
            truncated += len(words) > room
            words = [START_ID, *words[:room], END_ID]
            target[: len(words)] = torch.tensor(words)
        return Tokens(ids, truncated, sum(map(has_special, captions)))

    return tokenize


# ---- device, progress, interrupt -----------------------------------------------------------------------------------


def device() -> torch.device:
    return mm.get_torch_device()


def make_room(needed: int) -> None:
    """Asks ComfyUI to move models off the device until so many bytes are free; on the prompt thread only."""
    target = mm.get_torch_device()
    if target.type != "cpu":
        mm.free_memory(needed, target)
        mm.soft_empty_cache()


def has_room(needed: int) -> bool:
    """Whether so many bytes are free on the device; in any thread."""
    target = mm.get_torch_device()
    return target.type == "cpu" or mm.get_free_memory(target) >= needed


def raise_if_interrupted() -> None:
    mm.throw_exception_if_processing_interrupted()


class Progress:
    """ComfyUI's progress bar of the node that runs now."""

    def __init__(self) -> None:
        self._total = 0

    def show(self, done: int, total: int) -> None:
        """Raises ComfyUI's interrupt where the user has cancelled."""
        if total != self._total:  # a bar of ComfyUI's never goes back
            self._total, self._bar = total, comfy.utils.ProgressBar(max(1, total))
        self._bar.update_absolute(done)

    def hear(self, event: dict[str, object]) -> None:
        """Shows an event of the engine that tells progress. Raises ComfyUI's interrupt where the user has cancelled."""
        if event["type"] == "progress":
            self.show(event["done"], event["total"])
        raise_if_interrupted()
