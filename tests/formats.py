"""For every row of the first table in docs/formats.md: files as their programs write them, and what these compute.

Models are transformers' and OpenCLIP's own, small and random; their state dicts go into the files under their own
names, so that nothing here maps one naming to another.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.clip.configuration_clip import CLIPConfig as HFConfig
from transformers.models.clip.configuration_clip import CLIPTextConfig, CLIPVisionConfig
from transformers.models.clip.modeling_clip import (
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
)

from tests.open_clip_peer import open_clip

VOCAB, CONTEXT, SIZE, EMBED = 100, 24, 32, 32  # a square text projection: no shape tells its orientation
TEXT = {"heads": 4}  # of 32 channels
VISION = {"heads": 3}  # of 48
QUICK, EXACT = {"activation": "quick_gelu"}, {"activation": "gelu"}
INVERSION, END = 97, 60  # a textual inversion, and the end-of-text of a vocabulary that goes on behind it
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A file or folder, how to open it, what to encode, and what the library computes from the model in it.

    text, vision: arguments for `read_text` and `read_vision`: heads where small widths do not tell them.
    """

    path: Path
    expected: dict[str, Tensor]
    ids: Tensor | None
    pixels: Tensor | None
    text: dict[str, object] = field(default_factory=dict)
    vision: dict[str, object] = field(default_factory=dict)


ROWS: dict[str, Callable[[Path], Iterator[Case]]] = {}


def row(build: Callable[[Path], Iterator[Case]]) -> Callable[[Path], Iterator[Case]]:
    ROWS[build.__name__] = build
    return build


# ---- models ---------------------------------------------------------------------------------------------------------


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights of which each one matters, biases and gains too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "logit_scale" not in name:
                gain = name.endswith("weight") and ("norm" in name or "ln_" in name)
                size = 0.3 * min(1.0, (32 / tensor.shape[-1]) ** 0.5)
                tensor.normal_(1.0 if gain else 0.0, size, generator=generator)
    return model.eval()


def text_config(**changes) -> CLIPTextConfig:
    return CLIPTextConfig(**{
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 3,
        "num_attention_heads": 4, "max_position_embeddings": CONTEXT, "projection_dim": EMBED,
        "hidden_act": "quick_gelu", "bos_token_id": VOCAB - 2, "eos_token_id": VOCAB - 1, **changes,
    })  # fmt: skip


def vision_config(**changes) -> CLIPVisionConfig:
    return CLIPVisionConfig(**{
        "hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 3,
        "image_size": SIZE, "patch_size": 8, "projection_dim": EMBED, "hidden_act": "quick_gelu", **changes,
    })  # fmt: skip


def hf_clip(text: dict | None = None, vision: dict | None = None, embed: int = EMBED) -> CLIPModel:
    with torch.random.fork_rng():
        return lively(CLIPModel(HFConfig(
            text_config=text_config(projection_dim=embed, **(text or {})).to_dict(),
            vision_config=vision_config(projection_dim=embed, **(vision or {})).to_dict(), projection_dim=embed,
        )))  # fmt: skip


def hf_text(kind: type[PreTrainedModel], seed: int = 0, **changes) -> PreTrainedModel:
    with torch.random.fork_rng():
        return lively(kind(text_config(**changes)), seed)


def oc_clip(quick: bool, seed: int = 0, embed: int = EMBED, text: dict | None = None, vision: dict | None = None):
    """OpenCLIP's model. With quick_gelu it is OpenAI's: the same names and arithmetic."""
    text = {
        "context_length": CONTEXT, "vocab_size": VOCAB, "width": 32, "heads": 4, "layers": 3, "mlp_ratio": 2.25,
    } | (text or {})  # fmt: skip
    vision = {
        "image_size": SIZE, "patch_size": 8, "width": 48, "head_width": 16, "layers": 2, "mlp_ratio": 2.0,
    } | (vision or {})  # fmt: skip
    with torch.random.fork_rng():
        return lively(open_clip().CLIP(embed, vision, text, quick_gelu=quick), seed)


def cast(model: nn.Module, dtype: torch.dtype) -> tuple[dict[str, Tensor], nn.Module]:
    """The state dict in a dtype, and a model in fp32 on the same numbers."""
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    return state, loaded(model, state)


def loaded(model: nn.Module, state: State) -> nn.Module:
    """A copy of a model with other weights, in fp32."""
    model = copy.deepcopy(model)
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return model


def openai_mix(model: nn.Module) -> tuple[dict[str, Tensor], nn.Module]:
    """OpenAI's: fp16 where matrices are multiplied, fp32 for embeddings and LayerNorms."""
    half = copy.deepcopy(model)
    open_clip().convert_weights_to_fp16(half)
    state = half.state_dict()
    assert {tensor.dtype for tensor in state.values()} == {torch.float16, torch.float32}
    return state, loaded(model, state)


# ---- what the libraries compute -------------------------------------------------------------------------------------


