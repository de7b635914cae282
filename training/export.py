"""Write trained parts as a diffusers checkpoint in the hub's layout, loadable by `WanPipeline.from_pretrained`.

Weights of autoencoder and transformer are stored in half precision (a difference far below one level in 255, see README.md);
the text encoder is tiny and stays float32, because transformers loads a model in the precision it was stored in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline

from dualparal.model.source import POCKET_WEIGHTS
from training.checkpoints import Ema
from training.train_dit import PocketModel


def build_pipeline(vae: AutoencoderKLWan, model: PocketModel) -> WanPipeline:
    """A plain `WanPipeline` around copies of the weights; `vae` and `model` are left as they are."""
    fresh_vae = AutoencoderKLWan.from_config(_without_origin(vae.config))
    fresh_vae.load_state_dict(vae.state_dict())
    transformer = type(model.transformer).from_config(_without_origin(model.transformer.config))
    transformer.load_state_dict(model.transformer.state_dict())
    text_encoder = type(model.text_encoder)(model.text_encoder.config)
    text_encoder.load_state_dict(model.text_encoder.state_dict())
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
    )
    return WanPipeline(
        tokenizer=model.tokenizer, text_encoder=text_encoder.eval(), vae=fresh_vae.eval(), scheduler=scheduler,
        transformer=transformer.eval(),
    )  # fmt: skip


def _without_origin(config: dict[str, Any]) -> dict[str, Any]:
    """What a module was built from, without diffusers' own notes: `_name_or_path` would tell where training kept its files."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


def export(vae: AutoencoderKLWan, model: PocketModel, ema: Ema, folder: Path = POCKET_WEIGHTS) -> None:
    """Write the averaged model to `folder`."""
    with ema.applied(model):
        pipeline = build_pipeline(vae, model)
    pipeline.vae.half()
    pipeline.transformer.half()
    pipeline.save_pretrained(folder)
