"""One table of what a checkpoint in the hub's layout holds: parts, files, classes, numbers, tensors and how they are stored.

Download, validation, loading, byte counts and `tiny` read it; a part that the program learns to use is a row here. Follows
`WanPipeline` in diffusers. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dualparal.model.part_shapes import Shapes, text_encoder_shapes, transformer_shapes, vae_shapes

INDEX = "model_index.json"
PIPELINE = "WanPipeline"
WHOLE = frozenset({"F64", "F32", "F16", "BF16"})  # as safetensors spells them
WHOLE_OR_FP8 = WHOLE | {"F8_E4M3", "F8_E5M2"}
SCALED = WHOLE_OR_FP8 | {"I8"}  # of a tensor with a scale, in every part

Config = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One folder of a checkpoint.

    `numbers`: the largest value that makes sense of each whole number of its config, beyond which it is damaged; `ranges`:
    what each real number is above, and at most; `vectors`: lists of one finite number for each of the named number; `values`:
    those that are understood of other settings, the first of which stands where the config is silent.
    """

    name: str
    library: str = "diffusers"
    class_name: str | None = None  # nothing is asked of a part without
    config: str | None = "config.json"
    weights: str | None = None  # stem of its safetensors files
    files: tuple[str, ...] = ()  # that must be there besides
    others: str | None = None  # pattern of what else is downloaded
    shapes: Callable[[Config], Shapes] = field(default=lambda config: {})
    dtypes: frozenset[str] = WHOLE
    aliases: Mapping[str, str] = field(default_factory=dict)  # other names of the same tensors
    numbers: Mapping[str, int] = field(default_factory=dict)
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    vectors: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    @property
    def downloads(self) -> list[str]:
        """Patterns of the files that a run needs of this part."""
        names = [self.config, self.weights and "*.safetensors*", *self.files, self.others]
        return [f"{self.name}/{name}" for name in names if name]


_DIT = Part(
    name="transformer", class_name="WanTransformer3DModel", weights="diffusion_pytorch_model", shapes=transformer_shapes,
    dtypes=WHOLE_OR_FP8,
    numbers={
        "num_layers": 1000, "num_attention_heads": 1000, "attention_head_dim": 10_000, "ffn_dim": 1_000_000,
        "in_channels": 10_000, "text_dim": 1_000_000, "freq_dim": 100_000, "rope_max_seq_len": 10_000_000,
    },
    values={"qk_norm": ("rms_norm_across_heads",)},
)  # fmt: skip
PARTS = {
    part.name: part
    for part in (
        _DIT,
        Part(**{**vars(_DIT), "name": "transformer_2"}),
        Part(
            name="vae", class_name="AutoencoderKLWan", weights="diffusion_pytorch_model", shapes=vae_shapes,
            numbers={"z_dim": 10_000, "base_dim": 100_000, "num_res_blocks": 100},
            vectors={"latents_mean": "z_dim", "latents_std": "z_dim"},
        ),
        Part(
            name="text_encoder", library="transformers", class_name="UMT5EncoderModel", weights="model",
            shapes=text_encoder_shapes, dtypes=WHOLE_OR_FP8, aliases={"encoder.embed_tokens.weight": "shared.weight"},
            numbers={
                "num_layers": 1000, "num_heads": 1000, "d_kv": 10_000, "d_model": 1_000_000, "d_ff": 1_000_000,
                "vocab_size": 100_000_000, "relative_attention_num_buckets": 10_000,
            },
        ),
        Part(name="tokenizer", library="transformers", config=None, files=("tokenizer.json",), others="*"),
        Part(
            name="scheduler", class_name="UniPCMultistepScheduler", config="scheduler_config.json",
            numbers={"num_train_timesteps": 1_000_000, "solver_order": 10},
            ranges={
                "flow_shift": (0.0, 100.0), "beta_start": (0.0, 1.0), "beta_end": (0.0, 1.0), "sample_max_value": (0.0, 1e6),
                "dynamic_thresholding_ratio": (0.0, 1.0),
            },
            values={
                "use_dynamic_shifting": (False,), "use_beta_sigmas": (False,), "predict_x0": (True,), "solver_p": (None,),
                "trained_betas": (None,), "sigma_min": (None,), "sigma_max": (None,), "lower_order_final": (True, False),
                "use_flow_sigmas": (False, True), "use_karras_sigmas": (False, True), "use_exponential_sigmas": (False, True),
                "thresholding": (False, True), "rescale_betas_zero_snr": (False, True),
                "prediction_type": ("epsilon", "flow_prediction", "v_prediction", "sample"),
                "solver_type": ("bh2", "bh1", "midpoint", "heun", "logrho"),
                "timestep_spacing": ("linspace", "leading", "trailing"), "final_sigmas_type": ("zero", "sigma_min"),
                "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
            },
        ),
    )
}  # fmt: skip
TRANSFORMERS = ("transformer", "transformer_2")  # the second where there are two experts
DOWNLOADS = [INDEX, *(pattern for part in PARTS.values() for pattern in part.downloads)]
KEY_FILES = [INDEX, *(f"{name}/{PARTS[name].config}" for name in ("transformer", "vae", "text_encoder"))]