def captions(vocab: int = VOCAB, length: int = CONTEXT, end: int | None = None) -> Tensor:
    """Three captions: words, end-of-text, and words as padding, on which nothing before them may depend."""
    end = vocab - 1 if end is None else end
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, end, (3, length), generator=generator)
    ids[0, length - 1] = ids[1, length // 2] = ids[2, 2] = end
    return ids


def pictures(size: int = SIZE) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def points(model: nn.Module, ids: Tensor | None, pixels: Tensor | None) -> dict[str, Tensor]:
    """Every read point that a model has, by our names."""
    compute = _of_transformers if isinstance(model, PreTrainedModel) else _of_open_clip
    return compute(model, ids, pixels)


def _of_transformers(model: PreTrainedModel, ids: Tensor | None, pixels: Tensor | None) -> dict[str, Tensor]:
    result = {}
    if ids is not None:
        text = getattr(model, "text_model", model)(input_ids=ids, output_hidden_states=True)
        result["penultimate"] = text.hidden_states[-2]
        result["last"] = text.last_hidden_state
        result["pooled"] = text.pooler_output
        if hasattr(model, "text_projection"):
            result["projected"] = model.text_projection(text.pooler_output)
    if pixels is not None:
        result["image"] = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
    if ids is not None and pixels is not None:
        result["logits"] = model(input_ids=ids, pixel_values=pixels).logits_per_image
    return result


def _of_open_clip(model: nn.Module, ids: Tensor | None, pixels: Tensor | None) -> dict[str, Tensor]:
    result = {}
    if ids is not None:
        hidden = model.forward_intermediates(text=ids, normalize=False)["text_intermediates"]
        result["penultimate"] = hidden[-2]
        result["last"] = model.ln_final(hidden[-1])
        pool = sys.modules["open_clip.transformer"].text_global_pool
        result["pooled"] = pool(result["last"], ids, model.text_pool_type, model.text_eos_id)
        result["projected"] = model.encode_text(ids)
    if pixels is not None:
        result["image"] = model.encode_image(pixels)
    if ids is not None and pixels is not None:
        result["logits"] = model.get_logits(pixels, ids)[0]
    return result


def of_clip(path: Path, model: nn.Module, text: dict | None = None, vision: dict | None = None) -> Case:
    """Both towers of a file that does not say its heads; `text` and `vision` are {} where it does."""
    ids, pixels = captions(), pictures()
    return Case(path, points(model, ids, pixels), ids, pixels, TEXT if text is None else text,
                VISION if vision is None else vision)  # fmt: skip


def of_text(path: Path, model: nn.Module, **options) -> Case:
    ids = captions()
    return Case(path, points(model, ids, None), ids, None, options)


def of_vision(path: Path, model: nn.Module, **options) -> Case:
    pixels = pictures()
    return Case(path, points(model, None, pixels), None, pixels, vision=options)


def without(case: Case, *names: str) -> Case:
    """The same for a file that lacks what these are computed with."""
    assert case.expected.keys() >= set(names)
    kept = {name: tensor for name, tensor in case.expected.items() if name not in names}
    return Case(case.path, kept, case.ids, case.pixels, case.text, case.vision)


# ---- what is in the files -------------------------------------------------------------------------------------------


def save(state: State, path: Path, metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, path, metadata)
    return path


def prefixed(state: State, prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def text_part(state: State) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.startswith("visual.")}


def vision_part(state: State) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name.startswith("visual.")}


def position_ids(count: int = CONTEXT) -> Tensor:
    return torch.arange(count)[None]


def openai_numbers() -> dict[str, Tensor]:
    numbers = {"input_resolution": SIZE, "context_length": CONTEXT, "vocab_size": VOCAB}
    return {name: torch.tensor(number) for name, number in numbers.items()}


