"""The released students of Distilled Decoding 1 (microsoft/distilled_decoding) as ours: dict in, dict out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from arimg.errors import CheckpointError
from arimg.interop.llamagen import ar_config_from_llamagen, infer_ar_config
from arimg.interop.var import infer_var_config, is_var, transformer_from_var, var_config_from_release

_STUDENT = ("n_d_embed.", "layerwise_n_d_embed.", "final_layer_conti.")     # beside the teacher's own keys


def is_student(state: Mapping[str, Tensor]) -> bool:
    """Whether these are the keys of a student, of LlamaGen or VAR."""
    return "n_d_embed.weight" in state


def student_from_dd(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of an ARStudent or a VARStudent. A VAR student whose blocks read the noise/data embedding as it is
    (`layerwise_n_d_embed=False`) gets layers that leave it so."""
    student = {key if key.startswith(_STUDENT) else f"backbone.{key}": tensor
               for key, tensor in transformer_from_var(state).items()}
    if is_var(state) and "layerwise_n_d_embed.0.weight" not in state:
        table_2D = state["n_d_embed.weight"]
        blocks = {key.split(".")[1] for key in state if key.startswith("blocks.")}
        for layer in range(len(blocks) + 1):
            student[f"layerwise_n_d_embed.{layer}.weight"] = torch.eye(table_2D.shape[1]).to(table_2D)
            student[f"layerwise_n_d_embed.{layer}.bias"] = torch.zeros_like(table_2D[0])
    return student


def ar_student_config_from_dd(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for ARStudentConfig from the original's arguments. Raises CheckpointError."""
    teacher = {name: value for name, value in config.items() if name != "codebook_dim"}
    return {**ar_config_from_llamagen(teacher), "latent_dim": config["codebook_dim"]}


def infer_ar_student_config(state: Mapping[str, Tensor], heads: int | None = None) -> dict[str, Any]:
    """Keyword arguments for ARStudentConfig that the shapes tell; see `infer_ar_config`. Raises CheckpointError."""
    if "output.weight" not in state:
        raise CheckpointError("student weights: output.weight is missing, so the sizes cannot be read; "
                              "give a complete file of LlamaGen-DD")
    teacher = infer_ar_config({**state, "tok_embeddings.weight": state["output.weight"]}, heads)
    return {**teacher, "latent_dim": state["tok_embeddings.weight"].shape[1]}


def var_student_config_from_dd(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for the VARConfig of a VARStudent from the original's arguments. Raises CheckpointError."""
    return var_config_from_release({name: value for name, value in config.items()
                                    if name not in ("note", "layerwise_n_d_embed")})


def infer_var_student_config(state: Mapping[str, Tensor], heads: int | None = None) -> dict[str, Any]:
    """The same read off the shapes, without the scale that a student has before the teacher's. Raises CheckpointError,
    see `infer_var_config`."""
    teacher = dict(state)
    for name, axis in (("lvl_embed.weight", 0), ("pos_1LC", 1), ("lvl_1L", 1)):
        if name in teacher:
            teacher[name] = teacher[name].narrow(axis, 1, max(0, teacher[name].shape[axis] - 1))
    if "lvl_1L" in teacher:
        teacher["lvl_1L"] = teacher["lvl_1L"] - 1
    return infer_var_config(teacher, heads)