def rest_of_a_checkpoint(dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """Of diffusion model and VAE a few tensors; not a number, so that one that is read is seen."""
    return {
        "model.diffusion_model.input_blocks.0.0.weight": torch.full((4, 4, 3, 3), torch.nan, dtype=dtype),
        "model.diffusion_model.out.2.bias": torch.full((4,), torch.nan, dtype=dtype),
        "first_stage_model.decoder.conv_in.weight": torch.full((4, 4), torch.nan, dtype=dtype),
        "alphas_cumprod": torch.linspace(1, 0, 5),
    }


def t5(prefix: str) -> dict[str, Tensor]:
    return {
        f"{prefix}shared.weight": torch.ones(8, 4),
        f"{prefix}encoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(4, 4),
        f"{prefix}encoder.block.0.layer.1.DenseReluDense.wi_1.weight": torch.ones(4, 4),
        f"{prefix}encoder.final_layer_norm.weight": torch.ones(4),
    }


def sd1_tensors(text: State, level: str = "text_model.") -> dict[str, Tensor]:
    """text: a CLIPTextModel's, without the level."""
    prefix = f"cond_stage_model.transformer.{level}"
    ids = {f"{prefix}embeddings.position_ids": position_ids()}
    return rest_of_a_checkpoint() | prefixed(text, prefix) | ids


def sd2_tensors(text: State) -> dict[str, Tensor]:
    """text: OpenCLIP's, as for all that ends in g and h here."""
    return rest_of_a_checkpoint() | prefixed(text, "cond_stage_model.model.")


def sdxl_tensors(small: State, big: State) -> dict[str, Tensor]:
    prefix = "conditioner.embedders.0.transformer.text_model."
    ids = {f"{prefix}embeddings.position_ids": position_ids()}
    return (
        rest_of_a_checkpoint() | prefixed(small, prefix) | ids | prefixed(big, "conditioner.embedders.1.model.")
    )  # fmt: skip


def refiner_tensors(big: State) -> dict[str, Tensor]:
    return rest_of_a_checkpoint() | prefixed(big, "conditioner.embedders.0.model.")


def sd3_tensors(small: State, big: State) -> dict[str, Tensor]:
    """Both are CLIPTextModelWithProjection's."""
    return {
        "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": torch.full((4, 4), torch.nan),
        "first_stage_model.decoder.conv_in.weight": torch.full((4, 4), torch.nan),
        **prefixed(small, "text_encoders.clip_l.transformer."),
        "text_encoders.clip_l.logit_scale": torch.tensor(4.6055),
        **prefixed(big, "text_encoders.clip_g.transformer."),
        "text_encoders.clip_g.logit_scale": torch.tensor(4.6055),
        **t5("text_encoders.t5xxl.transformer."),
    }


def lightning(state: State) -> dict[str, object]:
    """What pytorch-lightning put around SD 1's tensors; the class must be importable while it is saved."""
    callbacks = sys.modules["pytorch_lightning.callbacks.model_checkpoint"]
    monitored = {"monitor": "val/loss", "best_model_score": torch.tensor(0.1), "current_score": torch.tensor(0.2)}
    return {
        "epoch": 3, "global_step": 1000, "pytorch-lightning_version": "1.4.2", "state_dict": state,
        "callbacks": {callbacks.ModelCheckpoint: monitored}, "optimizer_states": [], "lr_schedulers": [],
    }  # fmt: skip


@contextmanager
def foreign(module: str, name: str, base: type) -> Iterator[None]:
    """While this lasts, `module` has a class `name`, a subclass of `base`; afterwards nothing can import it.

    What else is imported meanwhile stays: `mock.patch.dict` would take it out of sys.modules, as if it never had been.
    """
    made = ModuleType(module)
    setattr(made, name, type(name, (base,), {"__module__": module}))
    parents = {module.rsplit(".", n)[0]: ModuleType(module.rsplit(".", n)[0]) for n in range(1, module.count(".") + 1)}
    sys.modules |= {**parents, module: made}
    try:
        yield
    finally:
        for added in (*parents, module):
            del sys.modules[added]


def save_lightning(state: State, path: Path) -> Path:
    with foreign("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint", object):
        torch.save(lightning(state), path)
    cannot_be_imported(path)
    return path


def cannot_be_imported(path: Path) -> None:
    with pytest.raises((ModuleNotFoundError, AttributeError)):
        torch.load(path, weights_only=False)


class GeometricLinear(nn.Module):
    """A naive one; rows of theta are of any length and radii may be negative, as after training."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        length = torch.linspace(0.5, -2, len(linear.weight))[:, None]
        self.r = nn.Parameter(linear.weight.norm(dim=1, keepdim=True) * length.sign())
        self.theta = nn.Parameter(linear.weight * length)
        self.bias = nn.Parameter(linear.bias.clone())

    @property
    def weight(self) -> Tensor:
        return self.r * self.theta / self.theta.norm(dim=1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def geometric(model: nn.Module, kind: type[nn.Module] = GeometricLinear) -> nn.Module:
    model = copy.deepcopy(model)
    with torch.no_grad():
        for block in (*model.transformer.resblocks, *model.visual.transformer.resblocks):
            block.mlp.c_fc, block.mlp.c_proj = kind(block.mlp.c_fc), kind(block.mlp.c_proj)
    return model


# ---- transformers ---------------------------------------------------------------------------------------------------


@row
def clip_model(folder: Path) -> Iterator[Case]:
    model = hf_clip(vision={"hidden_act": "gelu"})
    model.save_pretrained(folder / "model")
    yield of_clip(folder / "model", model, {}, {})
    yield of_clip(folder / "model" / "model.safetensors", model, {}, {})


@row
def clip_model_in_shards(folder: Path) -> Iterator[Case]:
    model = hf_clip()
    model.save_pretrained(folder / "model", max_shard_size="40KB")
    assert len(list((folder / "model").glob("model-*.safetensors"))) > 3
    yield of_clip(folder / "model", model, {}, {})
    model.config.save_pretrained(folder / "old")
    shards: dict[str, dict[str, Tensor]] = {}
    for at, (name, tensor) in enumerate(model.state_dict().items()):
        shards.setdefault(f"pytorch_model-{1 + at % 3:05}-of-00003.bin", {})[name] = tensor
    for file, state in shards.items():
        torch.save(state, folder / "old" / file)
    index = {"metadata": {}, "weight_map": {name: file for file, state in shards.items() for name in state}}
    (folder / "old" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    yield of_clip(folder / "old", model, {}, {})


@row
def clip_model_bin(folder: Path) -> Iterator[Case]:
    model = hf_clip()
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    yield of_clip(folder, model, {}, {})
    yield of_clip(folder / "pytorch_model.bin", model, {}, {})


@row
def clip_model_without_config(folder: Path) -> Iterator[Case]:
    """A file from before transformers 4.31 by itself: with position ids."""
    model = hf_clip()
    ids = {
        "text_model.embeddings.position_ids": position_ids(),
        "vision_model.embeddings.position_ids": position_ids(17),
    }
    path = save(model.state_dict() | ids, folder / "clip.safetensors", {"format": "pt"})
    yield of_clip(path, model)


@row
def clip_text_model(folder: Path) -> Iterator[Case]:
    """transformers 5.6 and later leave out the level `text_model.`."""
    model = hf_text(CLIPTextModel, hidden_act="gelu")
    model.save_pretrained(folder)
    assert not any(name.startswith("text_model.") for name in model.state_dict())
    yield of_text(folder, model)


@row
def clip_text_model_of_transformers_4(folder: Path) -> Iterator[Case]:
    model = hf_text(CLIPTextModel, hidden_act="gelu")
    model.config.save_pretrained(folder)
    state = prefixed(model.state_dict(), "text_model.") | {"text_model.embeddings.position_ids": position_ids()}
    save(state, folder / "model.safetensors", {"format": "pt"})
    yield of_text(folder, model)


@row
def clip_text_model_with_projection(folder: Path) -> Iterator[Case]:
    model = hf_text(CLIPTextModelWithProjection, hidden_act="gelu")
    model.save_pretrained(folder)
    yield of_text(folder, model)


@row
def clip_vision_model_with_projection(folder: Path) -> Iterator[Case]:
    with torch.random.fork_rng():
        model = lively(CLIPVisionModelWithProjection(vision_config(hidden_act="gelu")))
    model.save_pretrained(folder)
    yield of_vision(folder, model)


# ---- OpenAI and its fine-tunes --------------------------------------------------------------------------------------


@row
def openai_state_dict(folder: Path) -> Iterator[Case]:
    plain = oc_clip(quick=True)
    written = {
        "fp32": (plain.state_dict(), plain),
        "mixed": openai_mix(plain),
        "fp16": cast(plain, torch.float16),
    }
    for name, (state, model) in written.items():
        yield of_clip(save(state | openai_numbers(), folder / f"{name}.safetensors"), model)


@row
def openai_pt(folder: Path) -> Iterator[Case]:
    state, model = openai_mix(oc_clip(quick=True))
    torch.save(state | openai_numbers(), folder / "ViT-L-14.pt")
    yield of_clip(folder / "ViT-L-14.pt", model)
    torch.save(state, folder / "old.pt", _use_new_zipfile_serialization=False)
    yield of_clip(folder / "old.pt", model)


@row
def openai_torchscript(folder: Path) -> Iterator[Case]:
    """OpenAI's own archive: a traced model whose sizes are buffers."""
    model = oc_clip(quick=True)
    state, rounded = openai_mix(model)
    for name, number in openai_numbers().items():
        if hasattr(model, name):
            delattr(model, name)
        model.register_buffer(name, number)
    script = torch.jit.trace_module(model, {"forward": (pictures(), captions()[:2]), "encode_text": (captions(),)})
    for name, parameter in script.named_parameters():
        parameter.data = parameter.data.to(state[name].dtype)
    torch.jit.save(script, folder / "ViT-L-14.pt")
    yield of_clip(folder / "ViT-L-14.pt", rounded)


@row
def whole_model_pickle(folder: Path) -> Iterator[Case]:
    """`torch.save(model)` of a fine-tuner whose classes are not there."""
    model = oc_clip(quick=True)
    with foreign("gmpclip.model", "CLIP", type(model)):
        other = copy.deepcopy(model)
        other.__class__ = sys.modules["gmpclip.model"].CLIP
        torch.save(other, folder / "clip_ft_5.pt")
        torch.save(other, folder / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("clip_ft_5.pt", "old.pt"):
        cannot_be_imported(folder / name)
        yield of_clip(folder / name, model)


@row
def whole_gmp_model_pickle(folder: Path) -> Iterator[Case]:
    with foreign("gmpclip.model", "GeometricLinear", GeometricLinear):
        model = geometric(oc_clip(quick=True), sys.modules["gmpclip.model"].GeometricLinear)
        torch.save(model, folder / "clip_ft_5_as-gmp.pt")
        case = of_clip(folder / "clip_ft_5_as-gmp.pt", model)
    cannot_be_imported(case.path)
    yield case


@row
def gmp_state_dict(folder: Path) -> Iterator[Case]:
    model = geometric(oc_clip(quick=True))
    torch.save(model.state_dict(), folder / "gmp.pt")
    yield of_clip(folder / "gmp.pt", model)
    yield of_clip(save(model.state_dict(), folder / "gmp.safetensors"), model)


@row
def long_clip(folder: Path) -> Iterator[Case]:
    """The reference has the table that Long-CLIP composes: 20 rows are CLIP's own, the others were trained."""
    model = oc_clip(quick=True, text={"context_length": 248})
    own = model.positional_embedding.detach().clone()
    trained = torch.randn(own.shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        model.positional_embedding[20:] = trained[20:]
    state = model.state_dict() | {"positional_embedding": own, "positional_embedding_res": trained}
    torch.save(state, folder / "longclip-L.pt")
    ids = captions(length=248)
    yield Case(folder / "longclip-L.pt", points(model, ids, None), ids, None, TEXT)


@row
def long_clip_of_transformers(folder: Path) -> Iterator[Case]:
    model = hf_clip(text={"max_position_embeddings": 248})
    model.save_pretrained(folder)
    ids = captions(length=248)
    yield Case(folder, points(model, ids, None), ids, None)


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@row
def sd1(folder: Path) -> Iterator[Case]:
    state, model = cast(hf_text(CLIPTextModel), torch.float16)
    yield of_text(save(sd1_tensors(state), folder / "sd15.safetensors"), model, **TEXT)


@row
def sd1_without_level(folder: Path) -> Iterator[Case]:
    model = hf_text(CLIPTextModel)
    yield of_text(save(sd1_tensors(model.state_dict(), ""), folder / "old.safetensors"), model, **TEXT)


@row
def sd1_ckpt(folder: Path) -> Iterator[Case]:
    """With pytorch-lightning's objects, whose classes are not there."""
    model = hf_text(CLIPTextModel)
    yield of_text(save_lightning(sd1_tensors(model.state_dict()), folder / "sd-v1-4.ckpt"), model, **TEXT)


@row
def sd2(folder: Path) -> Iterator[Case]:
    state, model = cast(oc_clip(quick=False), torch.float16)
    path = save(sd2_tensors(text_part(state)), folder / "sd21.safetensors")
    yield of_text(path, model, member="clip_h", **TEXT)


@row
def sd2_without_last_block(folder: Path) -> Iterator[Case]:
    """Exported again by programs that keep only what SD 2 reads: no projection, no logit scale either."""
    model = oc_clip(quick=False)
    state = {n: t for n, t in text_part(model.state_dict()).items() if n not in ("text_projection", "logit_scale")}
    state = {name: tensor for name, tensor in state.items() if "resblocks.2." not in name}
    del model.transformer.resblocks[2]
    path = save(sd2_tensors(state), folder / "sd21.safetensors")
    yield without(of_text(path, model, **TEXT), "projected")


@row
def sdxl(folder: Path) -> Iterator[Case]:
    small, slim = cast(hf_text(CLIPTextModel), torch.float16)
    big, broad = cast(oc_clip(quick=False, seed=1), torch.float16)
    path = save(sdxl_tensors(small, text_part(big)), folder / "sdxl.safetensors")
    yield of_text(path, slim, member="clip_l", **TEXT)
    yield of_text(path, broad, member="clip_g", **TEXT)


@row
def sdxl_refiner(folder: Path) -> Iterator[Case]:
    state, model = cast(oc_clip(quick=False), torch.float16)
    path = save(refiner_tensors(text_part(state)), folder / "refiner.safetensors")
    yield of_text(path, model, member="clip_g", **TEXT)


@row
def playground(folder: Path) -> Iterator[Case]:
    """An SDXL whose clip_g has its projection as a Linear's weight, which is the transpose."""
    model = oc_clip(quick=False)
    big = text_part(model.state_dict())
    big["text_projection.weight"] = big.pop("text_projection").T
    path = save(sdxl_tensors(hf_text(CLIPTextModel).state_dict(), big), folder / "playground.safetensors")
    yield of_text(path, model, member="clip_g", **TEXT)


@row
def sd3(folder: Path) -> Iterator[Case]:
    small, slim = cast(hf_text(CLIPTextModelWithProjection), torch.float16)
    big, broad = cast(hf_text(CLIPTextModelWithProjection, seed=1, hidden_act="gelu"), torch.float16)
    path = save(sd3_tensors(small, big), folder / "sd3_incl_clips.safetensors")
    yield of_text(path, slim, member="clip_l", **TEXT)
    yield of_text(path, broad, member="clip_g", **TEXT)


@row
def flux(folder: Path) -> Iterator[Case]:
    state, model = cast(hf_text(CLIPTextModelWithProjection), torch.float16)
    tensors = {
        "model.diffusion_model.double_blocks.0.img_attn.qkv.weight": torch.full((4, 4), torch.nan),
        "vae.decoder.conv_in.weight": torch.full((4, 4), torch.nan),
        **prefixed(state, "text_encoders.clip_l.transformer."),
        "text_encoders.clip_l.logit_scale": torch.tensor(4.6055),
        **t5("text_encoders.t5xxl.transformer."),
    }
    yield of_text(save(tensors, folder / "flux1-dev-fp8.safetensors"), model, **TEXT)


@row
def unclip(folder: Path) -> Iterator[Case]:
    """SD 2.1 unCLIP: clip_h, and the vision tower that pictures are given to."""
    state, model = cast(oc_clip(quick=False), torch.float16)
    tensors = sd2_tensors(text_part(state)) | prefixed(vision_part(state), "embedder.model.")
    case = of_clip(save(tensors, folder / "sd21-unclip-h.safetensors"), model)
    yield case


@row
def svd(folder: Path) -> Iterator[Case]:
    state, model = cast(oc_clip(quick=False), torch.float16)
    tensors = rest_of_a_checkpoint() | prefixed(vision_part(state), "conditioner.embedders.0.open_clip.model.")
    yield of_vision(save(tensors, folder / "svd.safetensors"), model, **VISION)


@row
def svd_saved_by_comfyui(folder: Path) -> Iterator[Case]:
    """By `ImageOnlyCheckpointSave`: transformers' names behind the prefix that OpenCLIP's had."""
    with torch.random.fork_rng():
        model = lively(CLIPVisionModelWithProjection(vision_config(hidden_act="gelu")))
    state, model = cast(model, torch.float16)
    for at, prefix in enumerate(("conditioner.embedders.0.open_clip.model.visual.", "embedder.model.visual.")):
        path = save(rest_of_a_checkpoint() | prefixed(state, prefix), folder / f"ComfyUI_{at}_.safetensors")
        yield of_vision(path, model, **VISION)


# ---- diffusers ------------------------------------------------------------------------------------------------------


def tokenizer():
    """Letters are tokens; what a picture's pipeline needs to be saved and to encode a prompt."""
    from transformers import CLIPTokenizer

    letters = [letter + end for end in ("", "</w>") for letter in "abcdefghijklmnopqrstuvwxyz"]
    words = [*letters, *(f"<{n}>" for n in range(VOCAB - 2 - len(letters))), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({word: n for n, word in enumerate(words)}, [], model_max_length=CONTEXT)


def diffusers_pipeline(text: CLIPTextModel, text_2: CLIPTextModelWithProjection | None = None):
    """Stable Diffusion 1 with one text encoder, XL with two, around the smallest UNet and VAE that there are."""
    diffusers = pytest.importorskip("diffusers", reason="pip install --no-deps -r requirements-peers.txt")
    widths = [model.config.hidden_size for model in (text, text_2) if model is not None]
    extra = {}
    if text_2 is not None:
        joined = text_2.config.projection_dim + 6 * 8
        extra = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8,
                 "projection_class_embeddings_input_dim": joined}  # fmt: skip
    with torch.random.fork_rng():
        unet = diffusers.UNet2DConditionModel(
            block_out_channels=(8,), layers_per_block=1, sample_size=8, norm_num_groups=4, attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
            cross_attention_dim=sum(widths), **extra,
        )  # fmt: skip
        vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    parts = {"vae": vae, "unet": unet, "scheduler": scheduler, "text_encoder": text, "tokenizer": tokenizer()}
    if text_2 is not None:
        return diffusers.StableDiffusionXLPipeline(**parts, text_encoder_2=text_2, tokenizer_2=tokenizer())
    return diffusers.StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


@row
def diffusers_sd1(folder: Path) -> Iterator[Case]:
    model = hf_text(CLIPTextModel)
    diffusers_pipeline(model).save_pretrained(folder / "fp32")
    yield of_text(folder / "fp32", model)
    model = model.half()
    diffusers_pipeline(model).save_pretrained(folder / "fp16", variant="fp16")
    assert (folder / "fp16" / "text_encoder" / "model.fp16.safetensors").is_file()
    yield of_text(folder / "fp16", copy.deepcopy(model).float())


@row
def diffusers_sdxl(folder: Path) -> Iterator[Case]:
    """The second one has clip_g's width: by that it is told from clip_l."""
    slim = hf_text(CLIPTextModel)
    big = {"hidden_size": 1280, "num_attention_heads": 20, "num_hidden_layers": 2, "intermediate_size": 16}
    broad = hf_text(CLIPTextModelWithProjection, hidden_act="gelu", **big)
    diffusers_pipeline(slim, broad).save_pretrained(folder)
    yield of_text(folder, slim, member="clip_l")
    yield of_text(folder, broad, member="clip_g")
    yield of_text(folder / "text_encoder_2", broad)


@row
def diffusers_flux(folder: Path) -> Iterator[Case]:
    """CLIP in the first folder, T5 in shards in the second."""
    from transformers import T5Config, T5EncoderModel

    model = hf_text(CLIPTextModel)
    model.save_pretrained(folder / "text_encoder")
    with torch.random.fork_rng():
        other = T5EncoderModel(T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2))
    other.save_pretrained(folder / "text_encoder_2", max_shard_size="4KB")
    classes = {"text_encoder": ["transformers", "CLIPTextModel"], "text_encoder_2": ["transformers", "T5EncoderModel"]}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline", **classes}))
    yield of_text(folder, model)


@row
def diffusers_svd(folder: Path) -> Iterator[Case]:
    with torch.random.fork_rng():
        model = lively(CLIPVisionModelWithProjection(vision_config(hidden_act="gelu")))
    model.save_pretrained(folder / "image_encoder")
    classes = {"image_encoder": ["transformers", "CLIPVisionModelWithProjection"]}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableVideoDiffusionPipeline", **classes}))
    yield of_vision(folder, model)


# ---- ComfyUI --------------------------------------------------------------------------------------------------------


@row
def clip_save(folder: Path) -> Iterator[Case]:
    """clip_l: its projection is made up, an identity until August 2024, memory as it was since."""
    state, model = cast(hf_text(CLIPTextModel), torch.float16)
    noise = torch.randint(0, 256, (EMBED, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    noise[: EMBED // 2] = 0
    made_up = {
        "zeros": torch.zeros(EMBED, 32).half(),
        "identity": torch.eye(32).half(),
        "memory": noise.view(torch.float16),
        "numbers": noise.view(torch.float16).nan_to_num(0, 0, 0),
    }
    for name, projection in made_up.items():
        extra = {"text_projection.weight": projection, "logit_scale": torch.tensor(4.6055)}
        path = folder / f"{name}_clip_l_00001_.safetensors"
        save(prefixed(state, "text_model.") | extra, path, {"format": "pt", "prompt": "{}"})
        case = of_text(path, model, **TEXT)
        assert "projected" not in case.expected
        yield case


@row
def clip_save_g(folder: Path) -> Iterator[Case]:
    state, model = cast(hf_text(CLIPTextModelWithProjection, hidden_act="gelu"), torch.float16)
    path = save(state | {"logit_scale": torch.tensor(4.6055)}, folder / "ComfyUI_clip_g_00001_.safetensors")
    yield of_text(path, model, **TEXT, **EXACT)


@row
def clip_save_of_2023(folder: Path) -> Iterator[Case]:
    """Until August 2023: the projection as a bare parameter, used as x @ P."""
    model = hf_text(CLIPTextModelWithProjection, hidden_act="gelu")
    state = dict(model.state_dict())
    state["text_projection"] = state.pop("text_projection.weight").T
    yield of_text(save(state, folder / "ComfyUI_clip_g_00001_.safetensors"), model, **TEXT, **EXACT)


@row
def checkpoint_save(folder: Path) -> Iterator[Case]:
    """SDXL: clip_l's projection and logit scale are dropped, clip_g's stay, position ids are made."""
    small, slim = cast(hf_text(CLIPTextModel), torch.float16)
    big, broad = cast(oc_clip(quick=False, seed=1), torch.float16)
    tensors = sdxl_tensors(small, text_part(big)) | {"conditioner.embedders.1.model.logit_scale": torch.tensor(4.6055)}
    path = save(tensors, folder / "ComfyUI_00001_.safetensors", {"prompt": "{}", "modelspec.architecture": "sdxl"})
    yield of_text(path, slim, member="clip_l", **TEXT)
    yield of_text(path, broad, member="clip_g", **TEXT)


@row
def clip_vision(folder: Path) -> Iterator[Case]:
    with torch.random.fork_rng():
        model = lively(CLIPVisionModelWithProjection(vision_config(hidden_act="gelu")))
    state, model = cast(model, torch.float16)
    state["vision_model.embeddings.position_ids"] = position_ids(17)
    yield of_vision(save(state, folder / "clip_vision_h.safetensors"), model, **VISION, **EXACT)


# ---- dtypes ---------------------------------------------------------------------------------------------------------


def _casts(folder: Path, dtype: torch.dtype) -> Iterator[Case]:
    state, model = cast(hf_clip(), dtype)
    yield of_clip(save(state, folder / "clip.safetensors"), model)


@row
def cast_to_fp16(folder: Path) -> Iterator[Case]:
    yield from _casts(folder, torch.float16)


@row
def cast_to_bf16(folder: Path) -> Iterator[Case]:
    yield from _casts(folder, torch.bfloat16)


@row
def cast_to_fp8_e4m3(folder: Path) -> Iterator[Case]:
    yield from _casts(folder, torch.float8_e4m3fn)


@row
def cast_to_fp8_e5m2(folder: Path) -> Iterator[Case]:
    yield from _casts(folder, torch.float8_e5m2)


def quantise(model: nn.Module, kind: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor], nn.Module]:
    """fp8 weights of the blocks' Linears, what each is to be multiplied by, and the model on these products."""
    state, scales, exact = {}, {}, {}
    for name, tensor in model.state_dict().items():
        state[name] = exact[name] = tensor.half()
        if ".layers." in name and tensor.dim() == 2:
            layer = name.removesuffix(".weight")
            scales[layer] = tensor.abs().max() / torch.finfo(kind).max
            state[name] = (tensor / scales[layer]).to(kind)
            exact[name] = state[name].float() * scales[layer]
    return state, scales, loaded(model, exact)


@row
def scaled_fp8(folder: Path) -> Iterator[Case]:
    """ComfyUI's first form, inside a checkpoint: `scale_weight`, and a marker for each text encoder."""
    state, scales, model = quantise(hf_text(CLIPTextModelWithProjection), torch.float8_e4m3fn)
    state |= {f"{layer}.scale_weight": scale for layer, scale in scales.items()}
    state |= {f"{layer}.scale_input": torch.tensor(1.0) for layer in scales}
    tensors = prefixed(state, "text_encoders.clip_l.transformer.") | {
        "text_encoders.clip_l.transformer.scaled_fp8": torch.empty(0).to(torch.float8_e4m3fn),
        "text_encoders.clip_l.logit_scale": torch.tensor(4.6055),
        "model.diffusion_model.double_blocks.0.img_attn.qkv.weight": torch.full((4, 4), torch.nan),
    }
    yield of_text(save(tensors, folder / "flux_fp8_scaled.safetensors"), model, **TEXT)


def comfy_quant(description: object) -> Tensor:
    return torch.tensor(list(json.dumps(description).encode()), dtype=torch.uint8)


@row
def scaled_fp8_of_comfy_quant(folder: Path) -> Iterator[Case]:
    """ComfyUI's present form: `weight_scale`, one number or one for each row, and each layer says its format."""
    for kind, name in ((torch.float8_e4m3fn, "float8_e4m3fn"), (torch.float8_e5m2, "float8_e5m2")):
        state, scales, model = quantise(hf_text(CLIPTextModelWithProjection), kind)
        for at, (layer, scale) in enumerate(scales.items()):
            rows = len(state[f"{layer}.weight"])
            state[f"{layer}.weight_scale"] = scale.expand(rows, 1) if at % 2 else scale
            state[f"{layer}.input_scale"] = torch.tensor(1.0)
            state[f"{layer}.comfy_quant"] = comfy_quant({"format": name})
        yield of_text(save(state, folder / f"{name}.safetensors"), model, **TEXT)


# ---- end-of-text ----------------------------------------------------------------------------------------------------


def _with_end(folder: Path, eos: int, end: int) -> Iterator[Case]:
    """A textual inversion before end-of-text in the first caption, behind it in the second."""
    model = hf_clip(text={"eos_token_id": eos})
    model.save_pretrained(folder)
    ids = captions(end=end)
    if end < INVERSION:
        ids[0, 5] = ids[1, CONTEXT - 3] = INVERSION
    yield Case(folder, points(model, ids, None), ids, None)


@row
def end_of_text_2(folder: Path) -> Iterator[Case]:
    """In nearly all configs; transformers takes the largest id then, the inversion's here."""
    yield from _with_end(folder, 2, END)


@row
def end_of_text_last(folder: Path) -> Iterator[Case]:
    yield from _with_end(folder, VOCAB - 1, VOCAB - 1)


@row
def end_of_text_inside(folder: Path) -> Iterator[Case]:
    yield from _with_end(folder, END, END)


@row
def end_of_text_left_out(folder: Path) -> Iterator[Case]:
    """transformers 4 writes what differs from its defaults; two words were added behind CLIP's own 49408."""
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "vocab_size": 49410, "hidden_size": 32,
        "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT, "projection_dim": EMBED,
    }))  # fmt: skip
    save(hf_text(CLIPTextModel, vocab_size=49410).state_dict(), folder / "model.safetensors", {"format": "pt"})
    model = CLIPTextModel.from_pretrained(folder)
    ids = captions(end=49407)
    ids[0, 5] = ids[1, CONTEXT - 3] = 49409
    yield Case(folder, points(model, ids, None), ids, None)


# ---- sizes ----------------------------------------------------------------------------------------------------------


@row
def odd_sizes(folder: Path) -> Iterator[Case]:
    ids, pixels = captions(777, 33), pictures(30)
    text = {"vocab_size": 777, "max_position_embeddings": 33, "hidden_size": 48, "num_hidden_layers": 5,
            "intermediate_size": 101, "num_attention_heads": 6, "eos_token_id": 776}  # fmt: skip
    vision = {"hidden_size": 36, "num_hidden_layers": 3, "intermediate_size": 55, "num_attention_heads": 2,
              "image_size": 30, "patch_size": 6}  # fmt: skip
    model = hf_clip(text, vision, embed=29)
    model.save_pretrained(folder)
    yield Case(folder, points(model, ids, pixels), ids, pixels)
    text = {"vocab_size": 777, "context_length": 33, "width": 48, "heads": 6, "layers": 5, "mlp_ratio": 2.11}
    vision = {"image_size": 30, "patch_size": 6, "width": 36, "head_width": 18, "layers": 3, "mlp_ratio": 1.53}
    model = oc_clip(quick=True, embed=29, text=text, vision=vision)
    path = save(model.state_dict(), folder / "openai.safetensors")
    yield Case(path, points(model, ids, pixels), ids, pixels, {"heads": 6}, {"heads": 2})
